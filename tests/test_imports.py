"""The rooms of htsr, and which may know which: imports run one way, and none in a circle.

Every import counts, also those within functions and for type checking. CONTRIBUTING.md has the same map in words.
"""

from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

import grimp
import pytest

# Each room, and the rooms that it may import from; every one may take from those `BELOW`.
ARROWS = {
    "meeting": set(),
    "ranks": {"meeting"},
    "matrices": {"ranks"},
    "spectra": set(),
    "allocate": set(),
    "files": {"matrices"},
    "reporting": {"files"},
    "analysis": {"files", "matrices", "ranks", "reporting", "spectra"},
    "calibration": {"analysis", "files", "matrices", "ranks", "reporting"},
    "training": {"allocate", "analysis", "calibration", "files", "matrices", "ranks", "reporting", "spectra"},
    "finetuning": {"analysis", "calibration", "files", "matrices", "ranks", "reporting", "spectra", "training"},
}
BELOW = {"errors", "arrays", "results", "cache", "_version"}
# The public face, and what launchers start.
ENTRIES = {"htsr", "htsr.finetune", "htsr.recipe", "htsr.analysis.__main__"}


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("htsr", cache_dir=None)


def _imports(graph: grimp.ImportGraph) -> Iterator[tuple[str, str]]:
    for module in sorted(graph.modules - ENTRIES):
        for other in sorted(graph.find_modules_directly_imported_by(module)):
            yield module, other


def _room(module: str) -> str:
    return module.split(".")[1]


def test_nothing_imports_in_a_circle(graph):
    sorter = TopologicalSorter[str]()
    for module, other in _imports(graph):
        sorter.add(module, other)
    try:
        sorter.prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_every_import_follows_an_arrow(graph):
    wrong = [
        f"{module} -> {other}"
        for module, other in _imports(graph)
        if _room(module) != _room(other)
        and _room(other) not in BELOW | (set() if _room(module) in BELOW else ARROWS[_room(module)])
    ]
    assert not wrong, wrong


def test_arrows_run_one_way_and_are_all_used(graph):
    TopologicalSorter(ARROWS).prepare()
    used = {(_room(module), _room(other)) for module, other in _imports(graph)}
    assert {(room, other) for room, others in ARROWS.items() for other in others} <= used


def test_the_entries_are_imported_by_nobody(graph):
    assert not [f"{module} -> {other}" for module, other in _imports(graph) if other in ENTRIES]
