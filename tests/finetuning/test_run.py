import itertools
import json
import math
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
import yaml
from htsr_cli.main import main
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import htsr
from htsr import meeting
from htsr.calibration.loading import load_model
from htsr.calibration.multiple_choice import log_likelihoods, multiple_choice_accuracy
from htsr.calibration.records import read_records
from htsr.finetuning.reading import FOLDER, read_recipe
from tests.training.runs import killed_after
from tests.transformer import llama, word_tokenizer

pytest.importorskip("trl.trainer.sft_trainer")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    llama(4).save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    random = np.random.default_rng(0)
    texts = [" ".join(f"w{4 + (i + j) % 60}" for j in range(12)) for i in random.integers(0, 60, 40)]
    lines = [{"text": text} for text in texts]
    questions = [{"question": "w5 w6", "choices": ["w7", "w8 w9"], "answer": int(i % 2)} for i in range(9)]
    for name, records in (("train", lines), ("questions", questions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def recipe_file(work, output, method, **more):
    training = {"max_steps": 7, "save_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    training |= {"logging_steps": 2, "max_length": 32, "disable_tqdm": True} | more.pop("training", {})
    content = {
        "model": str(work / "model"),
        "output": str(output),
        "method": method,
        "data": {"train": str(work / "train.jsonl"), "evaluation_share": 0.1},
        "spectra": False,
        "training": training,
    }
    if method == "lisa by matrix":
        content |= {"method": "lisa", "sampling": {"unit": "matrix", "strategy": "gradient_norm", "interval": 2}}
    if method in ("lisa", "owlore"):
        content["sampling"] = {"active": 1, "interval": 2, "threshold": 3.0}
    if method == "apollo":
        content["low_rank"] = {"scaled_by": "tensor", "gradients": "update", "refresh_every": 2}
        training |= {"max_grad_norm": 0, "learning_rate": 1e-3}
    if method == "gum":
        content["gum"] = {"active": 1, "base": "muon", "strategy": "owlore", "threshold": 3.0}
    if method in ("galore", "owlore", "gum"):
        content["low_rank"] = {"rank": 8, "scale": 1.0, "refresh_every": 2}
    path = output.parent / f"{output.name}.yaml"
    path.write_text(yaml.safe_dump(content | more))
    return str(path)


@pytest.mark.parametrize(
    ("method", "layerwise"),
    [
        ("full", "none"),
        ("lora", {"*.lora_B": 16}),
        ("qlora", {"*.lora_B": 16}),
        ("lisa", {"min_size": 8, "interval": 3, "ramp": 2, "active_fraction": 1.0}),
        ("owlore", {"mlp.*": 2}),
        ("galore", {"policy": "alphadecay", "min_size": 8}),
        ("apollo", "none"),
        ("gum", "llr"),
        ("lisa by matrix", "none"),
    ],
)
def test_killed_and_resumed_is_uninterrupted(work, tmp_path, method, layerwise):
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    more = {"layerwise": layerwise, "training": {"weight_decay": 0.1}}
    whole = recipe_file(work, tmp_path / "whole", method, **more)
    assert main(["finetune", "--quiet", "--config", whole]) == 0
    broken = recipe_file(work, tmp_path / "broken", method, **more)
    with killed_after(5):
        main(["finetune", "--quiet", "--config", broken])
    assert main(["finetune", "--quiet", "--config", broken]) == 2  # not into a folder with a run in it
    assert main(["finetune", "--quiet", "--config", broken, "--resume"]) == 0
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    start = load_file(work / "model" / "model.safetensors")
    for name, timed in (("whole", 7), ("broken", 4)):  # of the broken run 3 steps were an earlier process's
        metrics = json.loads((tmp_path / name / "results.json").read_text())["metrics"]
        assert (metrics["steps"], metrics["timed_steps"]) == (7, timed)
        assert metrics["seconds"] / metrics["seconds_per_step"] == pytest.approx(timed)
        card = (tmp_path / name / "README.md").read_text()
        assert ("s a step, of the last 4 steps, since the run went on" in card) == (timed < 7)
    assert a.keys() == b.keys() == start.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    moved = {name for name in a if not torch.equal(a[name], start[name])}
    assert moved
    if method in ("lisa", "owlore"):
        results = json.loads((tmp_path / "whole" / "results.json").read_text())
        trained = {row["name"] for row in results["coverage"] if row["intervals"]}
        assert {".".join(name.split(".")[:3]) for name in moved if ".layers." in name} == trained
    assert ("model.embed_tokens.weight" in moved) == (method in ("full", "galore", "apollo", "gum"))
    saved = torch.load(next((tmp_path / "whole").glob("checkpoint-7")) / "optimizer.pt", weights_only=True)
    found = {group.get("multiplier", 1.0) for group in saved["param_groups"]}
    if method in ("lora", "qlora", "owlore"):
        assert found == {1.0, *map(float, layerwise.values())}
    assert (len(found) > 1) == (layerwise != "none")
    state = json.loads((tmp_path / "whole" / "checkpoint-7" / "trainer_state.json").read_text())
    logged = any("layerwise/multiplier_median" in log for log in state["log_history"])
    assert logged == (layerwise != "none")


@pytest.mark.parametrize(
    ("method", "rounding", "more"),
    [
        ("full", "kahan", {}),
        ("lisa", "master", {"sampling": {"active": 1, "interval": 2, "frozen_state": "offload"}}),
        ("galore", "stochastic", {"layerwise": {"min_size": 8}}),
    ],
)
def test_weights_in_bfloat16_are_rounded_as_the_recipe_says_also_after_a_resume(work, tmp_path, method, rounding, more):
    more = {"dtype": "bfloat16", "rounding": rounding, **more}
    assert main(["finetune", "--quiet", "--config", recipe_file(work, tmp_path / "whole", method, **more)]) == 0
    broken = recipe_file(work, tmp_path / "broken", method, **more)
    with killed_after(5):
        main(["finetune", "--quiet", "--config", broken])
    assert main(["finetune", "--quiet", "--config", broken, "--resume"]) == 0
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    saved = torch.load(next((tmp_path / "whole").glob("checkpoint-7")) / "optimizer.pt", weights_only=True)
    assert {group["rounding"] for group in saved["param_groups"]} == {rounding}
    kept = {"master": "master", "kahan": "compensation"}.get(rounding)
    assert all(kept in one for one in saved["state"].values() if kept)
    if method != "galore":
        assert all(one["exp_avg"].dtype == torch.bfloat16 for one in saved["state"].values())
    assert json.loads((tmp_path / "whole" / "results.json").read_text())["metrics"]["rounding"] == rounding
    assert f"| rounding | {rounding} |" in (tmp_path / "whole" / "README.md").read_text()


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("owlore", {"low_rank": {"rank": 8, "gradients": "project"}, "dtype": "bfloat16", "rounding": "master"}),
        ("lisa", {"training": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}}),
        (
            "lora",
            {"sampling": {"active": 1, "interval": 2}, "lora": {"rank": 4}, "layerwise": {"*.lora_B": 16}},
        ),
    ],
)
def test_frozen_weights_in_host_memory_train_alike_also_after_a_resume(work, tmp_path, capsys, method, more):
    """On the device, and elsewhere until it is killed; then ``lora`` goes on there, the others on the device."""
    outcomes = []
    other = "disk" if method == "lisa" else "host"
    for where in ("device", other):
        path = recipe_file(work, tmp_path / where, method, frozen_weights=where, **json.loads(json.dumps(more)))
        if where == other:
            with killed_after(5):
                main(["finetune", "--config", path])
            place = "in host memory" if other == "host" else "on disk"
            assert f"blocks live {place} and compute on the CPU" in capsys.readouterr().err
            if method != "lora":  # as whoever finds that there is room
                again = json.loads(json.dumps(more))
                path = recipe_file(work, tmp_path / where, method, frozen_weights="device", **again)
        assert main(["finetune", "--quiet", "--config", path, *["--resume"][: where == other]]) == 0
        card = (tmp_path / where / "README.md").read_text()
        assert ("| frozen_weights | host |" in card) == (method == "lora" and where == other)
        results = json.loads((tmp_path / where / "results.json").read_text())
        outcomes.append((load_file(tmp_path / where / "model.safetensors"), results["metrics"], results["coverage"]))
    (a, metrics, coverage), (b, its_metrics, its_coverage) = outcomes
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert metrics["eval_loss"] == its_metrics["eval_loss"]
    assert coverage == its_coverage


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "galore"])
def test_frozen_weights_are_those_of_sampled_blocks(work, tmp_path, capsys, method):
    path = recipe_file(work, tmp_path / "run", method, frozen_weights="host")
    assert main(["finetune", "--config", path]) == 2
    assert "frozen_weights: host is for blocks that are sampled" in capsys.readouterr().err


