"""Recipes on the device train as on the CPU."""

import pytest
import torch
import yaml

from tests.device.agree import assert_agree
from tests.transformer import save_work

pytest.importorskip("trl.trainer.sft_trainer")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    save_work(folder)
    return folder


def run(work, output, method, place, **more):
    from htsr.finetune import finetune, read_recipe

    content = {
        "model": str(work / "model"),
        "output": str(output),
        "method": method,
        "dtype": "float32",
        "data": {"train": str(work / "train.jsonl"), "evaluation_share": 0.1},
        "spectra": False,
        "training": {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "max_length": 32,
            "disable_tqdm": True,
            "use_cpu": place == "cpu",
            "bf16": False,
            "dataloader_pin_memory": False,
            "report_to": [],
        },
    }
    if method == "owlore":
        content["sampling"] = {"active": 1, "interval": 2, "threshold": 3.0}
        content["low_rank"] = {"rank": 8, "scale": 1.0, "refresh_every": 2}
    path = output.parent / f"{output.name}.yaml"
    path.write_text(yaml.safe_dump(content | more))
    return finetune(read_recipe(str(path)))


@pytest.mark.parametrize("method", ["full", "lora", "owlore"])  # which samples and projects
def test_a_recipe(device, at_place, work, tmp_path, method):
    losses = []
    for place in ("cpu", device):
        at_place(place)
        result = run(work, tmp_path / torch.device(place).type, method, place)
        losses.append([result.metrics["train_loss"], result.metrics["eval_loss"]])
    assert_agree(*losses, 1e-3)
