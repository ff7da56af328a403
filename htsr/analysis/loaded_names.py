"""What the weights of a checkpoint are called in the model that transformers loads from it.

The loader of many architectures renames: a vision-language checkpoint has ``model.layers.0``, the model
``model.language_model.layers.0``. The names come from the model itself, made without memory, and transformers' own
renaming.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from htsr.errors import SourceError
from htsr.matrices.folders import read_config

logger = logging.getLogger(__name__)

_TOWERS = ("text_config", "vision_config", "audio_config", "thinker_config", "llm_config")


def loaded_names(source: str, names: Sequence[str], revision: str | None = None) -> Mapping[str, str | None] | None:
    """Names in the loaded model of the tensors that a checkpoint calls `names`.

    Args:
        source: folder of a model, a file in it, or a hub id whose configuration is in the cache.
        names: names of tensors, without ``.weight``.
        revision: branch, tag or commit of a hub id.

    Returns:
        The loaded name of each, without ``.weight``; None for those that the model has not, or that its loader makes
        one of with others. None instead of them all where the names are the loader's own for all that is known, and an
        empty mapping of a GGUF file, and where the model has several towers and transformers does not tell their names.

    Examples:
        >>> from htsr.analysis.loaded_names import loaded_names
        >>> loaded_names("/no/such/folder", ["layers.0.up_proj"]) is None
        True
    """
    if source.endswith(".gguf"):
        return {}
    folder = _folder(source, revision)
    try:
        config = read_config(folder) if folder else {}
    except SourceError:
        config = {}
    if not folder or not config:
        return None
    try:
        renamed = _renamed_by_transformers(folder, config)
    except Exception as error:  # code of others, by whatever configuration: then nothing is known
        logger.info("transformers does not tell the names of %s: %s", source, error)
        return {} if any(key in config for key in _TOWERS) else None
    found = {name: renamed(name) for name in names}
    counts = Counter(found.values())
    return {name: new if counts[new] == 1 else None for name, new in found.items()}


def _folder(source: str, revision: str | None) -> Path | None:
    path = Path(source)
    if path.exists():
        return path if path.is_dir() else path.parent
    try:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source, "config.json", revision=revision)
    except (ImportError, ValueError):  # no hub id
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _renamed_by_transformers(folder: Path, config: Mapping[str, Any]) -> Callable[[str], str | None]:
    """Function that gives the loaded name of a stored one, or None."""
    import torch
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    kind = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        model = kind(transformers.AutoConfig.from_pretrained(folder))
    loaded = model.state_dict()
    known = get_model_conversion_mapping(model)
    renamings = [each for each in known if isinstance(each, WeightRenaming)]
    converters = [each for each in known if isinstance(each, WeightConverter)]

    def renamed(name: str) -> str | None:
        for key in (f"{name}.weight", name):
            new = rename_source_key(key, renamings, converters, model.base_model_prefix, loaded)[0]
            if new in loaded:
                return str(new).removesuffix(".weight")
        return None

    return renamed
