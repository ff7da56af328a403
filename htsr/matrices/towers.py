"""The towers of a model: parts with blocks of their own, such as encoder and decoder, or vision and language.

Their names are what roles begin with (`htsr.matrices.roles`): ``decoder.attn.q``, ``vision.mlp.up``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_TOWERS = {
    "vision": re.compile(r"vision|visual|image|^vit$|^v$"),
    "audio": re.compile(r"audio|speech|^a$"),
    "decoder": re.compile(r"decoder|^dec$"),
    "encoder": re.compile(r"encoder|^enc$"),
}


def tower_prefixes(names: Iterable[str]) -> dict[str, str]:
    """Where the towers of a model are, and what their roles begin with, as {"model.vision_tower.": "vision."}.

    Empty where there is one tower only. An encoder without a decoder beside it (and the reverse) goes without a name.

    Args:
        names: names of all weights of a model.
    """
    containers = {found[1] for name in names if (found := re.match(r"(.*?)\.\d+\.", name))}
    towers = {container: _tower(container) for container in containers}
    if not {"encoder", "decoder"} <= {tower for _, tower in towers.values()}:
        towers = {c: (root, "" if tower in ("encoder", "decoder") else tower) for c, (root, tower) in towers.items()}
    if len({tower for _, tower in towers.values()}) < 2:
        return {}
    inner_first = sorted(towers.values(), key=lambda found: (-len(found[0]), found))
    return {f"{root}.": f"{tower}." for root, tower in inner_first if tower}


def tower_of(name: str, prefixes: dict[str, str]) -> str:
    """The prefix of the role of the matrix `name`, empty for none; `prefixes` are from `tower_prefixes`."""
    return next((prefix for root, prefix in prefixes.items() if name.startswith(root)), "")


def _tower(container: str) -> tuple[str, str]:
    """The path to the component that names the tower, and the name."""
    parts = container.split(".")
    for tower, pattern in _TOWERS.items():
        for i, part in enumerate(parts):
            if pattern.search(part.lower()):
                return ".".join(parts[: i + 1]), tower
    return container, ""
