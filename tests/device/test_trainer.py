"""The callbacks under transformers' Trainer on the device: its steps are those of the CPU, and it resumes."""

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import htsr
from tests.device.agree import assert_agree
from tests.device.runs import within
from tests.transformer import llama


class Texts(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        tokens = torch.randint(4, 64, (9,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens.clone()}


def trained(folder, place, steps, callbacks, resume=None, optimizer=None):
    model = llama(4, 64).double()
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=place == "cpu",
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=3,
        logging_steps=2,
        report_to=[],
        seed=0,
        bf16=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    made = None if optimizer is None else (optimizer(model), None)
    trainer = Trainer(model, arguments, train_dataset=Texts(), **({} if made is None else {"optimizers": made}))
    for callback in callbacks:
        trainer.add_callback(callback(trainer))
    trainer.train(resume_from_checkpoint=resume)
    assert next(trainer.model.parameters()).device.type == torch.device(place).type
    return trainer


def sampling(trainer):
    sampler = htsr.LayerSampler(trainer.model, active=1, interval=2, seed=1, frozen_state="offload")
    return htsr.LayerSamplerCallback(sampler)


def layered(trainer):
    return htsr.LayerwiseCallback(trainer, "llr", interval=2, min_size=30)


def test_callbacks(device, at_place, tmp_path):
    runs, callbacks = [], (layered, sampling)
    for place in ("cpu", device):
        at_place(place)
        runs.append(trained(tmp_path / str(torch.device(place).type), place, 5, callbacks))
    assert_agree(*(dict(run.model.named_parameters()) for run in runs), within(device, 1e-5))
    losses = [[log["loss"] for log in run.state.log_history if "loss" in log] for run in runs]
    assert_agree(*losses, 1e-4)
    at_place(device)
    again = trained(tmp_path / device.type, device, 5, callbacks, resume=str(tmp_path / device.type / "checkpoint-3"))
    assert_agree(*(dict(run.model.named_parameters()) for run in (runs[1], again)), 1e-12)


def test_low_rank(device, at_place, tmp_path):
    def optimizer(model):
        return htsr.LowRankAdamW(htsr.low_rank_groups(model, rank=8), lr=1e-3, gradients="project")

    runs = []
    for place in ("cpu", device):
        at_place(place)
        runs.append(trained(tmp_path / str(torch.device(place).type), place, 3, (), optimizer=optimizer))
    assert_agree(*(dict(run.model.named_parameters()) for run in runs), within(device, 1e-5))
