"""Recipes in two gloo processes: sharded by FSDP2 they end with the weights of data parallel training, also resumed.

accelerate shards on accelerators only, so the workers call their CPUs one.
"""

import gc
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file

import htsr
from htsr.finetuning.reading import FOLDER, read_recipe
from tests.processes import in_two_processes, leave_with
from tests.training.runs import killed_after
from tests.transformer import save_work

pytest.importorskip("trl")

LOW_RANK = {"rank": 8, "scale": 1.0, "refresh_every": 2}
SAMPLING = {"active": 1, "interval": 2, "threshold": 3.0}
LORA = {"rank": 4, "modules_to_save": ["embed"], "options": {"init_lora_weights": "pissa"}}
RECIPES = {
    "full": {"method": "full", "layerwise": {"min_size": 8}},
    "lora": {"method": "lora", "lora": LORA, "layerwise": {"attn.*.lora_B": 16}},
    "lisa": {"method": "lisa", "layerwise": {"min_size": 8}, "sampling": SAMPLING},
    "lisa, state kept": {"method": "lisa", "sampling": SAMPLING | {"frozen_state": "keep"}},
    "lisa, narrow": {"method": "lisa", "sampling": SAMPLING, "dtype": "bfloat16", "rounding": "master"},
    "owlore": {"method": "owlore", "low_rank": LOW_RANK, "sampling": SAMPLING},
    "galore": {"method": "galore", "low_rank": LOW_RANK},
    "apollo": {"method": "apollo", "low_rank": LOW_RANK},
    "gum": {"method": "gum", "low_rank": LOW_RANK, "gum": {"active": 1, "base": "muon"}},
}
WHOLE = ("lora", "lisa", "owlore")  # resumed from checkpoints that hold whole tensors
SHARDED = ("full", "lora", "lisa, state kept", "lisa, narrow", "galore", "apollo", "gum")  # from those that hold shards
RESUMED = [*((method, "resumed") for method in WHOLE), *((method, "resumed-sharded") for method in SHARDED)]
CHECKPOINTS = {"fsdp2": "FULL_STATE_DICT", "resumed": "FULL_STATE_DICT", "resumed-sharded": "SHARDED_STATE_DICT"}


