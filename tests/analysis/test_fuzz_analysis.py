"""Saved analyses that something has damaged: refused in a sentence, or still an analysis that can be shown."""

import io
import json
import random
import zipfile
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from htsr_cli.output import Target

import htsr
from htsr.reporting import html
from htsr.reporting.analysis_page import analysis_document
from tests.models import state_dict

HOSTILE = (
    None, True, -1, 0, 2**70, -(2**63), 1e308, -1e308, float("nan"), float("inf"), 1e-320, "", "ok", "[/red]", "a.q[0]",
    "\ud800", "\x1b[31m\n", "$\\frac", [], [[]], {}, {"rows": 1}, ["x"] * 3,
)  # fmt: skip
FORMATS = ("table", "json", "markdown")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "a.npz"
    state = {name: tensor for name, tensor in state_dict(blocks=1).items() if "proj" in name and "down" not in name}
    state["model.layers.0.mlp.gate_proj.weight"] = np.nan * state["model.layers.0.mlp.up_proj.weight"]
    htsr.analyze(state, device="cpu", bulk=True, permuted=True, fit="clip_xmax").save(path)
    return path.read_bytes()


def is_refused_or_shown(content, path):
    """Whether `content` is loaded; SourceError is the only error there may be."""
    path.write_bytes(content)
    try:
        analysis = htsr.Analysis.load(path)
    except htsr.SourceError as refusal:
        sentence = str(refusal)
    else:
        return is_shown(analysis)
    assert sentence.startswith(f"{path} is not an analysis that htsr saved: ")
    assert "\n" not in sentence
    return False


def is_shown(analysis):
    for format in FORMATS:
        with redirect_stdout(io.StringIO()) as out:
            Target(format, None).write(analysis)
        assert out.getvalue()
    page = html.render(analysis_document(analysis._page()), "plotly")
    page.encode("utf-8", "replace")
    assert len(repr(analysis)) < 1000
    return True


