"""What the site has beyond its pages: the studies with their pictures, and what is generated from docstrings.

Pages link to files of the repository as they lie there, so that the links work in both places: those to a study, a
picture or a recipe are turned to the copy that the site has.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import htsr
from htsr.spectra.metrics import LayerMetrics

ROOT = Path(__file__).parents[2]
PAGES = "reports/documentation/pages"
PLACES = {"reports": "studies", "htsr/finetuning/recipes": "recipes"}  # folders of the repository on the site
SCIENCE = (
    "spectra.esd", "spectra.density", "spectra.eigenvalues", "spectra.tridiagonal", "spectra.certainty", "spectra.resolution", "spectra.product", "spectra.windows", "spectra.tail", "spectra.scan", "spectra.resampling",
    "spectra.erg", "spectra.bulk", "spectra.permutation", "spectra.null", "spectra.laws", "spectra.alternatives", "spectra.quality", "spectra.lanczos", "spectra.scores", "spectra.directions", "spectra.traps", "spectra.nudge", "allocate",
)  # fmt: skip
_LINK = re.compile(r"(?<=\]\()[^)\s]+(?=\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the recipes, the studies, and a page that lists them."""
    studies = sorted(ROOT.glob("reports/*/README.md"))
    others = [
        path
        for pattern in ("reports/*/*.png", "reports/*/*.svg", "htsr/finetuning/recipes/*.yaml")
        for path in ROOT.glob(pattern)
    ]
    for path in [*studies, *sorted(others)]:
        there = place(path.relative_to(ROOT).as_posix())
        assert there is not None
        files.append(File.generated(config, there, abs_src_path=str(path)))
    config.nav[-1]["Studies"] = ["studies/README.md", *(f"studies/{path.parent.name}/README.md" for path in studies)]
    lines = [f"- [{_title(path)}]({path.parent.name}/README.md)" for path in studies]
    text = "# Studies\n\nEach runs again from one command, shows every arm, and says what was too small to tell.\n\n"
    files.append(File.generated(config, "studies/README.md", content=text + "\n".join(lines) + "\n"))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put in what is generated, and turn links to the studies."""
    for name, make in GENERATED.items():
        markdown = markdown.replace(f"<!-- generated: {name} -->", make())
    here = posixpath.dirname(page.file.src_uri)
    return _LINK.sub(lambda link: turned(link[0], here), markdown)


def place(path: str) -> str | None:
    """Where the site has a file of the repository."""
    for folder, there in PLACES.items():
        if path.startswith(f"{folder}/") and not path.startswith(PAGES):
            return there + path.removeprefix(folder)
    return None


def turned(link: str, here: str) -> str:
    """A link from a page in the folder `here` of the site: to a file of the repository, to where the site has it."""
    file, mark, anchor = link.partition("#")
    there = place(posixpath.normpath(posixpath.join(PAGES, here, file))) if file.startswith("..") else None
    return link if there is None else posixpath.relpath(there, here or ".") + mark + anchor


def metric_table() -> str:
    """Every column of an analysis with its meaning, from the docstring of `LayerMetrics`."""
    lines = ["| column | meaning |", "| --- | --- |"]
    for name, meaning in attributes(LayerMetrics).items():
        lines.append(f"| `{name}` | {_cell(meaning)} |")
    return "\n".join(lines)


def attributes(documented: type) -> dict[str, str]:
    """Attributes and their meaning, from the Google-style docstring of a class."""
    section = re.split(r"\n\s*\n", (documented.__doc__ or "").partition("Attributes:\n")[2])[0]
    entries = re.findall(r"^ {8}(\w+): (.+(?:\n {9,}.+)*)", section, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text) for name, text in entries}


def public_names() -> str:
    """Every public name, for mkdocstrings."""
    return "\n\n".join(f"::: htsr.{name}" for name in sorted(htsr.__all__, key=str.lower) if not name.startswith("_"))


def science() -> str:
    """The modules of the statistics, for mkdocstrings."""
    options = "    options:\n      show_root_full_path: true"
    return "\n\n".join(f"::: htsr.{name}\n{options}" for name in SCIENCE)


def _cell(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


def _title(study: Path) -> str:
    return study.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


GENERATED: dict[str, Callable[[], str]] = {
    "metric columns": metric_table,
    "public names": public_names,
    "science": science,
}
