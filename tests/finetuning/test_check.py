"""What `htsr finetune --check` finds out: it is what the run does, and no weights are needed for it."""

import json
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import yaml
from htsr_cli.check import show
from htsr_cli.main import main

import htsr
from htsr.finetune import read_recipe
from htsr.finetuning.budget import CONTEXT, MOST, Budget, largest_batch
from htsr.finetuning.check import check, schedule_of
from htsr.finetuning.run_folder import resolved
from htsr.reporting.text import plain_console
from htsr.training.memory.plan import PROCESS, MemoryPlan
from tests.transformer import llama, word_tokenizer

pytest.importorskip("trl")

RECORDS = [
    {"prompt": " ".join(f"w{4 + (i + j) % 60}" for j in range(12)), "completion": " w5" + " w7" * (i % 9)}
    for i in range(40)
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model without weights, its tokenizer, and records."""
    folder = tmp_path_factory.mktemp("check")
    llama(4).save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    (folder / "model" / "model.safetensors").unlink()
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return folder


def recipe_file(work, path, **more):
    training = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "max_length": 16, **more.pop("training", {})}
    content = {
        "model": str(work / "model"),
        "output": str(path.parent / "run"),
        "data": {"train": str(work / "train.jsonl")},
        "method": "lora",
        "training": training,
    }
    path.write_text(yaml.safe_dump(content | more))
    return str(path)


def test_recipe_records_steps_and_memory_are_shown_and_nothing_is_written(work, tmp_path, capsys):
    path = recipe_file(work, tmp_path / "recipe.yaml", training={"warmup_steps": 3})
    assert main(["finetune", "--config", path, "--check", "--set", "lora.rank=4"]) == 0
    out, err = capsys.readouterr()
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]
    assert "htsr: " not in err
    assert read_recipe(path, {}, ["lora.rank=4"]) == read_recipe_of(tmp_path, out.partition("\nrecord 1")[0])
    seen = [line for line in out.splitlines() if "⟦" in line]
    assert len(seen) == 6  # a heading and a text each
    assert all(line.startswith("w") and "⟦ w5" in line and line.endswith("⟧") for line in seen[1::2])
    facts = dict(line.strip().split("   ", 1) for line in out.splitlines() if "   " in line.strip())
    assert facts["records"].strip() == "38 to train on, 2 held out"
    assert facts["steps"].strip() == "20 of 4 sequences: 2 epochs"
    assert facts["learning rate"].strip() == "0.0002, linear, 3 steps of warm-up"
    assert facts["memory"].strip().endswith("(main memory of this machine): it fits")


def read_recipe_of(folder, text):
    (folder / "shown.yaml").write_text(text)
    return read_recipe(str(folder / "shown.yaml"))


def test_all_refusals_are_told_and_the_rest_is_found_all_the_same(work, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "something").touch()
    path = recipe_file(work, tmp_path / "recipe.yaml", data={"train": str(work / "none.jsonl")})
    assert main(["finetune", "--config", path, "--check", "--format", "json", "--memory", "1500MB"]) == 2
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [sentence in err for sentence in found["refusals"]] == [True, True]
    assert "run is not empty; --resume goes on" in found["refusals"][0]
    assert "none.jsonl cannot be read" in found["refusals"][1]
    assert found["memory"]["total"] == sum(found["memory"][part] for part in htsr_parts())
    row = found["rows"][0]
    assert (row["budget_bytes"], row["budget_of"], row["largest_batch"]) == (1_500_000_000, "--memory", MOST)
    assert main(["finetune", "--config", path, "--check", "--memory", "1500MB"]) == 2
    assert "1,024 or more" in capsys.readouterr().out
    data = {"train": str(work / "train.jsonl")}
    (tmp_path / "run" / "something").unlink()
    path = recipe_file(work, tmp_path / "recipe.yaml", data=data, model="no/model")
    assert main(["finetune", "--config", path, "--check"]) == 1
    assert main(["finetune", "--config", path, "--memory", "1GB"]) == 2
    assert "--memory is for --check" in capsys.readouterr().err


def htsr_parts():
    from htsr.training.memory.plan import PARTS

    return PARTS


def test_memory_is_planned_for_the_device_that_is_named(work, tmp_path):
    """An accelerator checkpoints activations by default, and holds no process; the largest batch fits, the next not."""
    recipe = read_recipe(recipe_file(work, tmp_path / "recipe.yaml", sampling={"active": 1}))
    options = {"batch": 4, "sequence": 16, "dtype": "float32", "active_blocks": 1}
    here, there = (
        htsr.predict_memory(recipe.model, "lora", checkpointing=away, logits="fused" if away else "chunked", **options)
        for away in (False, True)
    )
    context = 1 << 29
    notes = check(replace(recipe, training=recipe.training | {"optim": "adafactor"}), memory=1 << 34).notes
    assert any(note.endswith("two moments; training.optim: adafactor may keep others") for note in notes), notes
    found = check(recipe, memory=round(1.07 * there.total) + context)
    assert (found.plan, found.largest_batch) == (there, 4)
    assert found.needed == found.budget.size
    from trl import SFTConfig

    for name in {"gradient_checkpointing", "activation_checkpointing"} & {f.name for f in fields(SFTConfig)}:
        own = replace(recipe, training=recipe.training | {name: False})
        assert check(own, memory=1 << 34).plan == htsr.predict_memory(
            recipe.model, "lora", checkpointing=False, logits="fused", **options
        )
    on_host = Budget(1 << 40, "main memory", is_host=True)
    assert on_host.needed(here) == round(1.07 * here.total) + PROCESS + here.weights


def plan(total):
    parts = {"gradients": 0, "optimizer": 0, "projectors": 0, "activations": 0, "logits": 0, "workspace": 0}
    return MemoryPlan("m", "full", "forward", total=total, weights=total, **parts, parameters=1, trainable=1)


@pytest.mark.parametrize(
    ("each", "batch", "most"),
    [(10**6, 1, 876), (10**8, 3, 8), (10**9, 8, 0), (1, 1, MOST), (1, 3 * MOST, 3 * MOST), (10**6, 3 * MOST, 876)],
)
def test_the_largest_batch_is_the_last_that_fits(each, batch, most):
    budget = Budget(10**9 + CONTEXT, "it", is_host=False)
    assert largest_batch(lambda size: plan(58 * 10**6 + size * each), batch, budget) == most


@pytest.mark.parametrize(
    "training",
    [
        {"num_train_epochs": 0.5, "gradient_accumulation_steps": 3, "dataloader_drop_last": True},
        {"max_steps": 7, "packing": True, "warmup_steps": 0.3},
        {"num_train_epochs": 2, "packing": True, "packing_strategy": "wrapped", "per_device_train_batch_size": 64},
    ],
)
def test_steps_are_those_of_the_trainer(work, tmp_path, training):
    from htsr.finetuning.arguments import training_arguments
    from htsr.finetuning.preflight import prepare_data
    from htsr.finetuning.trainer import FinetuneTrainer

    recipe = read_recipe(recipe_file(work, tmp_path / "recipe.yaml", method="full", training=training))
    arguments = training_arguments(recipe)
    prepared = prepare_data(recipe, arguments, False, lambda _: None)
    trainer = FinetuneTrainer(
        recipe=recipe,
        model=llama(1),
        args=arguments,
        processing_class=prepared.tokenizer,
        train_dataset=prepared.datasets(arguments)[0],
    )
    counted = trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())
    found = check(recipe).schedule
    assert found == schedule_of(arguments, len(trainer.train_dataset))
    assert found.steps == counted[-1]
    assert found.epochs == pytest.approx(found.steps / counted[1])
    assert found.warmup == arguments.get_warmup_steps(found.steps)


def test_the_check_tells_what_the_run_refuses_and_a_warm_up_without_end(work, tmp_path):
    more = {"method": "galore", "low_rank": {"rank": 4, "gradients": "update"}}
    recipe = read_recipe(recipe_file(work, tmp_path / "recipe.yaml", training={"warmup_steps": 20}, **more))
    found = check(recipe, memory=1 << 34)
    assert [sentence.partition(" take")[0] for sentence in found.refusals] == ["low_rank.gradients: update"]
    (told,) = [note for note in found.notes if "warmup_steps" in note]
    assert told.endswith("the learning rate rises for 20 steps, and the run has 20: it ends at 95 % of 2e-05")
    for training in ({"warmup_steps": 19}, {"warmup_steps": 20, "lr_scheduler_type": "constant"}):
        notes = check(replace(recipe, training=recipe.training | training), memory=1 << 34).notes
        assert not any("warmup_steps" in note for note in notes)


def test_a_narrow_terminal_folds_no_line_of_the_recipe(work, tmp_path, monkeypatch, capsys):
    recipe = read_recipe(recipe_file(work, tmp_path / "recipe.yaml"), {"output": " ".join(["runs/of a name"] * 9)})
    monkeypatch.setattr("htsr_cli.check.console", lambda: plain_console(width=40))
    show(SimpleNamespace(text=resolved(recipe), preview=None))
    assert yaml.safe_load(capsys.readouterr().out)["output"] == recipe.output
