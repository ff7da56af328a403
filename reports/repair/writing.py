"""The page of reports/repair: each repair beside the point of the line W_base + t·ΔW that forgets as much."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reports import common
from reports.repair.evaluating import TEXTS
from reports.repair.training import BATCH, STEPS

Numbers = npt.NDArray[np.float64]
Run = dict[str, Any]
_GRID = np.linspace(0, 1, 201)
_ON_THE_LINE = "·ΔW"


@dataclass(frozen=True)
class Point:
    """A model in one setting: mean rise of the loss on text over the base's, and loss of each question."""

    forgotten: float
    questions: Numbers


@dataclass(frozen=True)
class Beside:
    """A repair beside the line.

    Attributes:
        undone: share of the forgetting that it undoes.
        loss: mean loss of the questions.
        factor: t of the point of the line that forgets as much.
        line: mean loss of the questions at that point.
        error: standard error of `line` - `loss`, over questions.
    """

    undone: float
    loss: float
    factor: float
    line: float
    error: float

    @property
    def advantage(self) -> float:
        """How much smaller its loss is than that of the line."""
        return self.line - self.loss


def point(run: Run, base: Run) -> Point:
    """A setting as a point."""
    rises = [float(np.mean(run[text]) - np.mean(base[text])) for text in TEXTS]
    return Point(float(np.mean(rises)), np.asarray(run["questions"], dtype=np.float64))


def beside(found: Point, line: dict[float, Point]) -> Beside:
    """A repair beside the points of the line by t, of which 0 (the base) and 1 (the fine-tuned model) are two."""
    ts = sorted(line)
    forgotten = np.interp(_GRID, ts, [line[t].forgotten for t in ts])
    t = float(_GRID[::-1][np.argmin(np.abs(forgotten[::-1] - found.forgotten))])
    stack = np.stack([line[t].questions for t in ts])
    at = np.array([np.interp(t, ts, column) for column in stack.T])
    gain = at - found.questions
    full = line[1.0].forgotten
    return Beside(
        undone=1 - found.forgotten / full if full else math.nan,
        loss=float(found.questions.mean()),
        factor=t,
        line=float(at.mean()),
        error=float(gain.std(ddof=1) / len(gain) ** 0.5),
    )


def compared(runs: list[Run]) -> dict[str, dict[str, list[Beside]]]:
    """By arm and setting: one comparison a seed, of those seeds whose line has at least three points."""
    base = next(r for r in runs if r["arm"] == "base")
    found: dict[str, dict[str, list[Beside]]] = {}
    for arm, seed in dict.fromkeys((r["arm"], r["seed"]) for r in runs if r["arm"] != "base"):
        mine = [r for r in runs if (r["arm"], r["seed"]) == (arm, seed) and "questions" in r]
        line = line_of(mine, base)
        if 1.0 not in line or len(line) < 3:
            continue
        for run in mine:
            if _ON_THE_LINE not in run["setting"] and run["setting"] != "ΔW":
                found.setdefault(arm, {}).setdefault(run["setting"], []).append(beside(point(run, base), line))
    return found


def line_of(mine: list[Run], base: Run) -> dict[float, Point]:
    """The points of the line by t."""
    line = {0.0: point(base, base)}
    for run in mine:
        if run["setting"].endswith("ΔW"):
            line[factor_of(run["setting"])] = point(run, base)
    return line


def factor_of(setting: str) -> float:
    """The t of ``t·ΔW``."""
    return float(setting.removesuffix("ΔW").removesuffix("·") or 1)


def wins(found: list[Beside]) -> bool:
    """Whether a repair lies beyond the line by more than the spread over seeds, and than two standard errors."""
    gains = [b.advantage for b in found]
    spread = float(np.std(gains, ddof=1)) if len(gains) > 1 else 0.0
    error = float(np.sqrt(np.sum(np.square([b.error for b in found])))) / len(found)
    return float(np.mean(gains)) > max(spread, 2 * error)


