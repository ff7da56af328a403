"""What other tools take as the list of weights that train: PEFT, Axolotl, Spectrum, or anyone's loop.

All are pure functions of names. A name is that of a stored tensor without ``.weight``, as rows have it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any


def regexes(names: Sequence[str]) -> list[str]:
    """One regular expression for each parameter that trains, which ``re.match`` finds in its name and in no other.

    Args:
        names: names of the tensors that train.

    Examples:
        >>> from htsr.analysis.training_lists import regexes
        >>> regexes(["layers.3.mlp.up_proj"])
        ['^layers\\\\.3\\\\.mlp\\\\.up_proj(\\\\.weight)?$']
    """
    return [rf"^{re.escape(name)}(\.weight)?$" for name in names]


def axolotl(names: Sequence[str]) -> str:
    """The key ``unfrozen_parameters`` of an Axolotl configuration, in YAML.

    Axolotl puts a backslash before every dot of a pattern itself, so dots stand as they are.

    Args:
        names: names of the tensors that train, at least one: of an empty list Axolotl trains the whole model.

    Examples:
        >>> from htsr.analysis.training_lists import axolotl
        >>> print(axolotl(["layers.3.mlp.up_proj"]), end="")
        unfrozen_parameters:
        - ^layers.3.mlp.up_proj(.weight)?$
    """
    return "unfrozen_parameters:\n" + "".join(f"- ^{name}(.weight)?$\n" for name in names)


def spectrum(scores: Mapping[str, float]) -> str:
    """The JSON file from which Spectrum's own script takes the largest of each type.

    Args:
        scores: scores of the candidates by name; the larger train.

    Examples:
        >>> from htsr.analysis.training_lists import spectrum
        >>> print(spectrum({"layers.3.mlp.up_proj": 0.5}), end="")
        {
            "layers.3.mlp.up_proj": {
                "snr": 0.5,
                "type": "mlp.up_proj"
            }
        }
    """
    content = {name: {"snr": score, "type": _type_of(name)} for name, score in scores.items()}
    return json.dumps(content, indent=4) + "\n"


def peft(
    ranks: Mapping[str, int], stacks: Sequence[str], rank: int, scaling: float = 2.0, others: Sequence[str] = ()
) -> dict[str, Any]:
    """Arguments of PEFT's ``LoraConfig`` for adapters on these modules and on no others.

    Args:
        ranks: rank of the adapter of each tensor that trains, by name.
        stacks: names among them of tensors that hold a matrix for each expert and are parameters, no modules.
        rank: rank that a uniform adapter would have.
        scaling: lora_alpha/r of every adapter.
        others: names of the tensors that do not train. PEFT takes every module whose name ends in a listed one;
            those of them are excluded by name.

    Examples:
        >>> from htsr.analysis.training_lists import peft
        >>> peft({"layers.3.mlp.up_proj": 16}, [], rank=8)["rank_pattern"]
        {'layers\\\\.3\\\\.mlp\\\\.up_proj': 16}
    """
    longest_first = sorted(ranks, key=lambda name: (-len(name), name))  # PEFT takes the first that ends a name
    patterns = {re.escape(name): ranks[name] for name in longest_first}
    config: dict[str, Any] = {
        "r": rank,
        "lora_alpha": scaling * rank,
        "target_modules": [name for name in ranks if name not in stacks],
        "rank_pattern": patterns,
        "alpha_pattern": {pattern: scaling * own for pattern, own in patterns.items()},
    }
    hit = [name for name in others if any(name.endswith(f".{module}") for module in config["target_modules"])]
    more = {"target_parameters": list(stacks), "exclude_modules": hit}
    return config | {key: names for key, names in more.items() if names}


def _type_of(name: str) -> str:
    """What stands behind the number of the block, by which Spectrum groups."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return name if number is None else ".".join(parts[number + 1 :])