def rewritten(content, change):
    """The archive with its members, name → bytes, as `change` leaves them."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def npy(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def with_header(content, change):
    def write(members):
        header = json.loads(np.load(io.BytesIO(members["header.npy"])).tobytes())
        change(header)
        members["header.npy"] = npy(np.frombuffer(json.dumps(header).encode(), np.uint8))

    return rewritten(content, write)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alpha", float("inf")), ("alpha", -3.0), ("alpha", 99.0), ("M", -1), ("Q", 0.0), ("lambda_min", 1e30),
        ("sigma", -1.0), ("status", "ok?"), ("fit", "zzz"), ("norm", 1.0), ("lambda_max", 1e9), ("D", 2.0),
        ("trace_log", float("nan")),
    ],
)  # fmt: skip
def test_numbers_that_a_row_cannot_have_are_named(saved, tmp_path, field, value):
    def change(header):
        row = next(row for row in header["rows"] if row["alpha"] is not None)
        row[field] = value
        change.name = row["name"]

    path = tmp_path / "a.npz"
    path.write_bytes(with_header(saved, change))
    with pytest.raises(htsr.SourceError, match=field) as refusal:
        htsr.Analysis.load(path)
    assert change.name in str(refusal.value)


@pytest.mark.parametrize("fit", ["ks", "hill", "hill_paper", "fix_fingers", "clip_xmax"])
@pytest.mark.parametrize("how", [{}, {"xmax": 30.0}, {"xmin": 5.0}], ids=str)
def test_what_every_fit_saves_is_believed(tmp_path, fit, how):
    state = {f"w{i}": torch.from_numpy(np.random.default_rng(i).standard_normal((40, 60))) for i in range(2)}
    state["low"] = state["w1"][:, :20] @ state["w0"][:20]
    state["spike"] = state["w0"] + 5 * torch.outer(state["w1"][:, 0], state["w1"][0])
    analysis = htsr.analyze(state, fit=fit, device="cpu", **how)
    analysis.save(tmp_path / "a.npz")
    assert htsr.Analysis.load(tmp_path / "a.npz").rows == analysis.rows


def test_bytes_that_changed(saved, tmp_path):
    draw = random.Random(0)
    shown = 0
    for _ in range(250):
        data = bytearray(saved)
        start = draw.randrange(len(data))
        how = draw.randrange(4)
        if how == 0:
            del data[start:]
        elif how == 1:
            del data[start : start + draw.randrange(1, 64)]
        elif how == 2:
            data[start:start] = draw.randbytes(draw.randrange(1, 64))
        else:  # most likely in the directory, or in the header: the arrays have checksums
            for at in (draw.randrange(-600, 0), start):
                data[at] = draw.randrange(256)
        shown += is_refused_or_shown(bytes(data), tmp_path / "x.npz")
    assert shown < 25  # what is left has changed where nothing is read


def test_headers_that_changed(saved, tmp_path):
    draw = random.Random(1)

    def spoil(header):
        node, key = header, draw.choice(list(header))
        while isinstance(node[key], (dict, list)) and node[key] and draw.random() < 0.9:
            node = node[key]
            key = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
        how = draw.randrange(4)
        if how == 0:
            del node[key]
        elif how == 1 and isinstance(node, dict):
            node[f"{key}x"] = node.pop(key)
        else:
            node[key] = draw.choice(HOSTILE)

    shown = [is_refused_or_shown(with_header(saved, spoil), tmp_path / "x.npz") for _ in range(120)]
    assert 10 < sum(shown) < 100  # texts and numbers within their type are an analysis as good as any


DRAWN = ("alpha", "sigma", "lambda_min", "num_pl_tail", "num_fingers", "block", "rows", "lambda_erg", "lambda_plus")


@pytest.mark.parametrize("field", DRAWN)
def test_numbers_out_of_all_proportion_are_drawn_or_refused(saved, tmp_path, field):
    for hostile in HOSTILE[2:10:2]:
        is_refused_or_shown(
            with_header(saved, lambda header, hostile=hostile: header["rows"][0].update({field: hostile})),
            tmp_path / "x.npz",
        )


ARRAYS = {
    "text": np.array(["a", "b"]),
    "objects": None,
    "two axes": np.ones((2, 32)),
    "single precision": np.ones(32, np.float32),
    "none": np.ones(0),
    "descending": np.arange(32.0)[::-1].copy(),
    "negative": np.arange(32.0) - 1,
    "infinite": np.array([1.0] * 31 + [np.inf]),
    "too many": np.arange(33.0),
    "complex": np.ones(32, complex),
}


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("name", ["eigenvalues/1.npy", "permuted/1.npy", "header.npy"])
def test_arrays_that_are_no_spectrum(saved, tmp_path, kind, name):
    array = ARRAYS[kind]
    data = npy(array) if array is not None else npy(np.ones(4)).replace(b"<f8", b"|O8")
    allowed = kind == "too many" and name.startswith("permuted")  # nothing counts the permuted ones
    content = rewritten(saved, lambda members: members.update({name: data}))
    assert is_refused_or_shown(content, tmp_path / "x.npz") is allowed


@pytest.mark.parametrize("name", ["eigenvalues/99", "eigenvalues/-1", "eigenvalues/x", "other/0", "eigenvalues", "²/²"])
def test_arrays_of_no_row(saved, tmp_path, name):
    content = rewritten(saved, lambda members: members.update({f"{name}.npy": npy(np.ones(4))}))
    assert not is_refused_or_shown(content, tmp_path / "x.npz")


def test_sizes_that_are_claimed_are_not_allocated(saved, tmp_path):
    def claim(members):
        members["eigenvalues/1.npy"] = npy(np.ones(32)).replace(b"(32,)", b"(%d,)" % 2**60)

    assert not is_refused_or_shown(rewritten(saved, claim), tmp_path / "x.npz")
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("header.npy", bytes(50_000_000))
    assert not is_refused_or_shown(out.getvalue(), tmp_path / "x.npz")


def test_what_else_stands_where_a_file_should(saved, tmp_path):
    encrypted = bytearray(saved)
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := encrypted.find(signature, at + 1)) >= 0:
            encrypted[at + offset] |= 1
    for content in (b"", b"PK", bytes(encrypted), saved[: len(saved) // 2]):
        assert not is_refused_or_shown(content, tmp_path / "x.npz")
    (tmp_path / "folder.npz").mkdir()
    for name in ("folder.npz", "missing.npz", "missing/a.npz", "n" * 300 + ".npz"):
        with pytest.raises(htsr.SourceError, match="is not an analysis that htsr saved"):
            htsr.Analysis.load(tmp_path / name)
