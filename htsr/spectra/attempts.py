"""The one place where a step on one matrix may fail: whatever happens there becomes a `MatrixError`, and so a row."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from htsr.errors import MatrixError, UsageError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def attempted(step: Callable[[], Result]) -> Result | MatrixError:
    """The result of a step, or the reason why it failed.

    Args:
        step: function that reads, decomposes or measures one matrix.

    Returns:
        The result, or a `MatrixError`: the one that the step raises or returns, or one with status ``failed`` for
        anything else that it raises, such as LinAlgError or a device that is out of memory.

    Raises:
        UsageError: the step refuses an argument, which is no fault of the matrix.

    Examples:
        >>> import numpy as np
        >>> from htsr.spectra.attempts import attempted
        >>> problem = attempted(lambda: np.linalg.cholesky(-np.eye(2)))
        >>> problem.status, str(problem)
        ('failed', 'LinAlgError: Matrix is not positive definite')
    """
    try:
        return step()
    except UsageError:
        raise
    except MatrixError as problem:
        return problem
    except Exception as error:
        logger.debug("a step on a matrix failed", exc_info=error)
        if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
            return MatrixError("failed", "not enough memory to decompose it; the lanczos route needs less")
        why = (str(error).strip().splitlines() or [""])[0]
        return MatrixError("failed", f"{type(error).__name__}: {why}")
