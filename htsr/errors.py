"""What htsr raises when it cannot go on; every message says what is wrong, where, and what to do."""


class HtsrError(Exception):
    """Base class of all errors that htsr raises on purpose."""


class SourceError(HtsrError):
    """A model, file or folder that cannot be read."""


class UsageError(HtsrError, ValueError):
    """An argument that has no meaning here."""


class MatrixError(HtsrError):
    """One matrix that has no spectrum to speak of; the others are analyzed all the same.

    Args:
        status: a word for the row's `status` column, e.g. ``"nan"``.
        message: a sentence that says why.

    Attributes:
        status: as given.
    """

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


class MissingDependencyError(HtsrError, ImportError):
    """An optional package that this call needs is not installed."""


def reason_of(error: BaseException) -> str:
    """What an `error` of another library says, in one line of a length that is read; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 400 else f"{text[:397]}…"
