"""The lowest versions that pyproject.toml allows, as constraints for pip: `python tests/lowest.py > constraints.txt`.

`make test-lowest` runs the suite with these versions, so that every lower bound is tested, except that of torch: the
development tools need a later one. What ran with torch 2.8 is in docs/log.md.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
NAME, FLOOR = re.compile(r"[A-Za-z0-9._-]+"), re.compile(r">=\s*([0-9][^,;\s]*)")


def floors(requirements: list[str]) -> dict[str, str]:
    """Package -> lowest version, for requirements with a lower bound."""
    versions = {}
    for requirement in requirements:
        name, floor = NAME.match(requirement), FLOOR.search(requirement)
        if name is not None and floor is not None:
            versions[name[0]] = floor[1]
    return versions


def main() -> None:
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    for name, version in sorted(
        floors([*project["dependencies"], *(requirement for extra in extras for requirement in extra)]).items()
    ):
        sys.stdout.write(f"{name}=={version}\n")


if __name__ == "__main__":
    main()
