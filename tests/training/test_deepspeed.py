"""DeepSpeed's ZeRO in two gloo processes: the multipliers of one process, to the last digit; resuming; recipes.

ZeRO-1 and -2 show the inner optimizer one flattened group at a time, ZeRO-3 one group's partition and no parameters of
the model at all. Both ranks see the same batch, as in test_distributed.
"""

import gc
import json
import multiprocessing
import os
import socket

import pytest
import torch
import yaml
from safetensors.torch import load_file

import htsr
from tests.processes import PRELOADED, in_two_processes, leave, leave_with, one_thread, start
from tests.training.models import TinyLM, loss
from tests.training.models import train as train_alone
from tests.transformer import save_work

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: CI installs it for this file alone")

os.environ.setdefault("DS_ACCELERATOR", "cpu")
multiprocessing.set_forkserver_preload([*PRELOADED, "deepspeed", "htsr.finetuning.run", "htsr.finetuning.trainer"])

STEPS = 7
POLICY = {"interval": 3, "ramp": 2}
KINDS = ("zero-1", "zero-2", "zero-3", "zero-3, made in parts")


def layerwise(model):
    return htsr.layerwise(torch.optim.AdamW(model.parameters(), lr=3e-3), model, **POLICY)


def settings(stage):
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }


def engine_of(kind):
    import deepspeed

    config = settings(int(kind[5]))
    if "parts" in kind:
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = TinyLM()
    else:
        model = TinyLM()
    return deepspeed.initialize(model=model, optimizer=layerwise(model), config=config)[0]


def train(engine, steps):
    found = []
    for step in steps:
        engine.backward(loss(engine, step))
        engine.step()
        found.append(htsr.multipliers(engine.optimizer))
    return found


def monitored(model, backward, step, folder):
    """What a monitor logs on a process, without its time."""
    logged = []
    monitor = htsr.SpectralMonitor(every=2, share=float("inf"), null=False)
    monitor._begin(model, 0, folder, lambda values, _: logged.append(values))  # as the Trainer does
    for number in range(4):
        backward(loss(model, number))
        step()
        monitor.step()
    monitor.close()
    return [{name: value for name, value in values.items() if "share_of_time" not in name} for values in logged]


def low_rank(model):
    return htsr.LowRankAdamW(htsr.low_rank_groups(model, 4), lr=1e-3)


