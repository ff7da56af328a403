"""Tables for papers."""

from __future__ import annotations

import re

from htsr.reporting.text import visible
from htsr.results import Table

_ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "`": r"\textasciigrave{}",
    "'": r"\textquotesingle{}",
    '"': "{''}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{c: f"${c}$" for c in "<>|"},
    **{c: f"{{{c}}}" for c in "[]*"},  # after \\ at the end of a line they begin its argument
    "α": r"$\alpha$",
    "Δ": r"$\Delta$",
    "λ": r"$\lambda$",
    "σ": r"$\sigma$",
    "τ": r"$\tau$",
    "²": "$^2$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "±": r"$\pm$",
    "−": "$-$",
    "→": r"$\to$",
    "‖": r"$\|$",
    "⟨": r"$\langle$",
    "⟩": r"$\rangle$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "–": "--",
    "…": r"\ldots{}",
}  # fmt: skip
_WHOLE = {  # a letter and the mark above it, and what reads better as one formula
    "⟨ln λ̃⟩": r"$\langle\ln\tilde\lambda\rangle$",
    "‖W‖²": r"$\|W\|^2$",
    "‖A-B‖/‖A‖": r"$\|A-B\|/\|A\|$",
    "± σ": r"$\pm\,\sigma$",
    "λ̃": r"$\tilde\lambda$",
    "α̂": r"$\hat\alpha$",
}


def as_latex(table: Table, *comments: str) -> str:
    """The table as a ``tabular`` of the booktabs package, rules, alignment and minus signs as a paper has them.

    Names mean themselves, and every engine compiles it: what is no ASCII and has no sign here stands as its escape.

    Args:
        table: table to write.
        *comments: comment lines above it, which say where it is from.
    """
    table = table.in_print()
    head = " & ".join(in_latex(column.header) for column in table.columns)
    lines = [
        " & ".join(_cell(text, value) for text, value in zip(texts, values, strict=True))
        for texts, values in zip(table.cells(), table.rows, strict=True)
    ]
    parts = [
        *(f"% {visible(comment)}" for comment in (*comments, r"\usepackage{booktabs}")),
        rf"\begin{{tabular}}{{{''.join('l' if column.text else 'r' for column in table.columns)}}}",
        r"\toprule",
        rf"{head} \\",
        r"\midrule",
        *(rf"{line} \\" for line in lines),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(parts) + "\n"


def in_latex(text: str) -> str:
    """`text` where it means itself, in ASCII.

    Examples:
        >>> from htsr.reporting.latex import in_latex
        >>> print(in_latex("mlp.up_proj α<2"))
        mlp.up\\_proj $\\alpha$$<$2
    """
    for whole, command in _WHOLE.items():
        if whole in text:
            return command.join(map(in_latex, text.split(whole)))
    apart = re.sub(r"([-,])(?=\1)", "\\1\0", visible(text))  # two in a row would be another sign
    return "".join(_ESCAPES.get(c) or (c if c.isascii() else _escaped(c)) for c in apart).replace("\0", "{}")


def _escaped(character: str) -> str:
    return rf"\textbackslash{{}}{character.encode('unicode_escape').decode()[1:]}"


def _cell(text: str, value: object) -> str:
    """A number with a minus sign rather than a hyphen, anything else as text."""
    return in_latex(text) if isinstance(value, str) else text.replace("-", "$-$")
