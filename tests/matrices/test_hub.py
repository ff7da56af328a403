"""Models by hub id, out of a cache that is made here: nothing is downloaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import htsr
from htsr.matrices.hub import answers, fetch_rest, is_hub_id, reached
from tests.models import save_folder, state_dict

NAME = "model.layers.0.self_attn.q_proj"
OLD, NEW = "a" * 40, "b" * 40


def cached(cache: Path, repo: str, revision: str, commit: str, seed: int) -> Path:
    """A model in a cache laid out as huggingface_hub does: refs, and snapshots that link to blobs."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for folder in (root / "refs", root / "blobs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    made = Path(save_folder(cache.parent / f"made-{commit[0]}", state_dict(blocks=1, seed=seed)))
    (made / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for file in made.iterdir():
        blob = root / "blobs" / f"{commit[:8]}-{file.name}"
        shutil.move(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    import huggingface_hub.constants as constants

    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    cached(folder, "owner/model", "main", NEW, seed=1)
    cached(folder, "owner/model", "v1", OLD, seed=2)
    return folder


def embedding(model: htsr.Model):
    return model.matrices[0].read().ravel()[0]


def test_the_cache_is_read_offline(cache):
    model = htsr.describe("owner/model")
    assert model.label == "owner/model"
    assert [m.name for m in model][:2] == ["model.embed_tokens", "model.layers.0.mlp.down_proj"]
    assert embedding(model) == float(state_dict(blocks=1, seed=1)["model.embed_tokens.weight"][0, 0])
    assert model.fingerprint


@pytest.mark.parametrize(("revision", "seed"), [("main", 1), ("v1", 2), (OLD, 2), (NEW, 1)])
def test_revisions(cache, revision, seed):
    model = htsr.describe("owner/model", revision=revision)
    assert embedding(model) == float(state_dict(blocks=1, seed=seed)["model.embed_tokens.weight"][0, 0])


def test_the_environment_names_the_cache(tmp_path):
    cached(tmp_path / "elsewhere", "owner/model", "main", NEW, seed=1)
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "elsewhere"), "HF_HUB_OFFLINE": "1"}
    script = "import htsr; print(len(htsr.describe('owner/model').matrices))"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.returncode) == ("5", 0), done.stderr


def test_shards_and_one_that_is_missing(cache):
    snapshot = cache / "models--owner--model" / "snapshots" / NEW
    (snapshot / "model.safetensors").rename(snapshot / "part-1.safetensors")
    index = snapshot / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"{NAME}.weight": "part-1.safetensors"}}))
    assert len(htsr.describe("owner/model").matrices) == 5
    index.write_text(json.dumps({"weight_map": {f"{NAME}.weight": "part-1.safetensors", "b": "part-2.safetensors"}}))
    with pytest.raises(htsr.SourceError, match=r"owner/model: part-2\.safetensors is neither on the hub nor in the"):
        htsr.describe("owner/model")
    index.write_text(json.dumps({"weight_map": {"a": "../../../secret"}}))
    with pytest.raises(htsr.SourceError, match="names a file outside its folder"):
        htsr.describe("owner/model")


def test_adapters_come_with_their_config(cache):
    """Also where the merged model lies beside them: PEFT and transformers take the adapter then."""
    snapshot = cache / "models--owner--model" / "snapshots" / NEW
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (snapshot / "adapter_config.json").write_text(json.dumps(config))
    A, B = torch.ones(2, 6), torch.ones(4, 2)
    names = [f"base_model.model.{NAME}.lora_{part}.weight" for part in "AB"]
    save_file(dict(zip(names, (A, B), strict=True)), snapshot / "adapter_model.safetensors")
    (matrix,) = htsr.describe("owner/model")
    assert (matrix.name, matrix.kind) == (NAME, "adapter")
    np.testing.assert_array_equal(matrix.read(), 2.0 * (B @ A))


