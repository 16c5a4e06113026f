"""`python -m tests.parity DIR`: every case of DIR/cases against what the models here compute."""

import sys
from pathlib import Path

from tests.parity.run import run_all


def main(arguments: list[str]) -> int:
    """0 where every case passes, 1 where one misses or cannot be run, 2 for a wrong call."""
    if len(arguments) != 1:
        print(
            "usage: python -m tests.parity DIR   (DIR holds cases/ and manifests/)", file=sys.stderr
        )
        return 2
    try:
        return 0 if run_all(Path(arguments[0])) else 1
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1


sys.exit(main(sys.argv[1:]))