def sampled(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    htsr.LayerSampler(model, active=1).attach(optimizer)
    return optimizer


def refusal(make, stage):
    """What a step of ZeRO on the optimizer of `make` says."""
    import deepspeed

    model = TinyLM()
    engine = deepspeed.initialize(model=model, optimizer=make(model), config=settings(stage))[0]
    engine.backward(loss(engine, 0))
    try:
        engine.step()
    except htsr.UsageError as error:
        return str(error)
    return ""


def be_of_two(rank):
    """Make this process one of two that speak through gloo alone."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}  # its shared memory has to be compiled first, which takes a minute


def _worker(rank, folder):
    be_of_two(rank)
    import deepspeed

    deepspeed.init_distributed(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, auto_mpi_discovery=False
    )
    results = {}
    for kind in KINDS:
        engine = engine_of(kind)
        first = train(engine, range(4))
        engine.save_checkpoint(str(folder / kind))
        whole = first + train(engine, range(4, STEPS))
        analysis = htsr.analyze(engine)
        alphas = {layer.name: layer.alpha for layer in analysis}
        resumed = engine_of(kind)
        resumed.load_checkpoint(str(folder / kind))
        results[kind] = {"whole": whole, "resumed": first + train(resumed, range(4, STEPS)), "alphas": alphas}
    for stage in (2, 3):
        model = TinyLM()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings(stage))[0]
        results[f"monitored, zero-{stage}"] = monitored(engine, engine.backward, engine.step, folder / f"run-{stage}")
    for make in (low_rank, sampled):
        for stage in (1, 2, 3):
            results[f"{make.__name__}, zero-{stage}"] = refusal(make, stage)
    leave_with(results, rank, folder)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return in_two_processes(_worker, tmp_path_factory.mktemp("zero"))


@pytest.fixture(scope="module")
def alone():
    model = TinyLM()
    optimizer = layerwise(model)
    found = []
    with one_thread():
        train_alone(model, optimizer, range(STEPS), after=lambda _: found.append(htsr.multipliers(optimizer)))
    return found, {layer.name: layer.alpha for layer in htsr.analyze(model)}


@pytest.mark.parametrize("kind", KINDS)
def test_multipliers_are_those_of_one_process(two_processes, alone, kind):
    assert alone[0][0] != alone[0][-1]
    for rank in two_processes:
        assert rank[kind]["whole"] == alone[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_repeats_the_uninterrupted_one(two_processes, kind):
    for rank in two_processes:
        assert rank[kind]["resumed"] == rank[kind]["whole"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_can_be_analyzed(two_processes, alone, kind):
    for rank in two_processes:
        assert rank[kind]["alphas"] == pytest.approx(alone[1], rel=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_monitor_finds_what_it_would_in_one_process(two_processes, stage, tmp_path):
    model = TinyLM()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        optimizer.step()
        optimizer.zero_grad()

    with one_thread():
        alone = monitored(model, torch.Tensor.backward, step, tmp_path)
    assert [values["spectrum/age/embed"] for values in alone] == [0, 0]
    for rank in two_processes:
        found = rank[f"monitored, zero-{stage}"]
        assert found == [pytest.approx(values, rel=1e-4) for values in alone]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("what", ["low_rank", "sampled"])
def test_methods_that_need_whole_matrices_refuse_flat_ones(two_processes, what, stage):
    for rank in two_processes:
        assert "DeepSpeed's ZeRO and FSDP1" in rank[f"{what}, zero-{stage}"]


RECIPES = {
    "full": {"method": "full", "layerwise": {"min_size": 8}},
    "lora": {"method": "lora", "lora": {"rank": 4}},
}
REFUSED = {
    2: {"method": "lisa", "sampling": {"active": 1}},
    3: {"method": "galore", "low_rank": {"rank": 4}},
}


def recipe_file(folder, name, stage=None, **more):
    """A recipe that fine-tunes into the folder of this name, under ZeRO if there is a stage."""
    training = {"max_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_length": 32}
    training |= {"logging_steps": 100, "disable_tqdm": True}
    if stage is not None:
        auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_clipping"), "auto")
        (folder / f"{name}.json").write_text(json.dumps(settings(stage) | auto))
        training["deepspeed"] = str(folder / f"{name}.json")
    data = {"train": str(folder / "train.jsonl"), "evaluation_share": 0.1}
    recipe = {"model": str(folder / "model"), "output": str(folder / name), "data": data, "training": training, **more}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))


def _finetune(rank, folder, name, port):
    """One recipe in processes of its own, as `torchrun -m htsr.finetune` would start them; what a refusal says."""
    be_of_two(rank)
    gc.freeze()  # as in conftest.py
    os.environ.update(MASTER_PORT=str(port), LOCAL_WORLD_SIZE="2")
    from htsr.finetune import finetune, read_recipe

    try:
        finetune(read_recipe(f"{folder}/{name}.yaml"))
    except htsr.UsageError as error:
        (folder / f"{name}-{rank}.txt").write_text(str(error))
        os._exit(0)
    leave()


def finetune_in_two(folder, name):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start(_finetune, (folder, name, port), 2)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    save_work(folder)
    return folder


@pytest.mark.parametrize("method", RECIPES)
def test_a_recipe_ends_with_the_weights_of_data_parallel_training(work, method):
    for stage in (None, 2, 3):
        recipe_file(work, f"{method}-{stage}", stage, **RECIPES[method])
        finetune_in_two(work, f"{method}-{stage}")
    start = load_file(work / "model" / "model.safetensors")
    expected = work / f"{method}-None"
    weights = load_file(expected / "model.safetensors")
    assert any((weights[key] - start[key]).abs().max() > 1e-2 for key in start)
    for stage in (2, 3):
        output = work / f"{method}-{stage}"
        found = load_file(output / "model.safetensors")
        assert found.keys() == weights.keys()
        for key, value in weights.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4, msg=f"{key}, ZeRO-{stage}")
        theirs, ours = (json.loads((f / "results.json").read_text())["metrics"] for f in (expected, output))
        assert ours["trainable_parameters"] == theirs["trainable_parameters"]
        before = [htsr.Analysis.load(f / "spectra_before.npz").to_pandas() for f in (expected, output)]
        assert before[0].alpha.tolist() == pytest.approx(before[1].alpha.tolist(), nan_ok=True)


@pytest.mark.parametrize("stage", REFUSED)
def test_recipes_that_zero_cannot_run_are_refused_before_anything(work, stage):
    recipe_file(work, f"refused-{stage}", stage, **REFUSED[stage])
    finetune_in_two(work, f"refused-{stage}")
    for rank in range(2):
        said = (work / f"refused-{stage}-{rank}.txt").read_text()
        assert f"method: {REFUSED[stage]['method']} needs the model's own matrices" in said
    assert not (work / f"refused-{stage}").exists()
