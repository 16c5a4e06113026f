"""Looks for secrets in the files of the repository, and for known faults of what an image installs.

`make audit`; continuous integration runs it before the tests. Exit status 1 where something is
found. Where the advisories cannot be asked (no network) it says so and does not count as a pass.
"""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from detect_secrets import SecretsCollection
from detect_secrets.settings import default_settings

PROJECT = Path(__file__).parents[1]

MADE_UP = ("Secret Keyword", "Basic Auth Credentials")
"""What tests of hiding secrets are made of; keys and tokens of known shapes are found there too."""

CANARY = ("requests", "2.19.0")
"""A release with a published fault: advisories that do not know of it know nothing."""

ADVISORIES = "https://pypi.org/pypi/{}/{}/json"

ACCEPTED: tuple[str, ...] = ()
"""Advisories that do not concern us, each with its reason beside it."""


def main() -> int:
    """Both scans; the number of failed ones."""
    return int(not no_secrets()) + int(not no_known_faults())


def no_secrets() -> bool:
    """Whether no file under version control holds something like a secret, naming each."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    found = SecretsCollection(root=str(PROJECT))
    files = [name for name in listed.stdout.split("\0") if name and (PROJECT / name).is_file()]
    with default_settings():
        for name in files:
            found.scan_file(name)
    faults = [
        f"{name}:{secret.line_number}: {secret.type}; take it out, or end the line with "
        "`pragma: allowlist secret` where it is none"
        for name, secret in found
        if not (name.startswith("tests/") and secret.type in MADE_UP)
    ]
    say(*faults, f"secrets: {len(faults)} in {len(files)} files")
    return not faults


def no_known_faults() -> bool:
    """Whether no published advisory concerns a version that the image installs."""
    if not advisories_answer():
        say("dependencies: NOT audited, the advisories of PyPI cannot be asked from here")
        return True
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "pip-audit"]
    subprocess.run(pip, check=True)
    pins = PROJECT / "docker" / "constraints.txt"
    audit = [sys.executable, "-m", "pip_audit", "--requirement", str(pins), "--no-deps"]
    audit += ["--disable-pip", "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(audit, capture_output=True, text=True, check=False)
    try:
        told = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        say(done.stderr, "dependencies: the audit itself failed")
        return False
    faults = [
        f"{each['name']} {each['version']}: {fault['id']}, mended in {fault['fix_versions']}"
        for each in told
        for fault in each.get("vulns", ())
        if fault["id"] not in ACCEPTED
    ]
    unknown = sum("skip_reason" in each for each in told)
    say(*faults, f"dependencies: {len(faults)} known faults in {len(told) - unknown} packages")
    say(*([f"dependencies: {unknown} of them unknown to PyPI"] if unknown else []))
    return not faults


def advisories_answer() -> bool:
    """Whether PyPI tells of the fault that everybody knows: one question, not one per package."""
    try:
        with urllib.request.urlopen(ADVISORIES.format(*CANARY), timeout=15) as answer:
            return bool(json.load(answer).get("vulnerabilities"))
    except (urllib.error.URLError, OSError, ValueError):
        return False


def say(*lines: str) -> None:
    """To the one who waits."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
