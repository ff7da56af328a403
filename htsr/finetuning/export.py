"""A fine-tuned model as GGUF, by llama.cpp's own converter."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from htsr.calibration.adapted import is_adapter_alone, load_adapted, load_adapted_tokenizer
from htsr.errors import HtsrError, MissingDependencyError, SourceError, UsageError, reason_of
from htsr.files import check_writable, written

SCRIPT, HOME = "convert_hf_to_gguf.py", "LLAMA_CPP"
_ON_PATH = (SCRIPT, "llama-convert-hf-to-gguf", "convert-hf-to-gguf")  # of the source, and of Python packages


def export_gguf(
    folder: str, file: Path, outtype: str = "auto", say: Callable[[str], None] = lambda _: None
) -> list[str]:
    """Write the model in `folder` to a GGUF `file`, whole or not at all, by llama.cpp's converter.

    Args:
        folder: folder of a model, as transformers loads it, or of an adapter, which is merged into its base first.
        file: file to write.
        outtype: type of the weights, as the converter names them: f32, f16, bf16, q8_0 …; ``auto`` for its own choice.
        say: function that is told when the converter begins.

    Returns:
        The command that was run.

    Raises:
        SourceError: the folder holds no whole model.
        UsageError: the file is none of GGUF.
        MissingDependencyError: there is no converter; the commands that get and run it are named.
        HtsrError: the converter failed.
    """
    place = Path(folder).expanduser()
    if not (place / "config.json").is_file() and not is_adapter_alone(folder):
        raise SourceError(f"{folder} holds no model: it has no config.json")
    if file.suffix != ".gguf":
        raise UsageError(f"--gguf {file}: name a file that ends in .gguf")
    check_writable(file)
    converter = find_converter()
    if converter is None:
        raise MissingDependencyError(_how_to(folder, file, outtype))
    with written(file) as temporary, _merged(folder, place, say) as whole:
        say(f"converting {folder}; a large model takes minutes")
        command = [*converter, str(whole), "--outfile", str(temporary), "--outtype", outtype]
        try:
            done = subprocess.run(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
            )
        except OSError as error:
            raise HtsrError(f"{converter[-1]} cannot be run: {reason_of(error)}") from error
        said = done.stderr.strip().splitlines()
        if done.returncode or not temporary.is_file() or not temporary.stat().st_size:
            why = said[-1] if said else f"it ended with {done.returncode}"
            raise HtsrError(f"{converter[-1]} could not convert {folder}: {why[:400]}")
    return command


@contextmanager
def _merged(folder: str, place: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """The folder of the model itself; where it is an adapter, one with the base that it is merged into, for a while."""
    if not is_adapter_alone(folder):
        yield place
        return
    say(f"merging the adapter in {folder} into its base")
    with TemporaryDirectory() as temporary:
        model: Any = load_adapted(folder, causal=True)
        model.save_pretrained(temporary)
        load_adapted_tokenizer(folder).save_pretrained(temporary)
        yield Path(temporary)


def find_converter() -> list[str] | None:
    """The command of llama.cpp's converter: in the folder that LLAMA_CPP names, or on PATH; None where it is not.

    Raises:
        SourceError: LLAMA_CPP names a folder without it.
    """
    if home := os.environ.get(HOME):
        script = Path(home).expanduser() / SCRIPT
        if not script.is_file():
            raise SourceError(f"{HOME} is {home}, and there is no {SCRIPT} in it")
        return [sys.executable, str(script)]
    found = next((path for name in _ON_PATH if (path := shutil.which(name))), None)
    return [found] if found else None


def _how_to(folder: str, file: Path, outtype: str) -> str:
    words = ["python", f"llama.cpp/{SCRIPT}", folder, "--outfile", str(file), "--outtype", outtype]
    if is_adapter_alone(folder):  # which is merged first
        words = ["env", f"{HOME}=llama.cpp", "htsr", "export", folder, "--gguf", str(file), "--outtype", outtype]
    return (
        f"llama.cpp's converter is neither on PATH nor in a folder that {HOME} names. These commands do it:\n"
        "git clone --depth 1 https://github.com/ggml-org/llama.cpp\n"
        "pip install gguf sentencepiece protobuf\n" + shlex.join(words)
    )
