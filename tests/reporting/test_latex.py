import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from htsr.reporting.latex import as_latex, in_latex
from htsr.reporting.text import visible
from htsr.results import Column, Table

COMMANDS = {
    "textbackslash": "\\",
    "textasciitilde": "~",
    "textasciicircum": "^",
    "textasciigrave": "`",
    "textquotesingle": "'",
}
SPECIAL = st.text(st.sampled_from(list("\\&%$#_{}~^<>|[]*`'\"-, ab.0\n\t\x1b")) | st.characters())


def typeset(source):
    """What LaTeX prints of `source`, in so far as `in_latex` uses it; fails on a character that would be a command."""
    shown, rest = "", source
    while rest:
        for pattern, meaning in (
            (r"\\(text\w+)\{\}", lambda m: COMMANDS[m[1]]),
            (r"\\([&%$#_{}])", lambda m: m[1]),
            (r"\$([<>|])\$", lambda m: m[1]),
            (r"\{''\}", lambda m: '"'),
            (r"\{([\[\]*])\}", lambda m: m[1]),
            (r"\{\}", lambda m: ""),
            (r"[^\\&%$#_{}~^<>|\[\]*`'\"]", lambda m: m[0]),
        ):
            if match := re.match(pattern, rest):
                shown, rest = shown + meaning(match), rest[match.end() :]
                break
        else:
            pytest.fail(f"LaTeX reads {rest[:10]!r} of {source!r} as a command")
    return shown


@given(SPECIAL.filter(str.isascii))
def test_names_mean_themselves(name):
    source = in_latex(name)
    assert typeset(source) == visible(name)
    assert "--" not in source  # which would be one dash
    assert ",," not in source


@given(SPECIAL)
def test_every_engine_reads_every_name(name):
    source = in_latex(name)
    assert source.isascii()
    assert source.isprintable()
    bare = re.sub(r"\\[{}$]", "", source)
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0


@given(st.lists(st.tuples(SPECIAL, st.none() | st.floats(-1e6, 1e6)), min_size=1, max_size=4))
def test_a_table_has_its_rows_and_columns(rows):
    text = as_latex(Table((Column("matrix", text=True), Column("α", ".2f")), tuple(rows)), "of\nwhat")
    lines = text.splitlines()
    assert lines[:3] == ["% of\\nwhat", r"% \usepackage{booktabs}", r"\begin{tabular}{lr}"]
    body = lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")]
    assert len(body) == len(rows)
    for line, (_, value) in zip(body, rows, strict=True):
        first, number = re.split(r"(?<!\\) & ", line.removesuffix(r" \\"))
        assert not first.startswith(("[", "*"))  # the line above ends with \\, which would take them
        assert number.replace("$-$", "-") == ("" if value is None else f"{value:.2f}")


@pytest.mark.parametrize(
    ("header", "source"),
    [
        ("⟨ln λ̃⟩ a", r"$\langle\ln\tilde\lambda\rangle$ a"),
        ("α̂", r"$\hat\alpha$"),
        ("log ‖W‖²", r"log $\|W\|^2$"),
        ("32×96·9", r"32$\times$96$\cdot$9"),
        ("名", r"\textbackslash{}u540d"),
    ],
)
def test_signs_of_the_tables(header, source):
    assert in_latex(header) == source
