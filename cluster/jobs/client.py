"""A connection to a cluster's Ray Jobs API (http://HEAD:8265), and its errors in one line.

Whoever reaches the Jobs API of a cluster can run any command on it. So a cluster that asks for no
token is refused, unless it is this machine or the person insists. The token is found where Ray
itself looks for it, and is sent to the given address alone.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from cluster.cli.words import is_jobs_address

ANSWERS_WITHIN_S = 20
"""Seconds that a cluster has for its first answer."""

TOKEN = "RAY_AUTH_TOKEN"
TOKEN_FILE = "RAY_AUTH_TOKEN_PATH"
HOME_FILE = Path(".ray/auth_token")
"""In the home folder."""

_OVERRIDING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Variables that Ray's client follows rather than the address that it was given."""


class JobsError(RuntimeError):
    """What a cluster refused, or why it cannot be asked; one line with the way out."""


def connect(address: str, insecure: bool = False) -> JobSubmissionClient:
    """A client of the Jobs API at `address`, with this person's token where one is asked for.

    Raises JobsError: nobody answers, it is no Ray, the token is missing or wrong, or the cluster
    asks for none and this is not `insecure`.
    """
    url = _checked(address)
    headers = {}
    if _asks_for_token(url):
        token = find_token()
        if token is None:
            raise JobsError(
                f"{url} asks for a token; set {TOKEN} or {TOKEN_FILE}, or put it into "
                f"~/{HOME_FILE} (`ray get-auth-token` shows it on the cluster)"
            )
        headers = {"Authorization": f"Bearer {token}"}
    elif not insecure and not is_this_machine(url):
        raise JobsError(
            f"{url} asks for no token: whoever reaches it can run commands there; start the "
            "cluster with RAY_AUTH_MODE=token, or say --insecure if its network is closed"
        )
    with in_one_line(url), _without_overriding():
        try:
            return JobSubmissionClient(url, headers=headers)
        except RuntimeError as error:
            if "returned 404" in str(error):
                raise JobsError(_no_ray(url, 404)) from error
            raise


@contextmanager
def in_one_line(url: str) -> Iterator[None]:
    """What Ray's client raises becomes a JobsError."""
    try:
        yield
    except AuthenticationError as error:
        raise JobsError(
            f"{url} does not take this token; {TOKEN}, the file of {TOKEN_FILE} or ~/{HOME_FILE} "
            "must hold the cluster's (`ray get-auth-token` shows it there)"
        ) from error
    except (requests.ConnectionError, ConnectionError, requests.Timeout) as error:
        raise JobsError(_no_answer(url)) from error
    except JobsError:
        raise
    except (RuntimeError, requests.RequestException) as error:
        raise JobsError(f"{url}: {_reason(error)}") from error


def find_token() -> str | None:
    """The token that Ray would use: of the variable, of the file it names, or of the home folder.

    Raises JobsError where the named file cannot be read.
    """
    token = os.environ.get(TOKEN, "").strip()
    if token:
        return token
    named = os.environ.get(TOKEN_FILE)
    place = Path(named) if named else Path.home() / HOME_FILE
    try:
        return place.read_text(encoding="utf-8").strip() or None
    except OSError as error:
        if named:
            raise JobsError(f"{TOKEN_FILE}={named} cannot be read: {error.strerror}") from error
        return None


def is_this_machine(url: str) -> bool:
    """Whether the address is of loopback."""
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def _checked(address: str) -> str:
    parts = urlsplit(address)
    if not is_jobs_address(address) or not parts.hostname:
        raise JobsError(f"--address {address} is no http://HEAD:8265 of a cluster's Jobs API")
    if parts.username or parts.password or parts.query:
        raise JobsError("--address holds credentials; give them as RAY_AUTH_TOKEN instead")
    return address.rstrip("/")


def _asks_for_token(url: str) -> bool:
    """Asks the cluster for its version, without a token."""
    try:
        answer = requests.get(f"{url}/api/version", timeout=ANSWERS_WITHIN_S)
    except (requests.ConnectionError, requests.Timeout) as error:
        raise JobsError(_no_answer(url)) from error
    if answer.status_code in (401, 403):
        return True
    if answer.status_code != 200 or "ray_version" not in answer.text:
        raise JobsError(_no_ray(url, answer.status_code))
    return False


def _no_ray(url: str, status: int) -> str:
    return (
        f"{url} answers, but not as Ray's Jobs API does (status {status} for /api/version); give "
        "the address of the head's dashboard, e.g. http://HEAD:8265"
    )


def _no_answer(url: str) -> str:
    return (
        f"{url} does not answer; is it the head's dashboard (port 8265), does it run, and does a "
        "tunnel, port-forward or ingress lead there?"
    )


@contextmanager
def _without_overriding() -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in _OVERRIDING if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _reason(error: Exception) -> str:
    """The last line of what may be a whole traceback of the cluster's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
