"""Prints the requirements of pyproject.toml and of the named extras, one a line, for pip.

`python requirements.py pyproject.toml s3 gcs`: pip itself installs them only with the project.
"""

import sys
import tomllib
from pathlib import Path


def main() -> None:
    """Reads the file and the extras from the command line."""
    file, *extras = sys.argv[1:]
    project = tomllib.loads(Path(file).read_text())["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