def first_line(found: dict[str, dict[str, list[Beside]]]) -> str:
    """What won, or that nothing did."""
    if not found:
        return "**No fine-tuned model has been asked yet: nothing is claimed.**"
    won = [f"{setting} ({arm})" for arm, settings in found.items() for setting, b in settings.items() if wins(b)]
    tried = sum(len(settings) for settings in found.values())
    if not won:
        return f"**Nothing beat plain interpolation W_base + t·ΔW of equal effect**: none of {tried} settings."
    return f"**Beyond plain interpolation of equal effect: {', '.join(won)}**, of {tried} settings; the others are not."


def repairs_table(runs: list[Run], found: dict[str, list[Beside]], arm: str) -> str:
    """One row a setting."""
    rows = []
    for setting, bs in found.items():
        mine = [r for r in runs if (r["arm"], r["setting"]) == (arm, setting)]
        gains = [b.advantage for b in bs]
        spread = f" ± {np.std(gains, ddof=1):.4f}" if len(gains) > 1 else ""
        rows.append(
            [
                setting,
                _mean(r["norm_kept"] for r in mine),
                f"{np.mean([b.undone for b in bs]):.0%}",
                f"{np.mean([b.loss for b in bs]):.4f}",
                f"{np.mean([b.line for b in bs]):.4f} (t = {np.mean([b.factor for b in bs]):.2f})",
                f"{np.mean(gains):+.4f}{spread} (se {np.mean([b.error for b in bs]):.4f})",
                len(bs),
            ]
        )
    head = ["repair", "‖ΔW‖² left", "forgetting undone", "loss, questions", "line of equal effect", "gain", "seeds"]
    return common.table(head, rows)


def line_table(runs: list[Run], arm: str) -> str:
    """Losses of the base and along the line, means over seeds."""
    base = next(r for r in runs if r["arm"] == "base")
    rows = [["base", *(f"{np.mean(base[key]):.3f}" for key in (*TEXTS, "questions")), _accuracy([base]), 1]]
    on_line = {r["setting"] for r in runs if r["arm"] == arm and r["setting"].endswith("ΔW")}
    for setting in sorted(on_line, key=factor_of):
        mine = [r for r in runs if (r["arm"], r["setting"]) == (arm, setting) and "questions" in r]
        if mine:
            losses = (f"{np.mean([np.mean(r[key]) for r in mine]):.3f}" for key in (*TEXTS, "questions"))
            rows.append([setting, *losses, _accuracy(mine), len(mine)])
    return common.table(["model", "reference", "own text", "questions", "accuracy", "seeds"], rows)


def _accuracy(runs: list[Run]) -> str:
    known = [r["accuracy"] for r in runs if "accuracy" in r]
    return f"{np.mean(known):.0%}" if known else "not asked"


