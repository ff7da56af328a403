"""The words in which a row says what to be careful about. They describe a spectrum and judge no training."""

from __future__ import annotations

from typing import Any

from htsr.spectra.bulk import tw_threshold
from htsr.spectra.density import ESD

HEAVY = 2.0
LIGHT = 6.0
FEW_TAIL_POINTS = 50

CAUTION = (
    "Notes describe spectra and judge no training: α below 2 or above 6 is common in well-trained models too. "
    "It depends on a matrix's shape and falls as training goes on, so compare layers of one shape, or one layer "
    "through training, and read no decimals of a tail of fewer than 50."
)


def notes(numbers: dict[str, Any], spectrum: ESD) -> list[str]:
    """What a reader of a row should know.

    ================== ==================================================================================
    random-like        no eigenvalue above the Marchenko-Pastur edge of a matrix with the same variance
    heavy tail α<2     the exponent, and where it lies
    light tail α>6     likewise
    tail of 7          eigenvalues in the tail, where they are fewer than 50
    rank-deficient     eigenvalues below the resolution of the stored numbers
    no ERG             the trace-log condition has no crossing
    approximate        Lanczos route; see esd_error and alpha_error
    ================== ==================================================================================

    Args:
        numbers: numbers of the row, by field of `LayerMetrics`.
        spectrum: spectrum that they were computed from.

    Returns:
        The notes, none longer than a few words.
    """
    found = []
    variance = numbers["norm"] / (spectrum.pieces * spectrum.M * spectrum.N)
    if numbers["lambda_max"] <= tw_threshold(variance**0.5, spectrum.M, spectrum.N, spectrum.pieces):
        found.append("random-like")
    if numbers["alpha"] < HEAVY:
        found.append(f"heavy tail α<{HEAVY:.0f}")
    elif numbers["alpha"] > LIGHT:
        found.append(f"light tail α>{LIGHT:.0f}")
    if numbers["num_pl_tail"] < FEW_TAIL_POINTS:
        found.append(f"tail of {numbers['num_pl_tail']}")
    if numbers["rank_loss"]:
        found.append("rank-deficient")
    if not numbers["erg_crossing"]:
        found.append("no ERG")
    if spectrum.error is not None:
        found.append("approximate")
    return found


def kind_of(note: str) -> str:
    """What all notes of one kind begin with, for counting and filtering: ``tail of`` for ``tail of 7``.

    Args:
        note: one note of a row, without the ``; `` between notes.

    Examples:
        >>> from htsr.spectra.notes import kind_of
        >>> kind_of("tail of 7"), kind_of("no ERG")
        ('tail of', 'no ERG')
    """
    return "tail of" if note.startswith("tail of ") else note
