"""Writing results whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from htsr.errors import HtsrError, UsageError
from htsr.matrices.folders import SUFFIXES

# what stands beside weights under a name that no result has
_OF_A_MODEL = re.compile(r"^((adapter_|generation_|tokenizer_)?config|params|tokenizer)\.json$|\.index(\.\w+)?\.json$")


def check_writable(path: Path) -> None:
    """Refuse a path that a result cannot be written to, or where it would replace a model, before hours of work.

    Raises:
        UsageError: `path` is a file of a model: weights, their index, or a configuration.
        HtsrError: the folder of `path` does not exist or refuses files, `path` is a folder, a disk or another thing
            that takes no files, or its name is too long.
    """
    try:
        if is_stream(path):
            if not os.access(path, os.W_OK):
                raise HtsrError(f"{path} cannot be written: it refuses data")
            return
        path = _target(path)
        if not path.parent.exists():
            raise HtsrError(f"{path} cannot be written: the folder {path.parent} does not exist")
        if not path.parent.is_dir():
            raise HtsrError(f"{path} cannot be written: {path.parent} is no folder")
        if path.is_dir():
            raise HtsrError(f"{path} cannot be written: it is a folder")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise HtsrError(f"{path} cannot be written: {path.parent} refuses new files")
        os.stat(path.parent / path.name)
        if not path.is_file():
            raise HtsrError(f"{path} cannot be written: it is neither a file nor a pipe")
        if path.suffix in SUFFIXES or _OF_A_MODEL.search(path.name):
            raise UsageError(f"{path} is not overwritten: it is a file of a model")
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, HtsrError):
            raise
        raise _unwritable(path, error) from error


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A temporary file that becomes `path` when the block ends well, and vanishes when it does not.

    It lies beside `path`, or beside the file that a link leads to: only within one file system is moving a file one
    step. A pipe or terminal is sent what it holds.

    Raises:
        UsageError: `path` is a file of a model.
        HtsrError: the folder does not exist or cannot be written to, or the disk is full.

    Examples:
        >>> from pathlib import Path
        >>> from htsr.files import written
        >>> with written(Path("result.txt")) as temporary:
        ...     _ = temporary.write_text("42")
        ...     print(Path("result.txt").exists())
        False
        >>> Path("result.txt").read_text()
        '42'
    """
    check_writable(path)
    stream = is_stream(path)
    target = path if stream else _target(path)
    try:
        folder = None if stream else target.parent
        handle, name = tempfile.mkstemp(dir=folder, prefix=".htsr-", suffix=path.suffix[:16])
        os.close(handle)
    except OSError as error:
        raise _unwritable(path, error) from error
    temporary = Path(name)
    try:
        yield temporary
        if stream:
            with temporary.open("rb") as file, open(os.open(path, os.O_WRONLY), "wb") as out:
                shutil.copyfileobj(file, out)
            return
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def is_stream(path: Path) -> bool:
    """Whether `path` takes data without being a file: a pipe, a terminal or another character device."""
    return path.is_fifo() or path.is_char_device()


def _target(path: Path) -> Path:
    """The file that a link leads to, so that the link stays; else `path` itself."""
    return path.resolve() if path.is_symlink() else path


def _unwritable(path: Path, error: OSError | RuntimeError | ValueError) -> HtsrError:
    return HtsrError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}")
