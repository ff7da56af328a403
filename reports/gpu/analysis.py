"""The analysis of LLaMA-2-7B's shapes by route and precision, and where the time goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

import htsr
from reports import common
from reports.gpu.card import Bench, clocked, fastest, heavy, said
from reports.gpu.shapes import SHAPES, SMALL_SHAPES

ROUTES: dict[str, dict[str, Any]] = {
    "default": {},
    "lanczos": {"route": "lanczos"},
    "float32": {"dtype": "float32"},
}


def analysis(bench: Bench) -> Iterator[dict[str, Any]]:
    """Rows: one matrix of each shape by part; the whole model; the baseline; the other routes; several at a time."""
    shapes = SMALL_SHAPES if bench.small else SHAPES
    htsr.analyze({"warm.up.weight": heavy(128, 96, 0, bench.device)}, device=str(bench.device))
    yield from attempted("ceilings", lambda: ceilings(bench))
    yield from attempted("parts", lambda: parts(bench, shapes))
    yield from attempted("default", lambda: whole(bench, shapes, "default"))
    yield from attempted("svdvals", lambda: baseline(bench, shapes))
    yield from attempted("lanczos", lambda: whole(bench, shapes, "lanczos"))
    yield from attempted("several", lambda: several(bench, 96 if bench.small else 4096))
    yield from attempted("float32", lambda: whole(bench, shapes, "float32"))


def attempted(what: str, rows: Callable[[], Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The rows, and one more where they end in an error."""
    try:
        yield from rows()
    except Exception as error:
        yield {"what": what, "failed": said(error)}


def ceilings(bench: Bench) -> Iterator[dict[str, Any]]:
    """What the card gives: a float64 product's operations, and bytes read and written by a copy, in a second."""
    side = 64 if bench.small else 4096
    A = torch.randn(side, side, device=bench.device, dtype=torch.float64)
    product, copy = fastest(lambda: A @ A, bench.device), fastest(A.clone, bench.device)
    yield {"what": "ceilings", "flops_per_second": 2 * side**3 / product, "bytes_per_second": 16 * side**2 / copy}


def parts(bench: Bench, shapes: dict[str, tuple[int, int, int]]) -> Iterator[dict[str, Any]]:
    """One matrix of each shape: torch's Gram product and solver alone, `htsr.esd`, `htsr.analyze`; and Lanczos."""
    device = bench.device
    for role, (rows, columns, count) in shapes.items():
        W = heavy(rows, columns, 1, device)
        wide = W if rows <= columns else W.T
        for dtype in (torch.float64, torch.float32) if role.startswith("attn") else (torch.float64,):

            def gram(wide: torch.Tensor = wide, dtype: torch.dtype = dtype) -> torch.Tensor:
                X = wide.to(dtype)
                return X @ X.T

            A, name = gram(), str(dtype).removeprefix("torch.")
            row: dict[str, Any] = {"what": "parts", "role": role, "rows": rows, "columns": columns, "count": count}
            row |= {"dtype": name, "gram": fastest(gram, device, 2)}
            row["eigenvalues"] = fastest(lambda A=A: torch.linalg.eigvalsh(A), device, 1)
            del A
            measured = clocked(lambda W=W, name=name: htsr.esd(W, device=str(device), dtype=name), device)
            row |= {"esd": measured.seconds, "peak_mib": (measured.peak - measured.before) / 2**20}
            state = {"w.weight": W}
            measured = clocked(lambda s=state, name=name: htsr.analyze(s, device=str(device), dtype=name), device)
            row["analyze"] = measured.seconds
            yield row


def model(bench: Bench, shapes: dict[str, tuple[int, int, int]]) -> dict[str, torch.Tensor]:
    """The state dict of a whole model with these shapes, on the device."""
    names = {"attn.q/k/v/o": [f"self_attn.{x}_proj" for x in "qkvo"], "mlp.gate/up": ["mlp.gate_proj", "mlp.up_proj"]}
    state = {}
    for role, (rows, columns, count) in shapes.items():
        kinds = names.get(role, ["mlp.down_proj"])
        for i in range(count):
            name = f"model.layers.{i // len(kinds)}.{kinds[i % len(kinds)]}.weight"
            state[name] = heavy(rows, columns, len(state), bench.device)
    return state


