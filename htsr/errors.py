"""The errors that htsr raises when it cannot go on; every message says what is wrong, where, and what to do."""


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


def reason_of(error: BaseException) -> str:
    """The first line of an `error` of another library, cut where it is too long to read; its class if it has no text.

    Examples:
        >>> from htsr.errors import reason_of
        >>> reason_of(ValueError("bad header\\n  at byte 8")), reason_of(MemoryError())
        ('bad header', 'MemoryError')
    """
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 400 else f"{text[:397]}…"
