"""Print the lower bounds in pyproject.toml as constraints, which `make test-oldest` installs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def find_lower_bounds(*projects: Path) -> dict[str, str]:
    """Find the oldest version that projects allow of each distribution they name.

    Args:
        projects: Files like pyproject.toml.

    Returns:
        Versions by name, of dependencies and of those of all extras.
    """
    requirements = []
    for project in projects:
        table = tomllib.loads(project.read_text())["project"]
        requirements += table["dependencies"]
        for extra in table.get("optional-dependencies", {}).values():
            requirements += extra
    found = [re.match(r"([\w-]+)(?:\[.*\])?>=([\d.]+)", text) for text in requirements]
    return {match[1]: match[2] for match in found if match}


if __name__ == "__main__":
    bounds = find_lower_bounds(ROOT / "pyproject.toml", ROOT / "replication" / "pyproject.toml")
    print("\n".join(f"{name}=={version}" for name, version in bounds.items()))
