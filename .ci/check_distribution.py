"""That the built distributions hold what they should: `python .ci/check_distribution.py DIST` in the tree they are of.

The wheel: every file of htsr/ and cli/ and its own metadata, no more. The source distribution: also tests, studies and
the papers at the top. The changelog has a section for the version.
"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path


def files(folder: str, as_name: str | None = None) -> set[str]:
    """Paths of a folder's files, the folder named as it is installed."""
    found = (path for path in Path(folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {Path(as_name or folder, path.relative_to(folder)).as_posix() for path in found}


def complain(what: str, expected: set[str], found: set[str]) -> bool:
    """Say what differs; returns whether anything does."""
    for word, names in (("lacks", expected - found), ("should not hold", found - expected)):
        if names:
            print(f"the {what} {word}: {', '.join(sorted(names))}", file=sys.stderr)
    return expected != found


def main(dist: Path) -> int:
    """Compare; 1 if anything is wrong."""
    (wheel,), (source,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    version = wheel.name.split("-")[1]
    installed = {n for n in zipfile.ZipFile(wheel).namelist() if not n.startswith(f"htsr-{version}.dist-info/")}
    wrong = complain("wheel", files("htsr") | files("cli", "htsr_cli"), installed)

    with tarfile.open(source) as archive:
        members = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    top = {"pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md"}
    wanted = top.union(*(files(folder) for folder in ("htsr", "cli", "tests", "reports")))
    wrong |= complain("source distribution", wanted, members & wanted)
    if f"\n## {version} " not in Path("CHANGELOG.md").read_text():
        print(f"CHANGELOG.md has no section for {version}", file=sys.stderr)
        wrong = True
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
