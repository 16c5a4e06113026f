"""URLs: how they may be shown, without credentials, and what the stores behind them answered."""

import re
from urllib.parse import parse_qsl, urlsplit, urlunsplit

SIGNING = ("signature", "token", "secret", "password", "credential", "sig", "key")
"""Ends of the names of query parameters that let their holder in, as in signed links."""

LOGINS = ("ftp", "sftp", "ssh", "smb", "hdfs", "webhdfs")
"""Protocols whose user name alone is no secret; elsewhere it may be a token."""


PASSING_STATUS = frozenset({408, 409, 425, 429})
"""Statuses of 4xx that ask to come again: too slow, somebody else at it, too early, too often."""

PASSING_CODES = frozenset(
    {"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "SlowDown"}
)
"""Errors of S3 that come with status 400 and are of the way there, not of the request."""


def public_url(url: str) -> str:
    """The URL, chained or not, without a user's name and password and without a signed query.

    What every message, page and record shows of a URL; a path stays as it is.
    """
    return "::".join(map(_public, url.split("::")))


def holds_credentials(url: str) -> bool:
    """Whether whoever reads this URL, chained or not, can use its writer's rights."""
    return has_login(url) or any(map(_is_signed, url.split("::")))


def has_login(url: str) -> bool:
    """Whether a password or a token stands before the host of this URL, chained or not."""
    return any(map(_has_login, url.split("::")))


def http_status(error: BaseException | None) -> int | None:
    """The HTTP status that an error of a store's library, or one that caused it, tells of.

    The libraries need not be there: botocore keeps it in `response`, gcsfs in `code` and aiohttp
    in `status`.
    """
    while error is not None:
        known = vars(error)
        response = known.get("response")
        told = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        for status in (told.get("HTTPStatusCode"), known.get("status"), known.get("code")):
            if isinstance(status, int | str) and str(status).isdecimal():
                return int(status)
        error = error.__cause__
    return None


def is_refusal(error: BaseException) -> bool:
    """Whether a store understood and said no (4xx), so that asking again cannot help."""
    status = http_status(error)
    if status is None or not 400 <= status < 500 or status in PASSING_STATUS:
        return False
    return not any(code in str(error) or code in str(error.__cause__) for code in PASSING_CODES)


def _public(url: str) -> str:
    protocol, there, rest = url.partition("://")
    if not there:
        return url
    _, host = _login(rest)
    return urlunsplit(urlsplit(f"{protocol}://{host}")._replace(query=""))


def _has_login(url: str) -> bool:
    protocol, there, rest = url.partition("://")
    login, _ = _login(rest) if there else ("", "")
    return ":" in login or (bool(login) and protocol not in LOGINS)


def _is_signed(url: str) -> bool:
    names = (name.lower() for name, _ in parse_qsl(urlsplit(url).query)) if "://" in url else ()
    return any(name.endswith(SIGNING) for name in names)


def _login(rest: str) -> tuple[str, str]:
    """(user and password, what follows them) of a URL without its protocol.

    Secrets of S3 hold slashes, which people do not escape: what stands between a colon and an @ is
    one, unless the colon begins a port.
    """
    found = re.match(r"([^/@]*)@|([^/@:]*:(?!\d+/)[^@]*)@", rest)
    return (found[1] or found[2] or "", rest[found.end() :]) if found else ("", rest)
