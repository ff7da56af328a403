import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from htsr.spectra import known_nulls, null
from htsr.spectra.known_nulls import keep_null, known_null, table
from htsr.spectra.null import ShapeNull, alpha_null, draw_alpha_null, null_key
from htsr.spectra.scores import null_of_shape
from reports.shape_null.shapes import OTHERS, nulls

FITS = ("ks", "hill")
SHAPE = (150, 170, 1, "hill")  # of no common transformer


@pytest.fixture(autouse=True)
def _forgotten():
    alpha_null.cache_clear()
    yield
    alpha_null.cache_clear()


def kept() -> list[Path]:
    return sorted(known_nulls.cache_folder().rglob("*.json"))


# each size at which the drawing changes its way: solver, number of draws, pooling, rank
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    "shape",
    [*OTHERS, *((M, N, 1, None, False) for M, N in ((128, 128), (192, 576), (576, 1536), (1280, 5120), (2304, 2304)))],
)
def test_the_table_is_what_is_drawn(shape, fit):
    """Where this fails, the algorithm has changed: run `python -m reports.shape_null`, and say so in CHANGELOG.md."""
    M, N, pieces, rank, product = shape
    drawn = draw_alpha_null(M, N, pieces, fit, rank, product)
    assert table()[null_key(M, N, pieces, fit, rank, product)] == pytest.approx([drawn.alpha, drawn.sd], rel=1e-9)


def test_large_matrices_of_the_table_too():
    drawn = draw_alpha_null(4096, 4096, 1, "hill")
    assert table()["hill-4096x4096"] == pytest.approx([drawn.alpha, drawn.sd], rel=1e-9)


def test_the_table_holds_the_listed_shapes():
    assert table().keys() == {
        null_key(M, N, pieces, fit, rank, product) for M, N, pieces, rank, product in nulls() for fit in FITS
    }
    assert len(known_nulls._content()) < 200_000


def test_no_two_nulls_have_one_key():
    keys = [
        null_key(M, N, pieces, fit, *kind)
        for fit in ("ks", "hill", "hill_paper")
        for M, N, pieces in ((12, 34, 1), (1, 234, 1), (12, 3, 4), (12, 34, 5))
        for kind in ((None, False), (1, False), (1, True), (11, False))
    ]
    assert len(set(keys)) == len(keys)


def test_analysis_and_training_take_the_table(monkeypatch):
    monkeypatch.setattr(null, "draw_alpha_null", None)
    assert alpha_null(768, 3072, 1, "ks") == ShapeNull(*table()["ks-768x3072"])
    assert null_of_shape((3072, 768)) == table()["hill-768x3072"][0]
    assert not kept()


def test_what_was_drawn_is_kept_to_the_last_digit(monkeypatch):
    first = alpha_null(*SHAPE)
    assert first == draw_alpha_null(*SHAPE)
    assert [file.name for file in kept()] == ["hill-150x170.json"]
    alpha_null.cache_clear()
    monkeypatch.setattr(null, "draw_alpha_null", None)
    assert alpha_null(*SHAPE) == first


def test_nulls_that_cost_nothing_are_not_kept():
    alpha_null(20, 30, 1, "ks")
    assert not kept()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[2.5", b"[2.5]", b"2.5", b"null", b"[null, 1.0]", b'"ab"', b'"34"', b"\xff\xfe", b"[true, false]"),
        *(b"[NaN, 1.0]", b"[Infinity, 1.0]", b"[1e999, 0.0]", b"[2.5, NaN]", b"[9%b, 1.0]" % (b"9" * 400), b"[" * 9999),
        *(b"[-3.0, 1.0]", b"[1.0, 0.1]", b"[2.5, -0.1]", b"[2.5, 0.1, 0.1]", b'{"2.5": 1, "3.5": 2}', b" " * 300),
    ],
)
def test_a_damaged_file_is_named_once_and_written_anew(content, caplog):
    first = alpha_null(*SHAPE)
    (file,) = kept()
    file.write_bytes(content)
    with caplog.at_level("WARNING", logger="htsr"):
        for _ in range(3):
            alpha_null.cache_clear()
            assert alpha_null(*SHAPE) == first
    assert [record.getMessage().startswith(f"{file} is damaged") for record in caplog.records] == [True]
    assert json.loads(file.read_text()) == [first.alpha, first.sd]


@pytest.mark.parametrize("place", ["read-only", "under a file", "a folder", "no home", "too long a name"])
def test_without_a_cache_folder_nothing_is_said(place, tmp_path, monkeypatch, caplog):
    if place == "read-only":
        monkeypatch.setenv("HTSR_CACHE", "/proc/htsr")
    elif place == "under a file":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("HTSR_CACHE", str(tmp_path / "file" / "cache"))
    elif place == "too long a name":
        monkeypatch.setenv("HTSR_CACHE", str(tmp_path / ("x" * 5000)))
    elif place == "a folder":
        known_nulls._file("hill-150x170").mkdir(parents=True)
    else:
        monkeypatch.delenv("HTSR_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with caplog.at_level("WARNING", logger="htsr"):
        assert alpha_null(*SHAPE) == draw_alpha_null(*SHAPE)
    assert not caplog.records
    assert not list(tmp_path.rglob(".*"))  # no temporary file stays


def test_the_folder_may_be_named_from_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HTSR_CACHE", "~/x")
    assert known_nulls.cache_folder() == tmp_path / "x"


def test_a_changed_table_or_numpy_finds_no_old_file(monkeypatch):
    keep_null("ks-1x1", 3.0, 0.5)
    assert known_null("ks-1x1") == (3.0, 0.5)
    for changed in ((known_nulls.np, "__version__", "0"), (known_nulls, "_content", lambda: b"{}")):
        known_nulls._version.cache_clear()
        with monkeypatch.context() as patched:
            patched.setattr(*changed)
            assert known_null("ks-1x1") is None
    known_nulls._version.cache_clear()


def test_many_at_once_read_whole_files_only(caplog):
    def work(k: int) -> tuple[float, float] | None:
        keep_null("ks-1x1", 10 / 3, 0.1)
        return known_null("ks-1x1")

    with caplog.at_level(logging.WARNING, logger="htsr"), ThreadPoolExecutor(8) as pool:
        assert set(pool.map(work, range(400))) == {(10 / 3, 0.1)}
    assert not caplog.records
    assert [file.name for file in kept()] == ["ks-1x1.json"]
