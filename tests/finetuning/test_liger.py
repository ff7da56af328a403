"""Liger's kernels: asked for where they can run, and then on the model that trains."""

import sys

import pytest
import yaml
from htsr_cli.main import main

from htsr.finetuning import arguments
from htsr.finetuning.check import check
from htsr.finetuning.reading import read_recipe
from tests.transformer import save_work

pytest.importorskip("trl.trainer.sft_trainer")

STUB = """
import json, pathlib

def _apply_liger_kernel_to_instance(model, **options):
    pathlib.Path(__file__).with_name("called.json").write_text(json.dumps([type(model).__name__, options]))
"""


def test_liger_is_asked_for_where_it_can_run(tmp_path, monkeypatch, capsys):
    save_work(tmp_path)
    training = {"use_liger_kernel": True, "max_steps": 1, "max_length": 32, "report_to": "none"}
    content = {"model": str(tmp_path / "model"), "output": str(tmp_path / "run"), "spectra": False}
    content |= {"data": {"train": str(tmp_path / "train.jsonl")}, "training": training}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    command = ["finetune", "--quiet", "--config", str(tmp_path / "recipe.yaml")]
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.delitem(sys.modules, "liger_kernel")
    assert main(command) == 1
    assert "needs liger-kernel: pip install" in capsys.readouterr().err

    package = tmp_path / "site" / "liger_kernel"
    (package / "transformers").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "transformers" / "__init__.py").write_text(STUB)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert main(command) == 2
    assert "its kernels run on an accelerator, and there is none here" in capsys.readouterr().err

    monkeypatch.setattr(arguments, "_runs_kernels", lambda: True)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    (note,) = [said for said in check(read_recipe(str(tmp_path / "recipe.yaml"))).notes if "Liger" in said]
    assert note.startswith("memory is planned without Liger's kernels")
    assert main(command) == 0
    assert (package / "transformers" / "called.json").read_text().startswith('["LlamaForCausalLM"')
    for name in [name for name in sys.modules if name.startswith("liger_kernel")]:
        monkeypatch.delitem(sys.modules, name)
