"""The one place where a step on one matrix may fail: whatever happens there becomes a `MatrixError`, and so a row."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TypeVar

from htsr.errors import MatrixError, UsageError, is_out_of_memory

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def attempted(step: Callable[[], Result]) -> Result | MatrixError:
    """The result of a step, or the reason why it failed.

    Args:
        step: function that reads, decomposes or measures one matrix.

    Returns:
        The result, or a `MatrixError`: the one that the step raises or returns, or one with status ``failed`` for
        anything else that it raises, such as LinAlgError or a device that is out of memory, whose cached blocks are
        then given back.

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
        lacking = is_out_of_memory(error)
        why = (str(error).strip().splitlines() or [""])[0]
        kind = type(error).__name__
    if not lacking:
        return MatrixError("failed", f"{kind}: {why}")
    give_back_memory()  # not before the error is gone, which holds what the step has allocated
    return MatrixError("failed", "not enough memory to decompose it; the lanczos route needs less")


def give_back_memory() -> None:
    """Let go of memory that torch keeps for this process on its accelerator, so that what comes next finds it free.

    Examples:
        >>> from htsr.spectra.attempts import give_back_memory
        >>> give_back_memory()
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.accelerator.is_available():
        return
    try:
        torch.accelerator.empty_cache()
    except RuntimeError as error:  # a device that has failed altogether says so again where it is used
        logger.debug("no memory is given back", exc_info=error)
