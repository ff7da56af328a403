"""Models that lie as an adapter beside the base that it names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from htsr.calibration.loading import load_model, load_tokenizer
from htsr.errors import SourceError, refused
from htsr.matrices import adapters
from htsr.matrices.adapter_config import CONFIG
from htsr.matrices.folders import read_json

if TYPE_CHECKING:
    import torch


def is_adapter_alone(name: str) -> bool:
    """Whether `name` is the folder of an adapter that no whole model lies beside."""
    folder = Path(name).expanduser()
    return adapters.is_adapter(folder) and not (folder / "config.json").is_file()


def load_adapted(name: str, *, four_bit: bool = False, **how: Any) -> torch.nn.Module:
    """The base that an adapter names, with the adapter merged into it; beside it where the base is in 4 bits.

    Args:
        name: folder of the adapter.
        four_bit: whether the base is loaded in 4 bits.
        how: further arguments of `htsr.calibration.loading.load_model`.

    Raises:
        SourceError: the adapter names no base, or one of the two cannot be loaded.
    """
    from peft import PeftModel

    base, revision = _base_of(name)
    with adapters.named_by(name):
        whole: Any = load_model(base, revision=revision, four_bit=four_bit, **how)
    with refused(f"the adapter in {name} cannot be loaded"):
        adapted: Any = PeftModel.from_pretrained(whole, str(Path(name).expanduser()))
    return adapted if four_bit else adapted.merge_and_unload()  # type: ignore[no-any-return]


def load_adapted_tokenizer(name: str) -> Any:
    """The tokenizer that lies beside an adapter, or else that of its base.

    Args:
        name: folder of the adapter.

    Raises:
        SourceError: it cannot be loaded.
    """
    if (Path(name).expanduser() / "tokenizer_config.json").is_file():
        return load_tokenizer(name)
    base, revision = _base_of(name)
    with adapters.named_by(name):
        return load_tokenizer(base, revision=revision)


def _base_of(name: str) -> tuple[str, str | None]:
    """The base that an adapter names, and its revision where that is named, too."""
    folder = Path(name).expanduser()
    base = adapters.base_of(folder)
    if not base:
        raise SourceError(f"{name} is an adapter that names no base: merge it, and name the folder of the model")
    revision = read_json(folder / CONFIG).get("revision")
    return base, revision if isinstance(revision, str) and not Path(base).expanduser().exists() else None
