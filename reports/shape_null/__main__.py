"""The table of shape nulls in the package: α that a fit finds in pure noise of the shapes of common transformers.

    python -m reports.shape_null            draws all of them anew, a few minutes on one core
    python -m reports.shape_null --quick    draws the smallest ones and compares

It writes `htsr/spectra/shape_nulls.json` and this folder's page. To be run after every change of how nulls are drawn or
tails fitted: `tests/spectra/test_known_nulls.py` fails until then. A shape that is not in the table is drawn where it
is met, and kept in the user's cache folder (`htsr.spectra.known_nulls`).
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import htsr.spectra.known_nulls
from htsr.spectra.null import draw_alpha_null, null_key
from htsr.spectra.tail import FitMethod
from reports import common
from reports.shape_null.shapes import nulls

HERE = Path(__file__).parent
TABLE = Path(htsr.spectra.known_nulls.__file__).with_name("shape_nulls.json")
FITS: tuple[FitMethod, ...] = ("ks", "hill")  # the analyzer's default and that of training
SHOWN = ((384, 384), (384, 1536), (768, 768), (768, 3072), (768, 30522), (2048, 2048), (2048, 8192), (4096, 4096), (4096, 11008), (4096, 14336), (4096, 128256))  # fmt: skip


def main() -> None:
    """Draw, and write or compare."""
    args = common.arguments(str(__doc__))
    chosen = nulls()
    if args.quick:
        chosen = [(M, N, pieces, rank, product) for M, N, pieces, rank, product in chosen if M <= 384 and N <= 1536]
    drawn: dict[str, tuple[float, float]] = {}
    for done, (M, N, pieces, rank, product) in enumerate(chosen, 1):
        for fit in FITS:
            null = draw_alpha_null(M, N, pieces, fit, rank, product)
            drawn[null_key(M, N, pieces, fit, rank, product)] = (null.alpha, null.sd)
        print(f"\r{done} of {len(chosen)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if args.quick:
        known = json.loads(TABLE.read_text())
        same = [
            math.isclose(new, old, rel_tol=1e-9)
            for key in drawn
            for new, old in zip(drawn[key], known[key], strict=True)
        ]
        print(f"{sum(same)} of {len(same)} numbers are those of the table")
        sys.exit(not all(same))
    lines = (f"{json.dumps(key)}: {json.dumps(values)}" for key, values in sorted(drawn.items()))
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    write_up(drawn)


def write_up(drawn: dict[str, tuple[float, float]]) -> None:
    """README.md: what noise of some shapes looks like."""

    def cell(fit: FitMethod, M: int, N: int) -> str:
        alpha, sd = drawn[null_key(M, N, 1, fit)]
        return f"{alpha:.1f} ± {sd:.1f}" if fit == "ks" else f"{alpha:.3f} ± {sd:.3f}"

    rows = [[f"{M} × {N}", *(cell(fit, M, N) for fit in FITS)] for M, N in SHOWN]
    (HERE / "README.md").write_text(f"""# The shape null

`python -m reports.shape_null` makes this page, and with it the table in the package, which spares an analysis the
drawing: α that a fit finds in Gaussian noise, for {len(nulls())} shapes, most of them matrices of common
transformers (`shapes.py` lists them), with both fits that are a default. The numbers are what `htsr.spectra.null` draws, seed
and all, to the last digit; other shapes are drawn where they are met, and kept in the user's cache folder.

Median ± standard deviation over the draws:

{common.table(["shape", "`ks` (analysis)", "`hill` (training)"], rows)}
The `hill` null is sharp and depends, to half a percent here, on the aspect ratio alone: much of what tells layer types
apart under that fit is their shape. The `ks` null is high and wide, because noise has no tail to settle on: only an α well
below it says that there is a tail at all, and its size is no scale.
""")


if __name__ == "__main__":
    main()
