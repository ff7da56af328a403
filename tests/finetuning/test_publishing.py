"""A result that the hub does not take can be pushed by the command that is named."""

import shlex
from types import SimpleNamespace

import pytest

import htsr
from htsr.finetuning.publishing import publish


@pytest.mark.parametrize("revision", [None, "first try"])
def test_the_command_that_is_named_pushes_what_would_have_been_pushed(tmp_path, monkeypatch, revision):
    asked = {}

    class Hub:
        def upload_folder(self, **options):
            asked.update(options)
            raise OSError("no way")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    with pytest.raises(htsr.HtsrError, match="does not take it: no way") as refused:
        publish("me/mine", SimpleNamespace(hub_revision=revision), tmp_path / "a run")
    words = shlex.split(str(refused.value).partition("Push it by ")[2])
    assert words[:4] == ["hf", "upload", asked["repo_id"], asked["folder_path"]]
    options = list(zip(words[4::2], words[5::2], strict=True))
    assert [value for key, value in options if key == "--exclude"] == asked["ignore_patterns"]
    assert [value for key, value in options if key == "--revision"] == [revision] * (asked["revision"] is not None)