def write_recipe(folder, method, kind):
    training = {"max_steps": 5, "save_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    training |= {"logging_steps": 100, "max_length": 32, "disable_tqdm": True}
    training |= {"eval_on_start": False}
    if kind in CHECKPOINTS:
        training |= {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": CHECKPOINTS[kind]}}
    content = {
        "model": str(folder / "model"),
        "output": str(folder / f"{method}-{kind}"),
        "data": {"train": str(folder / "train.jsonl"), "evaluation_share": 0.1},
        "spectra": method == "full",
        "training": training,
        **RECIPES[method],
    }
    (folder / f"{method}-{kind}.yaml").write_text(yaml.safe_dump(content))


def write_shipped_recipe(folder):
    """several_gpus_fsdp2 as it is, but for model, data and sizes."""
    content = yaml.safe_load((FOLDER / "several_gpus_fsdp2.yaml").read_text())
    training = content["training"]
    del training["num_train_epochs"]
    training |= {"max_steps": 7, "save_steps": 3, "eval_steps": 3, "max_length": 32, "gradient_accumulation_steps": 2}
    training |= {"learning_rate": 1e-2, "warmup_steps": 0, "disable_tqdm": True}
    content |= {"model": str(folder / "model"), "output": str(folder / "shipped")}
    content["data"] = {"train": str(folder / "train.jsonl"), "evaluation_share": 0.1}
    content["sampling"] |= {"active": 1, "interval": 2, "threshold": 3.0}
    (folder / "shipped.yaml").write_text(yaml.safe_dump(content))


def write_apart(folder):
    """The adapters of lora-fsdp2 not merged, with the spectra of the model that they make."""
    content = yaml.safe_load((folder / "lora-fsdp2.yaml").read_text())
    content |= {"output": str(folder / "apart"), "lora": LORA | {"merge": False}, "spectra": True}
    (folder / "apart.yaml").write_text(yaml.safe_dump(content))


def write_stream(folder, kind, batch):
    """A stream that comes to its end in the second step and begins again."""
    write_recipe(folder, "full", kind)
    path = folder / f"full-{kind}.yaml"
    content = yaml.safe_load(path.read_text())
    data = {"train": str(folder / "train.jsonl"), "streaming": True, "evaluation_records": 26}
    content |= {"data": data, "layerwise": "none", "spectra": False}
    content["training"]["per_device_train_batch_size"] = batch
    path.write_text(yaml.safe_dump(content))


def call_cpus_accelerators():
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    original = PartialState.__init__

    def patched(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = patched


def killed_and_resumed(recipe):
    from accelerate.state import GradientState

    from htsr.finetuning.run import finetune

    with killed_after(4):
        finetune(recipe)
    GradientState._reset_state()  # as in a new process
    finetune(recipe, resume=True)


def _refused_data(rank, folder):
    """What the ranks are told that have read other records."""
    from htsr.finetuning.preflight import Prepared, agree
    from htsr.ranks import Ranks

    recipe, record = read_recipe(f"{folder}/full-ddp.yaml"), {"text": "one"}
    agree(
        Ranks.running(), replace(recipe, output=f"{recipe.output}{rank}"), Prepared(None, [record], [], [], None, None)
    )
    try:
        agree(Ranks.running(), recipe, Prepared(None, [record, {"text": f"{rank}"}], [], [], None, None))
    except htsr.UsageError as error:
        return str(error)
    return ""


def _worker(rank, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    from htsr.finetuning.run import finetune
    from htsr.finetuning.trainer import FinetuneTrainer

    kinds = {"refused": _refused_data(rank, folder)}
    original = FinetuneTrainer._inner_training_loop

    def noted(self, *args, **kwargs):
        outcome = original(self, *args, **kwargs)
        kinds[self.args.output_dir] = type(next(self.model.parameters())).__name__
        return outcome

    FinetuneTrainer._inner_training_loop = noted
    gc.freeze()  # as in conftest.py
    for method in RECIPES:
        finetune(read_recipe(f"{folder}/{method}-ddp.yaml"))
    finetune(read_recipe(f"{folder}/full-stream.yaml"))
    call_cpus_accelerators()
    for method in RECIPES:
        finetune(read_recipe(f"{folder}/{method}-fsdp2.yaml"))
    finetune(read_recipe(f"{folder}/apart.yaml"))
    for method, kind in RESUMED:
        killed_and_resumed(read_recipe(f"{folder}/{method}-{kind}.yaml"))
    killed_and_resumed(read_recipe(f"{folder}/shipped.yaml"))
    leave_with(kinds, rank, folder)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    save_work(folder)
    for method in RECIPES:
        for kind in ("ddp", *CHECKPOINTS):
            write_recipe(folder, method, kind)
    write_shipped_recipe(folder)
    write_apart(folder)
    write_stream(folder, "stream", 4)
    write_stream(folder, "stream-alone", 8)
    in_two_processes(_worker, folder)
    return folder


@pytest.mark.parametrize("method", RECIPES)
def test_sharded_training_ends_with_the_weights_of_data_parallel_training(work, method):
    kinds = json.loads((work / "0.json").read_text())
    assert kinds[str(work / f"{method}-ddp")] == "Parameter"
    assert kinds[str(work / f"{method}-fsdp2")] == "DTensor"
    start, expected, found = (
        load_file(work / name / "model.safetensors") for name in ("model", f"{method}-ddp", f"{method}-fsdp2")
    )
    assert any((expected[key] - start[key]).abs().max() > 1e-2 for key in start)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4, msg=key)


def test_adapters_trained_sharded_stay_apart_and_make_the_same_model(work):
    from peft import AutoPeftModelForCausalLM

    assert not list((work / "apart").glob("model*"))
    found = AutoPeftModelForCausalLM.from_pretrained(work / "apart").merge_and_unload().state_dict()
    for key, value in load_file(work / "lora-fsdp2" / "model.safetensors").items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4, msg=key)
    moved = json.loads((work / "apart" / "results.json").read_text())["moved"]
    assert len(moved) > 1
    assert all(one["relative"] > 0 for one in moved)


@pytest.mark.parametrize(("method", "kind"), RESUMED)
def test_a_killed_sharded_run_goes_on_with_the_same_weights(work, method, kind):
    whole, resumed = (load_file(work / f"{method}-{name}" / "model.safetensors") for name in ("fsdp2", kind))
    for key, value in whole.items():
        torch.testing.assert_close(resumed[key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_a_stream_is_shared_by_the_processes(work):
    from htsr.finetuning.run import finetune

    finetune(read_recipe(f"{work}/full-stream-alone.yaml"))
    start, alone, shared = (
        load_file(work / name / "model.safetensors") for name in ("model", "full-stream-alone", "full-stream")
    )
    assert any((alone[key] - start[key]).abs().max() > 1e-2 for key in start)
    for key, value in alone.items():
        torch.testing.assert_close(shared[key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_ranks_that_have_read_other_records_are_refused(work):
    said = {json.loads((work / f"{rank}.json").read_text())["refused"] for rank in range(2)}
    assert len(said) == 1
    assert said.pop().startswith("the processes do not train one run: 2 records with the digest")


def test_a_run_is_not_resumed_by_another_number_of_processes(work, tmp_path):
    """The Trainer goes on with half the batch, in another order, and says nothing."""
    from htsr.finetuning.run import finetune

    shutil.copytree(work / "full-ddp", tmp_path / "full", ignore=lambda *_: ["results.json"])
    recipe = replace(read_recipe(f"{work}/full-ddp.yaml"), output=str(tmp_path / "full"))
    with pytest.raises(htsr.UsageError, match="holds a run of 2 processes, and --resume with 1 would go on"):
        finetune(recipe, resume=True)


def test_the_shipped_recipe_trains_the_blocks_that_it_draws(work):
    """In mixed precision FSDP2 has to be told of each block that is thawed."""
    start, found = (load_file(work / name / "model.safetensors") for name in ("model", "shipped"))
    moved = {
        ".".join(key.split(".")[:3]) for key in start if ".layers." in key and not torch.equal(start[key], found[key])
    }
    results = json.loads((work / "shipped" / "results.json").read_text())
    drawn = {row["name"] for row in results["coverage"] if row["intervals"]}
    assert len(drawn) > 1
    assert moved == drawn
    assert all(value.isfinite().all() for value in found.values())
    assert results["metrics"]["eval_loss"] < 4
    assert torch.equal(start["model.embed_tokens.weight"], found["model.embed_tokens.weight"])