def whole(bench: Bench, shapes: dict[str, tuple[int, int, int]], route: str) -> Iterator[dict[str, Any]]:
    """All matrices of the model by one route: seconds and bytes beyond the model. A part of them where time is short."""
    device, options = bench.device, ROUTES[route]
    state = model(bench, shapes)
    few = dict(list(state.items())[:: max(1, len(state) // 7)])  # every kind of them
    first = clocked(lambda: htsr.analyze(few, device=str(device), **options), device)
    estimate = first.seconds / len(few) * len(state)
    row: dict[str, Any] = {"what": "whole", "route": route, "matrices": len(state)}
    if estimate > bench.left() - 5:
        yield row | {"measured": len(few), "seconds": estimate, "estimated": True}
        return
    measured = clocked(lambda: htsr.analyze(state, device=str(device), **options), device)
    found = list(measured.out)
    yield row | {
        "measured": len(found),
        "seconds": measured.seconds,
        "estimated": False,
        "beyond_model_mib": (measured.peak - measured.before) / 2**20,
        "routes": sorted({row.route for row in found if row.route}),
        "not_ok": sum(row.status != "ok" for row in found),
        "alpha": common.median([row.alpha for row in found if row.alpha is not None]),
    }


def baseline(bench: Bench, shapes: dict[str, tuple[int, int, int]]) -> Iterator[dict[str, Any]]:
    """`torch.linalg.svdvals` of the float32 matrix on the device, result on the host: as WeightWatcher calls it."""
    total = 0.0
    for role, (rows, columns, count) in shapes.items():
        W = heavy(rows, columns, 1, torch.device(bench.device)).float().cpu().numpy()
        work = lambda W=W: torch.linalg.svdvals(torch.Tensor(W).to(bench.device)).cpu().numpy()  # noqa: E731
        seconds = clocked(work, bench.device).seconds
        total += seconds * count
        yield {"what": "svdvals", "role": role, "count": count, "seconds": seconds}
    yield {"what": "svdvals", "role": "all", "seconds": total}


def several(bench: Bench, side: int) -> Iterator[dict[str, Any]]:
    """An experiment: eight float64 Gram matrices one by one, in one call, in threads with a stream each, by CuPy."""
    device, count = bench.device, 2 if bench.small else 8
    grams = []
    for i in range(count):
        X = heavy(side, side, i, device).double()
        grams.append(X @ X.T)
    row: dict[str, Any] = {"what": "several", "side": side, "count": count}
    yield row | {
        "how": "one by one",
        "seconds": clocked(lambda: [torch.linalg.eigvalsh(A) for A in grams], device).seconds,
    }
    if device.type == "cuda":
        for threads in (2, 4):
            yield row | {
                "how": f"{threads} threads, a stream each",
                "seconds": clocked(lambda n=threads: threaded(grams, n), device).seconds,
            }
    stack = torch.stack(grams)
    yield row | {"how": "one call", "seconds": clocked(lambda: torch.linalg.eigvalsh(stack), device).seconds}
    if device.type == "cuda":
        import cupy

        yield row | {
            "how": "CuPy, one by one",
            "seconds": clocked(lambda: [cupy.linalg.eigvalsh(cupy.from_dlpack(A)) for A in grams], device).seconds,
        }
        yield row | {
            "how": "CuPy, one call",
            "seconds": clocked(lambda: cupy.linalg.eigvalsh(cupy.from_dlpack(stack)), device).seconds,
        }


def threaded(grams: list[torch.Tensor], threads: int) -> None:
    """Solve the matrices in a few threads; the solver is initialised already."""

    def work(mine: list[torch.Tensor]) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for A in mine:
                torch.linalg.eigvalsh(A)

    torch.cuda.synchronize()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [grams[i::threads] for i in range(threads)]))