def _mean(values: Iterable[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{np.mean(known):.3f}" if known else ""


def untouched(runs: list[Run]) -> str:
    """Settings that left the model as it was."""
    same = dict.fromkeys(f"{r['setting']} ({r['arm']})" for r in runs if "questions" not in r)
    return f"Left the model as it was, so not asked anew: {', '.join(same)}.\n" if same else ""


def kept_table(runs: list[Run]) -> str:
    """Median share of directions kept, by role."""
    mine = [r for r in runs if r.get("shares") and r["setting"] in ("denoise", "ecs")]
    names = dict.fromkeys(f"{r['arm']}, {r['setting']}" for r in mine)
    roles = dict.fromkeys(role for r in mine for role in r["shares"])
    rows = []
    for role in roles:
        cells = []
        for name in names:
            values = [r["shares"][role] for r in mine if f"{r['arm']}, {r['setting']}" == name and role in r["shares"]]
            cells.append(f"{np.mean(values):.1%}" if values else "")
        rows.append([role, *cells])
    return common.table(["role", *names], rows) if names else ""


def write_up(results: dict[str, Any], folder: Path) -> None:
    """README.md and its pictures."""
    runs, size, small = results["runs"], results["size"], results.get("small")
    found = {f"SmolLM2, {arm}": settings for arm, settings in compared(runs).items()}
    if small:
        found |= {f"small model, {arm}": settings for arm, settings in compared(small["runs"]).items()}
    models = {(r["arm"], r["seed"]) for r in runs if r["arm"] != "base"}
    verdict = folder / "verdict.md"
    text = f"""# Can a fine-tuned model be repaired from its weights alone?

{first_line(found)}{"" if any("SmolLM2" in name for name in found) else " All on the small model; no repair of SmolLM2 has been asked yet."}

`python -m reports.repair --data FOLDER --work FOLDER` makes this page. {common.facts(results["machine"])}

{verdict.read_text() if verdict.exists() else ""}
A repair is compared with the point of the line W_base + t·ΔW, norms included, whose loss on other text has risen as much: that is
interpolation of equal effect. "Gain" is by how much its loss on what was learned is smaller than that point's, ± the standard
deviation over seeds, with the standard error over questions or windows. A repair wins where its mean gain exceeds the spread over
seeds and two standard errors. Forgetting undone is the share of that rise which is taken back.

## SmolLM2

SmolLM2-135M-Instruct fine-tuned for {STEPS} steps of {BATCH} questions (ARC-Easy and OpenBookQA with their answers), at rates that
forget: full at 4e-4, LoRA of rank 8 at 6.4e-3, merged. **{len(models)} of 6 models are in this page.** Asked: loss of the right answer to
{size["questions"]} held-out questions, in nats per character (what was learned), and loss on {size["windows"]} × {size["tokens"]} tokens each of the Python
language reference and of what the base itself writes at temperature 1 (what was forgotten; the rise of the second is the
divergence of the model from its base).
"""
    if models:
        plot(runs, folder / "repair.png")
        text += "\n![SmolLM2: what is kept against what is forgotten](repair.png)\n" + sections(runs)
        if kept := kept_table(runs):
            text += f"\n### What is kept of a change\n\nMedian share of the directions, by role.\n\n{kept}"
    if small:
        plot(small["runs"], folder / "small.png")
        steps = small["steps"]
        text += f"""
## A small model

A LLaMA of 4 blocks and width 128 that reads bytes, trained for {steps["base"]} steps on the sources of Python's standard library, then fine-tuned
for {steps["tuned"]} on the Python language reference, {steps["seeds"]} seeds: full at 3e-3, LoRA of rank 8 at 2e-2, merged. Learned is the loss on held-out topics
("questions"), forgotten the rise on held-out sources ("reference") and on what the base itself writes ("own text"), in nats per byte.

![the small model: what is kept against what is forgotten](small.png)
{sections(small["runs"])}"""
    (folder / "README.md").write_text(text)


def sections(runs: list[Run]) -> str:
    """The tables of each arm."""
    text, found = "", compared(runs)
    for arm in dict.fromkeys(r["arm"] for r in runs if r["arm"] != "base"):
        text += f"\n### {arm}\n\n{line_table(runs, arm)}\n"
        text += repairs_table(runs, found[arm], arm) if arm in found else "No repair has been asked yet.\n"
    return text + f"\n{untouched(runs)}"


def plot(runs: list[Run], file: Path) -> None:
    """Loss of the questions against the rise of the loss on text: the line, and the repairs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    base = next(r for r in runs if r["arm"] == "base")
    arms = list(dict.fromkeys(r["arm"] for r in runs if r["arm"] != "base")) or ["full"]
    figure, axes = plt.subplots(1, len(arms), figsize=(6 * len(arms), 4.6), layout="constrained", squeeze=False)
    for ax, arm in zip(axes[0], arms, strict=True):
        colours: dict[str, str] = {}
        for seed in dict.fromkeys(r["seed"] for r in runs if r["arm"] == arm):
            mine = [r for r in runs if (r["arm"], r["seed"]) == (arm, seed) and "questions" in r]
            line = sorted(line_of(mine, base).items())
            xs, ys = [p.forgotten for _, p in line], [float(p.questions.mean()) for _, p in line]
            ax.plot(xs, ys, "k.-", lw=0.8, label="W_base + t·ΔW" if seed == 0 else None)
            for run in mine:
                if not run["setting"].endswith("ΔW"):
                    new = run["setting"] not in colours
                    colour = colours.setdefault(run["setting"], f"C{len(colours)}")
                    there = point(run, base)
                    label = run["setting"] if new else None
                    ax.plot(there.forgotten, there.questions.mean(), "o", color=colour, ms=5, label=label)
        ax.set(xlabel="rise of the loss on text, nats per token", ylabel="loss of the questions", title=arm)
        ax.grid(alpha=0.3, lw=0.4)
        ax.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=90)
    plt.close(figure)
