"""Writing results whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from htsr.errors import HtsrError


def check_writable(path: Path) -> None:
    """Know before hours of work that their result will not fail to be written for its name.

    Raises:
        HtsrError: the folder of `path` does not exist or refuses files, `path` is a folder, or its name is too long.
    """
    try:
        if not path.parent.is_dir():
            raise HtsrError(f"{path} cannot be written: {path.parent} is no folder")
        if path.is_dir():
            raise HtsrError(f"{path} cannot be written: it is a folder")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise HtsrError(f"{path} cannot be written: {path.parent} refuses new files")
        os.stat(path.parent / path.name)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from error


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that becomes `path` when the block ends well, and vanishes when it does not.

    Raises:
        HtsrError: the folder does not exist or cannot be written to, or the disk is full.
    """
    check_writable(path)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".htsr-", suffix=path.suffix[:16])
        os.close(handle)
    except OSError as error:
        raise _unwritable(path, error) from error
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError | ValueError) -> HtsrError:
    return HtsrError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}")
