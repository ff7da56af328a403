"""The errors that htsr raises when it cannot go on; every message says what is wrong, where, and what to do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class HtsrError(Exception):
    """Base class of all errors that htsr raises on purpose."""


class SourceError(HtsrError):
    """A model, file or folder that cannot be read."""


class UsageError(HtsrError, ValueError):
    """An argument that has no meaning here."""


class MatrixError(HtsrError):
    """A matrix that has no spectrum to speak of; the other matrices of the model are analyzed all the same.

    Args:
        status: word for the row's `status` column, such as ``"nan"``.
        message: sentence that says why.

    Attributes:
        status: word for the row's `status` column.
    """

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


class MissingDependencyError(HtsrError, ImportError):
    """An optional package that this call needs is not installed."""


def reason_of(error: BaseException, path: str | os.PathLike[str] | None = None) -> str:
    """The first line of an `error` of another library, cut where it is too long to read; its class if it has no text.

    Args:
        error: error, of the system without its number.
        path: file that the sentence names already.

    Examples:
        >>> from htsr.errors import reason_of
        >>> reason_of(ValueError("bad header\\n  at byte 8")), reason_of(MemoryError())
        ('bad header', 'MemoryError')
        >>> reason_of(FileNotFoundError(2, "No such file or directory", "a.txt"))
        'No such file or directory: a.txt'
    """
    said = str(error)
    if isinstance(error, OSError) and error.strerror:
        other = error.filename is not None and (path is None or os.fspath(error.filename) != os.fspath(path))
        said = f"{error.strerror}: {error.filename}" if other else error.strerror
    lines = said.strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 400 else f"{text[:397]}…"


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Turn whatever a library raises on what others wrote, its file systems' errors too, into one sentence.

    Args:
        what: what cannot be done, with which the sentence begins.

    Raises:
        SourceError: the library has raised an error; htsr's own are left as they are.

    Examples:
        >>> from htsr.errors import refused
        >>> with refused("m.json cannot be read"):
        ...     raise ValueError("no JSON")
        Traceback (most recent call last):
        htsr.errors.SourceError: m.json cannot be read: no JSON
    """
    try:
        yield
    except HtsrError:
        raise
    except Exception as error:
        raise SourceError(f"{what}: {reason_of(error)}") from error


class Refusals:
    """What is refused, stage by stage: one that fails does not hide the next.

    Attributes:
        errors: what was raised.

    Examples:
        >>> from htsr.errors import Refusals, UsageError
        >>> def below(value, limit):
        ...     if value >= limit:
        ...         raise UsageError(f"{value} is not below {limit}")
        ...     return value
        >>> refusals = Refusals()
        >>> [refusals.unless(below, value, 3) for value in (2, 3, 4)]
        [2, None, None]
        >>> refusals.sentences
        ['3 is not below 3', '4 is not below 3']
    """

    def __init__(self) -> None:
        self.errors: list[HtsrError] = []

    def unless(self, stage: Callable[..., T], *arguments: Any) -> T | None:
        """What `stage` returns of the `arguments`, or None where it refuses."""
        try:
            return stage(*arguments)
        except HtsrError as error:
            self.errors.append(error)
            return None

    @property
    def sentences(self) -> list[str]:
        """Why, each once."""
        return list(dict.fromkeys(line for error in self.errors for line in str(error).splitlines()))

    @property
    def is_wrong_usage(self) -> bool:
        """Whether one of them is of what was asked for, and not of what was found."""
        return any(isinstance(error, UsageError) for error in self.errors)

    def end(self) -> None:
        """Raise what was raised, and of several errors one with a line for each sentence.

        Raises:
            HtsrError: the only one.
            UsageError: there are several.
        """
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise UsageError("\n".join(self.sentences))


_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")  # torch, cuBLAS, cuSOLVER


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an `error` says that memory is lacking, on the host or on a device: torch raises it as RuntimeError, too.

    Examples:
        >>> from htsr.errors import is_out_of_memory
        >>> is_out_of_memory(RuntimeError("CUDA out of memory.")), is_out_of_memory(KeyError("memory"))
        (True, False)
    """
    said = str(error).lower()
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
    return named or any(words in said for words in _NO_MEMORY)