def test_a_single_file_comes_before_an_older_index(cache):
    snapshot = cache / "models--owner--model" / "snapshots" / NEW
    shutil.copy(snapshot / "model.safetensors", snapshot / "part-1.safetensors")
    index = {"weight_map": {f"{NAME}.weight": "part-1.safetensors", "b": "gone.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert len(htsr.describe("owner/model").matrices) == 5


@pytest.mark.parametrize(
    ("repo", "revision", "sentence"),
    [
        (
            "owner/unknown",
            None,
            "owner/unknown is no file or folder here, nor in the local cache, and the hub",
        ),
        ("unknown", None, "unknown is no file or folder here, nor in the local cache"),
        ("owner/model", "v9", "owner/model is no file or folder here, nor at revision v9 in the local cache"),
        ("./owner/model", None, "./owner/model does not exist"),
        ("owner/model/more", None, "owner/model/more does not exist"),
        ("weights.safetensors", None, "weights.safetensors does not exist"),
        ("owner/..", None, "does not exist"),
        ("what is this?", None, "what is this. does not exist"),
    ],
)
def test_what_is_not_there(cache, repo, revision, sentence):
    with pytest.raises(htsr.SourceError, match=sentence):
        htsr.describe(repo, revision=revision)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        ("GatedRepoError", "owner/model is gated: accept its licence on the hub and log in"),
        ("RepositoryNotFoundError", "owner/model is no file or folder here, nor a model on the hub"),
        ("RevisionNotFoundError", "owner/model has no revision v9"),
        ("HfHubHTTPError", "owner/model could not be had from the hub: sorry"),
        ("EntryNotFoundError", "owner/model at revision v9 has no model.safetensors, pytorch_model.bin or index"),
    ],
)
def test_what_the_hub_answers(monkeypatch, tmp_path, error, sentence):
    import huggingface_hub
    from huggingface_hub import errors

    monkeypatch.chdir(tmp_path)
    kind = getattr(errors, error)

    def answer(*_args, **_kwargs):
        if issubclass(kind, errors.HfHubHTTPError):
            raise kind("sorry", response=MagicMock(status_code=404, headers={}))
        raise kind("sorry")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer)
    with pytest.raises(htsr.SourceError, match=sentence):
        htsr.describe("owner/model", revision="v9")


def test_hub_ids():
    assert all(map(is_hub_id, ("gpt2", "owner/model", "owner/model-7B_v0.1")))
    assert not any(map(is_hub_id, ("", "a/b/c", "/a", "a/", "a b", "../a", "a/..", "~/a")))


def test_a_hub_model_is_projected_offline(cache, tmp_path):
    done = htsr.project("owner/model", tmp_path / "out", 2)
    assert {operation.kept for operation in done.operations} == {2}
    assert len(htsr.describe(tmp_path / "out").matrices) == len(htsr.describe("owner/model").matrices)
    assert (tmp_path / "out" / "config.json").is_file()


def test_small_files_that_cannot_be_had_are_left_out(cache, caplog):
    fetch_rest("owner/none")
    assert "owner/none: tokenizer and other small files could not be fetched" in caplog.text


@pytest.mark.parametrize(
    "name", ["./typo", "../typo", "runs/typo/x", "model.gguf", "data/train.jsonl", "~/typo", "/typo"]
)
def test_a_path_is_no_hub_id(name):
    assert not is_hub_id(name)
    assert is_hub_id("runs/typo")


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, True),
        ("GatedRepoError", True),
        ("RepositoryNotFoundError", "owner/data is no file or folder here, nor a data set on the hub"),
        ("RevisionNotFoundError", "owner/data has no revision v9"),
        ("HfHubHTTPError", False),
        ("OfflineModeIsEnabled", False),
    ],
)
def test_the_hub_is_asked_once(monkeypatch, error, outcome):
    from huggingface_hub import HfApi, constants, errors

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked = []

    def answer(*args, **kwargs):
        asked.append(kwargs)
        if error is not None:
            kind = getattr(errors, error)
            more = (
                {"response": MagicMock(status_code=404, headers={})} if issubclass(kind, errors.HfHubHTTPError) else {}
            )
            raise kind("sorry", **more)

    monkeypatch.setattr(HfApi, "repo_info", answer)
    if isinstance(outcome, str):
        with pytest.raises(htsr.SourceError, match=outcome):
            answers("owner/data", "v9", "dataset")
    else:
        with reached("owner/data", "v9", "dataset"):
            assert constants.HF_HUB_OFFLINE is not outcome
    assert constants.HF_HUB_OFFLINE is False
    assert len(asked) == 1
    assert asked[0]["timeout"] <= 10
