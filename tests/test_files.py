"""Results are written whole or not at all, and in place of nothing but earlier results."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
import torch
from htsr_cli.main import main
from safetensors.torch import save_file

import htsr
from htsr.errors import HtsrError, UsageError
from htsr.files import check_writable, written


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "m"
    folder.mkdir()
    save_file({"a.weight": torch.randn(40, 60)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("option", ["--save", "--output", "--html"])
def test_a_pipe_is_sent_the_result_and_stays(model, tmp_path, option):
    pipe = tmp_path / "result.json"
    os.mkfifo(pipe)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    assert main(["analyze", str(model), option, str(pipe)]) == 0
    reader.join(20)
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    assert got[0].startswith({"--save": b"PK", "--output": b"{", "--html": b"<!"}[option])
    assert not list(tmp_path.glob(".htsr-*"))


def test_a_socket_is_refused(tmp_path, monkeypatch):
    import socket

    monkeypatch.chdir(tmp_path)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
        with pytest.raises(HtsrError, match="neither a file nor a pipe"):
            check_writable(Path("s"))
    assert stat.S_ISSOCK(Path("s").lstat().st_mode)


def test_a_link_stays_and_its_file_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    link, file = tmp_path / "latest.csv", tmp_path / "there" / "a.csv"
    link.symlink_to(file)
    for text in ("new", "again"):
        with written(link) as temporary:
            temporary.write_text(text)
        assert link.is_symlink()
        assert file.read_text() == text


@pytest.mark.parametrize("option", ["--save", "--output", "--html"])
@pytest.mark.parametrize("named", ["model.safetensors", "config.json", "link.json"])
def test_a_file_of_a_model_is_not_overwritten(model, capsys, option, named, monkeypatch):
    monkeypatch.setattr("htsr_cli.run.analyze_model", lambda *_args, **_more: pytest.fail("work was begun"))
    (model / "link.json").symlink_to(model / "model.safetensors")
    before = (model / "model.safetensors").read_bytes(), (model / "config.json").read_bytes()
    args = ["analyze", str(model / "model.safetensors"), option, str(model / named)]
    assert main([*args, "--format", "json"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert before == ((model / "model.safetensors").read_bytes(), (model / "config.json").read_bytes())


def test_a_file_of_a_model_is_not_overwritten_from_python(model):
    file = model / "model.safetensors"
    before = file.read_bytes()
    with pytest.raises(UsageError, match="it is a file of a model"):
        htsr.analyze(file).save(file)
    assert file.read_bytes() == before