def test_frozen_weights_are_not_compiled(work, tmp_path, capsys):
    training = {"max_steps": 1, "torch_compile": True}
    path = recipe_file(work, tmp_path / "run", "lisa", frozen_weights="host", training=training)
    assert main(["finetune", "--config", path]) == 2
    assert "leave training.torch_compile out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("lora", {}),
        ("lisa", {"dtype": "bfloat16", "rounding": "master", "frozen_weights": "disk"}),
    ],
)
def test_training_stops_early_and_the_best_model_is_saved_also_after_a_resume(work, tmp_path, method, more):
    """Of a loss that falls the largest is the first: that is the best here, and the second one after it is the end."""
    training = {"max_steps": 12, "save_steps": 2, "greater_is_better": True, "logging_steps": 100}
    more = {"early_stopping": {"patience": 2}, "training": training, **more}
    recipe_file(work, tmp_path / "whole", method, **json.loads(json.dumps(more)))
    assert main(["finetune", "--quiet", "--config", str(tmp_path / "whole.yaml")]) == 0
    broken = recipe_file(work, tmp_path / "broken", method, **json.loads(json.dumps(more)))
    with killed_after(5):
        main(["finetune", "--quiet", "--config", broken])
    (tmp_path / "broken").rename(tmp_path / "moved")
    assert main(["finetune", "--quiet", "--config", broken, "--output", str(tmp_path / "moved"), "--resume"]) == 0
    # killed after the last step, before the model was saved
    shutil.copytree(tmp_path / "whole", tmp_path / "late", ignore=lambda *_: ["results.json"])
    (tmp_path / "late" / "model.safetensors").unlink()
    late = [*("finetune", "--quiet", "--config", broken), "--output", str(tmp_path / "late"), "--resume"]
    assert main(late) == 0
    file = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    best = load_file(tmp_path / "whole" / "checkpoint-2" / file)
    state = json.loads((tmp_path / "whole" / "checkpoint-6" / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    assert losses[2] > losses[4] > losses[6]
    for run in ("whole", "moved", "late"):
        metrics = json.loads((tmp_path / run / "results.json").read_text())["metrics"]
        assert (metrics["steps"], metrics["best_step"]) == (6, 2)
        assert (metrics["before_eval_loss"], metrics["eval_loss"]) == pytest.approx((losses[0], losses[2]), rel=1e-6)
        saved = load_file(tmp_path / run / ("adapter" if method == "lora" else "") / file)
        assert all(torch.equal(saved[name], best[name]) for name in best)


def test_what_rounding_to_nearest_loses_is_said_once(work, tmp_path, caplog):
    """The weights of the small model are about 0.02: their half unit in the last place is above 1e-5, nearly all."""
    for name, more, said in (
        ("nearest", {"rounding": "nearest"}, True),
        ("optim", {"training": {"optim": "adamw_torch"}}, True),
        ("default", {}, False),
        ("wide", {"dtype": "float32", "rounding": "nearest"}, False),
    ):
        more = {"dtype": "bfloat16", **more}
        more["training"] = {"learning_rate": 1e-5, "max_steps": 1, **more.get("training", {})}
        caplog.clear()
        assert main(["finetune", "--config", recipe_file(work, tmp_path / name, "full", **more)]) == 0
        words = [line for line in caplog.messages if line.startswith("rounding: nearest")]
        assert len(words) == said
        metrics = json.loads((tmp_path / name / "results.json").read_text())["metrics"]
        assert metrics.get("rounding") == ("nearest" if said else None if name == "wide" else "stochastic")
        state = torch.load(next((tmp_path / name).glob("checkpoint-1")) / "optimizer.pt", weights_only=True)
        assert ("rounding" in state["param_groups"][0]) == (name == "default")
        if said:
            share = float(words[0].split(" % of them")[0].rsplit(" ", 1)[1])
            assert 50 < share <= 100


def test_adapters_train_in_float32_whatever_the_rounding(work, tmp_path):
    path = recipe_file(work, tmp_path / "run", "lora", dtype="bfloat16", rounding="kahan", training={"max_steps": 1})
    assert main(["finetune", "--quiet", "--config", path]) == 0
    assert "rounding" not in json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    state = torch.load(tmp_path / "run" / "checkpoint-1" / "optimizer.pt", weights_only=True)
    assert all(one["exp_avg"].dtype == torch.float32 for one in state["state"].values())


def test_data_are_alone_on_stdout_and_words_are_few(work, tmp_path, capsys):
    training = {"disable_tqdm": None, "logging_steps": 2, "max_steps": 5}
    path = recipe_file(work, tmp_path / "run", "full", training=training)
    assert main(["finetune", "--config", path, "--format", "json"]) == 0
    out, err = capsys.readouterr()
    content = json.loads(out)
    assert content["rows"][0]["steps"] == 5
    losses = [(int(step), float(loss)) for step, loss in re.findall(r"^step (\d+)/5  .*  loss (\S+)  lr", err, re.M)]
    assert [step for step, _ in losses] == [step for step, _ in content["losses"]] == [1, 2, 4, 5]
    np.testing.assert_allclose([loss for _, loss in losses], [loss for _, loss in content["losses"]], rtol=1e-3)
    before, after = (content["rows"][0][key] for key in ("before_eval_loss", "eval_loss"))
    assert f"before training  evaluation loss {before:.4g}\n" in err
    assert f"after training  evaluation loss {after:.4g}\n" in err
    assert not re.search(r"\r|entropy|it/s", err)  # no bar in a log, and of the twenty keys those of the line
    assert len(err.splitlines()) < 16
    path = recipe_file(work, tmp_path / "quiet", "full", training=training)
    assert main(["finetune", "--config", path, "--format", "csv", "-q"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert err == ""


def test_an_interrupted_run_says_how_it_goes_on(work, tmp_path, capsys, monkeypatch):
    from htsr.finetuning.trainer import FinetuneTrainer

    original = FinetuneTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(FinetuneTrainer, "training_step", step)
    path = recipe_file(work, tmp_path / "run", "full")
    assert main(["finetune", "--config", path]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "htsr: interrupted; --resume goes on from checkpoint-3"


def test_evaluating_leaves_the_gradients_of_qlora_alone(work):
    pytest.importorskip("bitsandbytes")
    model = load_model(str(work / "model"), dtype=torch.bfloat16, causal=True, four_bit=True)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(model, config)
    tokens = torch.arange(4, 20)[None]

    def gradients():
        model.train()
        model(input_ids=tokens, labels=tokens).loss.backward()
        found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        return found

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=tokens)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))
    assert all(gradient.abs().max() > 0 for gradient in before)


@pytest.mark.parametrize("size", [24, 8])
def test_the_shipped_recipe_for_one_gpu_runs(work, tmp_path, size):
    content = yaml.safe_load((FOLDER / f"one_gpu_{size}gb.yaml").read_text())
    del content["training"]["num_train_epochs"]
    content["training"] |= {"max_steps": 5, "eval_steps": 2, "max_length": 32, "gradient_accumulation_steps": 2}
    content["training"] |= {"learning_rate": 1e-2, "warmup_steps": 0, "disable_tqdm": True}
    content |= {"model": str(work / "model"), "output": str(tmp_path / "run")}
    content["data"] = {"train": str(work / "train.jsonl"), "evaluation_share": 0.1}
    content["sampling"] |= {"active": 1, "interval": 2, "threshold": 3.0}
    content["low_rank"] |= {"rank": 8, "refresh_every": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    assert main(["finetune", "--quiet", "--config", str(tmp_path / "recipe.yaml")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["metrics"]["steps"] == 5
    start, found = (load_file(folder / "model.safetensors") for folder in (work / "model", tmp_path / "run"))
    moved = {
        ".".join(k.split(".")[:3]) for k in start if ".layers." in k and not torch.equal(start[k].bfloat16(), found[k])
    }
    assert moved == {row["name"] for row in results["coverage"] if row["intervals"]}


def test_report_of_a_run(work, tmp_path, capsys, monkeypatch):
    tracked, hub = [], []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            tracked.append(logs)

    class Hub:
        def create_repo(self, name, **options):
            hub.append((name, options))
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, *, folder_path, ignore_patterns, **options):
            files = {str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file()}
            hub.append(({f for f in files if not any(fnmatch(f, p) for p in ignore_patterns)}, options))

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    training = {"report_to": "tensorboard", "push_to_hub": True, "hub_model_id": "mine", "hub_revision": "first"}
    path = recipe_file(work, tmp_path / "run", "owlore", spectra=True, seed=3, training=training)
    content = yaml.safe_load(Path(path).read_text())
    content["data"]["multiple_choice"] = str(work / "questions.jsonl")
    Path(path).write_text(yaml.safe_dump(content))
    assert main(["finetune", "--quiet", "--config", path]) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "run"
    results = json.loads((folder / "results.json").read_text())["metrics"]
    assert f"{results['eval_loss']:.4g}" in out
    assert results["questions"] == 9
    assert 0 < results["eval_loss"] < math.log(64) + 1
    card = (folder / "README.md").read_text()
    assert "(OwLore)" in card
    assert "is 3." in card
    assert "| alpha |" in card
    before, after = (htsr.Analysis.load(folder / f"spectra_{when}.npz") for when in ("before", "after"))
    assert {row.name for row in before} == {row.name for row in after}
    assert before.summary()["norm"] != after.summary()["norm"]
    table = pandas.read_csv(folder / "spectra.csv").set_index("name")
    assert len(table) == len(before.rows)
    start, end = (load_file(f / "model.safetensors") for f in (work / "model", folder))
    for name, relative in table.relative.items():  # how far each matrix moved, by the definition
        one, other = start[f"{name}.weight"].double(), end[f"{name}.weight"].double()
        assert relative == pytest.approx(((one - other).norm() / one.norm()).item(), rel=1e-5, abs=1e-12)
    told = json.loads((folder / "results.json").read_text())
    most = table.relative.nlargest(3)
    assert [(m["name"], m["relative"]) for m in told["moved"][:3]] == list(most.items())
    lines = [line.split() for line in out.partition("what moved most")[2].splitlines()]
    assert [line[0] for line in lines if line[-1:] == ["‖ΔW‖/‖W‖"]] == list(most.index)
    alphas = table.alpha_delta.abs().drop(most.index).nlargest(3)
    assert {m["name"] for m in told["moved"][3:]} == set(alphas[alphas > 0].index)
    assert sum(line[-1:] == ["α"] for line in lines) == len(told["moved"]) - 3
    assert {"before_eval_loss", "predicted_mib", "peak_mib", "seconds"} <= results.keys()
    assert results["before_accuracy"] != results["accuracy"] or results["before_eval_loss"] > results["eval_loss"]
    assert [step for step, _ in told["losses"]] == [1, 2, 4, 6, 7]  # each other step, the first and the last
    logged = [log for log in tracked if "loss" in log]
    assert [log["loss"] for log in logged] == [loss for _, loss in told["losses"]]
    assert all({"entropy", "mean_token_accuracy", "grad_norm"} <= log.keys() for log in logged)  # trackers have all
    (name, made), (pushed, options) = hub
    assert (name, made["exist_ok"]) == ("mine", True)
    assert (options["repo_id"], options["revision"]) == ("me/mine", "first")
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "results.json"} <= pushed
    assert not any("checkpoint" in file for file in pushed)
    kept_back = {"data.json", "accuracy_before.json", "training_args.bin"}  # which name places of this machine, too
    assert not kept_back & pushed
    assert kept_back <= {path.name for path in folder.iterdir()}

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = multiple_choice_accuracy(model, word_tokenizer(), read_records(str(work / "questions.jsonl")))
    assert results["accuracy"] == expected.accuracy


def test_log_likelihoods_are_the_sums_of_the_definition(work):
    model, tokenizer = llama(2), word_tokenizer()
    pairs = [("w5 w6 w7", " w8"), ("w9", " w10 w11 w12"), ("w4 w5", " w6 w7")]
    expected = []
    for prompt, continuation in pairs:
        total = 0.0
        ids = tokenizer(prompt + continuation)["input_ids"]
        for i in range(len(prompt.split()), len(ids)):
            with torch.no_grad():
                total += model(torch.tensor([ids[:i]])).logits[0, -1].double().log_softmax(-1)[ids[i]].item()
        expected.append(total)
    for size in (1, 2, 8):
        np.testing.assert_allclose(log_likelihoods(model, tokenizer, pairs, batch_size=size), expected, rtol=1e-5)
    records = [{"question": "w5", "choices": ["w7", "w8 w9"], "answer": i} for i in (0, 1, 1)]
    said = log_likelihoods(model, tokenizer, [("Question: w5\nAnswer:", f" {c}") for c in ("w7", "w8 w9")])
    found = multiple_choice_accuracy(model, tokenizer, records)
    assert found.accuracy == pytest.approx((1 if said.argmax() == 0 else 2) / 3)
    assert found.per_character == pytest.approx((1 if (said / [2, 5]).argmax() == 0 else 2) / 3)


@pytest.mark.parametrize("form", ["completion", "messages", "question"])
def test_forms_of_data(work, tmp_path, form):
    words = [f"w{i}" for i in range(4, 64)]
    records = {
        "completion": [{"prompt": f"{a} {b}", "completion": f" {b}"} for a, b in itertools.pairwise(words)],
        "messages": [
            {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": a}]} for a in words
        ],
        "question": [{"question": a, "choices": [a, "w4"], "answer": 0, "id": 1} for a in words],
    }[form]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    path = recipe_file(work, tmp_path / "run", "full", training={"max_steps": 2})
    content = yaml.safe_load(Path(path).read_text())
    content["data"] = {"train": str(data), "limit": 20}
    if form == "messages":
        tokenizer = word_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
        llama(2).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        content["model"] = str(tmp_path / "model")
    Path(path).write_text(yaml.safe_dump(content))
    from htsr.finetuning.run import finetune

    result = finetune(read_recipe(path))
    assert result.metrics["steps"] == 2
    assert result.metrics["eval_loss"] > 0


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True, "init_lora_weights": "gaussian"}])
def test_options_of_lora_are_in_the_merged_model(work, tmp_path, options):
    path = recipe_file(work, tmp_path / "run", "lora", lora={"rank": 4, "options": options})
    assert main(["finetune", "--quiet", "--config", path]) == 0
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert options.items() <= config.items()
    base, merged = (load_model(str(folder), causal=True) for folder in (work / "model", tmp_path / "run"))
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter"))
    tokens = torch.arange(4, 20)[None]
    with torch.no_grad():
        expected, found = adapted(input_ids=tokens).logits, merged(input_ids=tokens).logits
        with adapted.disable_adapter():
            assert (adapted(input_ids=tokens).logits - expected).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("score", ["alpha", None])
def test_adapters_sampled_by_block_with_ranks_by_score(work, tmp_path, score):
    path = recipe_file(
        work,
        tmp_path / "run",
        "lora",
        spectra=True,
        lora={"rank": 2, "score": score},
        sampling={"active": 1, "interval": 100, "strategy": "alpha"},
    )
    assert main(["finetune", "--quiet", "--config", path]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    (drawn,) = (row["name"] for row in results["coverage"] if row["intervals"])
    start, end = (load_file(folder / "model.safetensors") for folder in (work / "model", tmp_path / "run"))
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved
    assert all(name.startswith(f"{drawn}.") for name in moved)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(("gradients", "norm"), [("project", 0.2), ("project", 0), ("update", 0)])
def test_released_gradients_train_alike(work, tmp_path, gradients, norm):
    ends = {}
    for way in ("keep", gradients):
        low_rank = {"rank": 8, "scale": 1.0, "refresh_every": 2, "method": "svd", "gradients": way}
        training = {"max_grad_norm": norm, "max_steps": 4, "learning_rate": 1e-3, "logging_steps": 1}
        path = recipe_file(work, tmp_path / way, "galore", low_rank=low_rank, training=training)
        assert main(["finetune", "--quiet", "--config", path]) == 0
        ends[way] = load_file(tmp_path / way / "model.safetensors")
    start = load_file(work / "model" / "model.safetensors")
    moved = max((ends["keep"][name] - start[name]).abs().max() for name in start)
    apart = max((ends["keep"][name] - ends[gradients][name]).abs().max() for name in start)
    assert apart < (0.5 if norm else 1e-3) * moved  # the norm that is clipped is that in the subspaces
    if norm:
        norms = {}
        for way in ends:
            state = json.loads((tmp_path / way / "checkpoint-4" / "trainer_state.json").read_text())
            norms[way] = [entry["grad_norm"] for entry in state["log_history"] if "grad_norm" in entry]
        assert len(norms["project"]) == 4
        assert all(norm < ours < full for ours, full in zip(norms["project"], norms["keep"], strict=True))


def test_released_gradients_resume(work, tmp_path):
    ends = []
    for name in ("whole", "broken"):
        low_rank = {"rank": 8, "scale": 1.0, "refresh_every": 2, "gradients": "project"}
        training = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
        path = recipe_file(work, tmp_path / name, "owlore", low_rank=low_rank, training=training)
        if name == "broken":
            with killed_after(5):
                main(["finetune", "--quiet", "--config", path])
        assert main(["finetune", "--quiet", "--config", path, "--resume"]) == 0
        ends.append(load_file(tmp_path / name / "model.safetensors"))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(
    "training", [{"gradient_accumulation_steps": 2, "max_grad_norm": 0}, {"max_grad_norm": 1.0}, {"max_grad_norm": 0}]
)
def test_update_during_backward_is_refused_where_it_cannot_be(work, tmp_path, capsys, training):
    low_rank = {"rank": 8, "gradients": "update", "embedding": "freeze"}
    path = recipe_file(work, tmp_path / "run", "galore", low_rank=low_rank, training=training)
    possible = training == {"max_grad_norm": 0}
    assert main(["finetune", "--quiet", "--config", path]) == (0 if possible else 2)
    assert possible or "low_rank.gradients: update takes one backward" in capsys.readouterr().err
    if possible:
        start, end = (load_file(folder / "model.safetensors") for folder in (work / "model", tmp_path / "run"))
        resting = {name for name in start if torch.equal(start[name], end[name])}
        assert resting == {name for name in start if "embed" in name or "head" in name}


def test_a_rank_that_does_not_come_is_told_before_there_is_a_group(work, tmp_path, monkeypatch):
    """accelerate begins the group with the training arguments, and torch waits half an hour for it."""
    from htsr.finetuning.run import finetune

    recipe = read_recipe(recipe_file(work, tmp_path / "out", "full"))
    port = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(meeting, "PATIENCE", 0.2)
    with pytest.raises(htsr.UsageError, match=r"^rank 0 is in htsr finetune and waits for rank 1: "):
        finetune(recipe)
    assert not torch.distributed.is_initialized()


def test_what_qlora_cannot_be_is_refused_before_anything(work, tmp_path, capsys):
    path = recipe_file(work, tmp_path / "run", "qlora", training={"fsdp": True, "fsdp_config": {"version": 2}})
    assert main(["finetune", "--quiet", "--config", path]) == 2
    assert "method: qlora keeps a copy of the model in 4 bits on each process" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
