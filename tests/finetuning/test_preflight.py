"""What is refused before a model is loaded, and what a run survives: cut labels, kills near the end, checkpoints."""

import dataclasses
import gc
import itertools
import json
import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save

import htsr
from htsr.finetuning.reading import read_recipe
from tests.training.runs import KilledError, killed_after
from tests.transformer import bert, llama, word_tokenizer

pytest.importorskip("trl")

LONG = [{"prompt": " ".join(["w5"] * 40), "completion": " w6"} for _ in range(8)]
SHORT = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2}"} for i in range(4, 20)]
CHAT = [{"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]}] * 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    llama(2).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def recipe_of(folder, model, train, *, evaluation=None, training=None, data=None, **more):
    """A recipe of three steps, written and read."""
    folder.mkdir(exist_ok=True)
    content = {"model": str(model), "output": str(folder / "run"), "method": "full", "spectra": False, **more}
    content["data"] = {"evaluation_share": 0.0, **(data or {})}
    for key, records in (("train", train), ("evaluation", evaluation)):
        if records is not None:
            (folder / f"{key}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            content["data"][key] = str(folder / f"{key}.jsonl")
    content["training"] = {
        "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "max_length": 32,
        "disable_tqdm": True, **(training or {}),
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return read_recipe(str(folder / "recipe.yaml"))


def finetune(recipe, **more):
    from htsr.finetuning.run import finetune

    return finetune(recipe, **more)


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test."""

    def load(*_args, **_kwargs):
        pytest.fail("a model is loaded")

    monkeypatch.setattr("htsr.finetuning.placing.load_model", load)


@pytest.mark.parametrize("packing", [{}, {"packing": True, "packing_strategy": "bfd"}])
def test_labels_that_are_all_cut_are_known_before_the_model_is_loaded(tmp_path, model, no_model, packing):
    recipe = recipe_of(tmp_path, model, LONG, training=packing)
    with pytest.raises(htsr.UsageError, match="max_length: at 32 tokens none of the 8 training records keeps a label"):
        finetune(recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("train", "training", "expected"),
    [
        (SHORT, {}, None),
        ([*SHORT[:6], *LONG[:2]], {}, "2 of 8 records are cut, 25% of the labels are lost; 2 keep none"),
        ([*SHORT[:6], *LONG[:2]], {"truncation_mode": "keep_end"}, "2 of 8 records are cut, 0% of the labels are lost"),
        ([*SHORT[:6], *LONG[:2]], {"packing": True, "packing_strategy": "wrapped"}, None),
        (
            [*SHORT[:6], *LONG[:2]],
            {"completion_only_loss": False},
            "2 of 8 records are cut, 19% of the labels are lost",
        ),
        ([{"text": " ".join(["w5"] * 63)}] * 4, {}, "4 of 4 records are cut, 50% of the labels are lost"),
    ],
)
def test_how_much_is_cut_is_said_and_is_what_trl_cuts(tmp_path, model, train, training, expected):
    from htsr.calibration.record_texts import as_dataset
    from htsr.finetuning.arguments import training_arguments
    from htsr.finetuning.preflight import prepare_data
    from htsr.finetuning.trainer import FinetuneTrainer

    said = []
    recipe = recipe_of(tmp_path, model, train, training=training)
    arguments = training_arguments(recipe)
    prepared = prepare_data(recipe, arguments, False, said.append)
    cuts = [sentence for sentence in said if "max_length" in sentence]
    assert cuts == [] if expected is None else expected in cuts[0]
    trainer = FinetuneTrainer(
        recipe=recipe,
        model=llama(2),
        args=arguments,
        processing_class=prepared.tokenizer,
        train_dataset=as_dataset(prepared.train),
    )
    from htsr.finetuning.labels import count_labels

    found = count_labels(prepared.train, prepared.tokenizer, arguments)
    labels = sum(label != -100 for row in trainer.train_dataset for label in row["labels"])
    assert labels == found.labels - found.lost


def test_bfloat16_on_a_processor_without_it_is_said(tmp_path, model, monkeypatch, caplog):
    from htsr.finetuning.arguments import training_arguments

    recipe = recipe_of(tmp_path, model, SHORT, training={"bf16": True})
    for capability, said in (("AVX512", 0), ("AVX2", 1)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        training_arguments(recipe)
        assert caplog.text.count("training.bf16: this processor has no instructions") == said


def test_held_out_records_that_are_all_cut_leave_the_model_saved(tmp_path, model, monkeypatch):
    """And by then the trained model and its optimizer are gone, when the saved one is loaded for the questions."""
    import htsr.finetuning.placing as module
    from htsr.finetuning.trainer import FinetuneTrainer

    alive, left, said = [], [], []
    load, make = module.load_model, FinetuneTrainer.create_optimizer

    def watched(*args, **kwargs):
        left.append(sum(reference() is not None for reference in alive))
        alive.append(weakref.ref(loaded := load(*args, **kwargs)))
        return loaded

    def made(self, *args, **kwargs):
        optimizer = make(self, *args, **kwargs)
        alive.append(weakref.ref(getattr(optimizer, "optimizer", optimizer)))
        return optimizer

    monkeypatch.setattr(module, "load_model", watched)
    monkeypatch.setattr(FinetuneTrainer, "create_optimizer", made)
    (tmp_path / "questions.jsonl").write_text(
        json.dumps({"question": "w5", "choices": ["w6", "w7"], "answer": 0}) + "\n"
    )
    data = {"multiple_choice": str(tmp_path / "questions.jsonl")}
    recipe = recipe_of(
        tmp_path, model, SHORT, evaluation=LONG, data=data, method="lisa", layerwise={"min_size": 8},
        sampling={"active": 1, "interval": 2}, training={"warmup_steps": 100},
    )  # fmt: skip
    gc.disable()  # nothing but the run's own clearing
    try:
        result = finetune(recipe, say=said.append)
    finally:
        gc.enable()
    assert left == [0, 0, 0]  # the last is the untrained one, which answers the questions after training
    assert len(alive) >= 3
    assert "eval_loss" not in result.metrics
    assert result.metrics["questions"] == 1
    assert "max_length 32: none of the 8 held-out records keeps a label" in said
    assert any("rises for 100 steps, and the run has 3: it ends at 2 % of 0.01" in sentence for sentence in said)
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("train", "more", "error", "message"),
    [
        (CHAT, {}, htsr.SourceError, "no chat template, with which messages are written"),
        ([{"text": "w5 w63"}] * 4, {"vocabulary": 60}, htsr.SourceError, "makes token 63 .* its embedding has 60 rows"),
        (SHORT, {"training": {"eval_strategy": "epoch"}}, htsr.UsageError, "training.eval_strategy wants held-out"),
        (SHORT, {"training": {"eval_on_start": True}}, htsr.UsageError, "training.eval_on_start wants held-out"),
        (
            SHORT,
            {"evaluation": LONG, "training": {"eval_strategy": "epoch"}},
            htsr.UsageError,
            "training.eval_strategy wants held-out",
        ),
        (SHORT, {"early_stopping": {}}, htsr.UsageError, "^early_stopping wants held-out"),
        (
            SHORT,
            {"training": {"load_best_model_at_end": True}},
            htsr.UsageError,
            "^training.load_best_model_at_end wants held-out",
        ),
        (SHORT, {"training": {"report_to": "tensorborad"}}, htsr.UsageError, r"training.report_to: tensorborad"),
        (
            SHORT,
            {"training": {"report_to": ["comet_ml"]}},
            htsr.MissingDependencyError,
            r"training.report_to: .*[cC]omet",
        ),
        (SHORT, {"training": {"use_liger_kernel": True}}, htsr.MissingDependencyError, "liger"),
        (SHORT, {"training": {"optim": "adamw"}}, htsr.UsageError, "training.optim: adamw is not a valid"),
        (SHORT, {"training": {"optim": "grokadamw"}}, htsr.MissingDependencyError, "training.optim: .*grokadamw"),
        (SHORT, {"training": {"lr_scheduler_type": "lineal"}}, htsr.UsageError, "training.lr_scheduler_type: "),
        (SHORT, {"training": {"bf16": True, "fp16": True}}, htsr.UsageError, "training: .*fp16"),
        (SHORT, {"training": {"deepspeed": "none.json"}}, htsr.HtsrError, r"training.*(deepspeed|none\.json)"),
        (SHORT, {"training": {"save_strategy": "sometimes"}}, htsr.UsageError, "training.save_strategy: sometimes"),
        (SHORT, {"model": "runs/typo"}, htsr.SourceError, "runs/typo is no file or folder here, nor in"),
        (SHORT, {"model": "./runs/typo"}, htsr.SourceError, "./runs/typo does not exist"),
        (SHORT, {"data": {"multiple_choice": "train"}}, htsr.UsageError, "holds records without question"),
        (SHORT, {"method": "lisa", "sampling": {"outliers": "none.json"}}, htsr.SourceError, "none.json is not a file"),
    ],
)
def test_what_can_be_known_is_known_before_the_model_is_loaded(tmp_path, model, no_model, train, more, error, message):
    more = dict(more)
    if "vocabulary" in more:
        llama(2, vocabulary=more.pop("vocabulary")).save_pretrained(tmp_path / "model")
        word_tokenizer().save_pretrained(tmp_path / "model")
        more["model"] = str(tmp_path / "model")
    if "multiple_choice" in more.get("data", {}):
        more["data"] = {"multiple_choice": str(tmp_path / "train.jsonl")}
    name = more.pop("model", model)
    with pytest.raises(error, match=message):
        finetune(recipe_of(tmp_path, name, train, **more))
    assert not (tmp_path / "run").exists()


def test_an_encoder_is_not_trained_to_predict_what_it_sees(tmp_path, no_model):
    bert().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(htsr.SourceError, match="is no causal language model of transformers, but an encoder"):
        finetune(recipe_of(tmp_path, tmp_path / "model", SHORT))


def test_a_file_is_no_output(tmp_path, model, no_model):
    (tmp_path / "file").write_text("")
    for output in ("file", "file/run"):
        with pytest.raises(htsr.UsageError, match=r"output: .* is a file"):
            finetune(recipe_of(tmp_path, model, SHORT, output=str(tmp_path / output)))


def test_a_start_that_failed_locks_nothing(tmp_path, model, monkeypatch):
    recipe = recipe_of(tmp_path, model, SHORT, spectra=True)
    with monkeypatch.context() as patched:
        patched.setattr("htsr.finetuning.methods.prepare", lambda *_args, **_kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finetune(recipe)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"recipe.yaml", "data.json"}
    (tmp_path / "run" / "spectra_before.npz").write_text("of another model")
    assert finetune(recipe).metrics["steps"] == 3
    with pytest.raises(htsr.UsageError, match="is not empty"):
        finetune(recipe)


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("method", ["full", "lisa"])
def test_killed_before_saving_no_step_is_trained_again(tmp_path, model, monkeypatch, method):
    more = {"sampling": {"active": 1, "interval": 2}} if method == "lisa" else {}
    recipe = recipe_of(tmp_path, model, SHORT, method=method, training={"save_steps": 2}, **more)
    run = tmp_path / "run"

    def killed(*_args, **_kwargs):
        raise KilledError

    with killed_after(2):  # with checkpoint-2
        finetune(recipe)
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-best")
    with monkeypatch.context() as patched:
        patched.setattr("htsr.finetuning.saving.save_model", killed)
        with pytest.raises(KilledError):
            finetune(recipe, resume=True)
    trained = weights(run / "checkpoint-3")
    assert not (run / "model.safetensors").exists()
    said = []
    result = finetune(recipe, resume=True, say=said.append)
    assert "going on from checkpoint-3" in said
    assert result.metrics["steps"] == 3
    assert all(torch.equal(trained[name], value) for name, value in weights(run).items())
    state = json.loads((run / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == 3
    assert result.metrics["train_loss"] == pytest.approx(sum(losses) / 3, abs=1e-3)  # of all three pieces
    assert not (run / "checkpoint-4").exists()
    monkeypatch.setattr("htsr.finetuning.placing.load_model", killed)
    assert finetune(recipe, resume=True).metrics == json.loads((run / "results.json").read_text())["metrics"]
    if method == "lisa":
        assert finetune(recipe, resume=True).coverage == result.coverage


def test_a_checkpoint_without_the_optimizers_state(tmp_path, model, no_model):
    recipe = recipe_of(tmp_path, model, SHORT)
    for step, files in itertools.product((2, 3), ("trainer_state.json", "model.safetensors")):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / files).write_text(json.dumps({"global_step": step}))
    with pytest.raises(htsr.SourceError, match="checkpoint-3 has no state of the optimizer"):
        finetune(recipe, resume=True)


def test_the_last_checkpoint_is_the_last_with_all_files(tmp_path):
    from htsr.finetuning.checkpoints import last_checkpoint

    for step, names in ((1, ("optimizer.pt", "scheduler.pt", "rng_state.pth")), (2, ("optimizer.pt",)), (3, ())):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        (folder / "model.safetensors").write_bytes(save({"w": torch.zeros(1)}))
        for name in names:
            torch.save({}, folder / name)
    assert last_checkpoint(tmp_path).step == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"training": {"learning_rate": 0.5}}, "training.learning_rate was 0.01 and is 0.5"),
        ({"training": {"weight_decay": 0.1}}, "training.weight_decay was not set and is 0.1"),
        ({"training": {"max_steps": 5}}, "training.max_steps was 3 and is 5"),
        ({"method": "lisa"}, 'method was "full" and is "lisa", sampling.active was not set and is 2'),
        ({"seed": 7}, "seed was 0 and is 7"),
        ({"layerwise": "llr"}, 'layerwise was "none" and is "llr"'),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_run_does_not_go_on_by_another_recipe(tmp_path, model, no_model, change, named, finished):
    run = tmp_path / "run"
    (run / "checkpoint-2").mkdir(parents=True)
    recipe = recipe_of(tmp_path, model, SHORT)
    content = json.dumps(dataclasses.asdict(recipe))
    (run / "recipe.json").write_text(content)
    if finished:  # as 0.1.0 left it
        (run / "recipe.json").unlink()
        (run / "results.json").write_text(json.dumps({"recipe": json.loads(content), "metrics": {}}))
    with pytest.raises(htsr.UsageError, match=named):
        finetune(recipe_of(tmp_path, model, SHORT, **change), resume=True)
    assert read_recipe(str(tmp_path / "recipe.yaml")).output == str(run)
    assert finished == (run / "results.json").exists()  # as it was


def test_the_folder_keeps_the_recipe_and_only_what_changes_no_weight_may_change(tmp_path, model, monkeypatch):
    recipe = recipe_of(tmp_path, model, SHORT, method="lisa", sampling={"active": 1})
    finetune(recipe)
    run = tmp_path / "run"
    assert read_recipe(str(run / "recipe.yaml")) == recipe
    trained = weights(run)
    said = []
    other = recipe_of(
        tmp_path, model, SHORT, method="lisa", sampling={"active": 1}, training={"save_steps": 1, "logging_steps": 2}
    )
    metrics = finetune(other, resume=True, say=said.append).metrics
    assert metrics["steps"] == 3
    assert not {"peak_mib", "predicted_mib", "seconds"} & metrics.keys()  # nothing was left to train
    assert "going on from checkpoint-3" in said
    assert "training by lisa, learning rate 0.01" in said
    assert read_recipe(str(run / "recipe.yaml")) == other
    assert all(torch.equal(trained[name], value) for name, value in weights(run).items())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_folder_of_an_older_version_names_no_learning_rate(tmp_path, model, method):
    from htsr.finetuning.run_folder import check_same_run, plain

    recipe = recipe_of(tmp_path, model, SHORT, method=method)
    recipe = dataclasses.replace(recipe, training={"max_steps": 3})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(plain(recipe) | {"training": {"max_steps": 3}}))
    if method == "full":
        check_same_run(recipe, tmp_path / "run", pytest.fail)
    else:
        with pytest.raises(htsr.UsageError, match=r"mix the two: training.learning_rate was 2e-05 and is 0.0002\. "):
            check_same_run(recipe, tmp_path / "run", pytest.fail)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, model):
    """A run killed after two steps, with checkpoint-2, and its recipe."""
    folder = tmp_path_factory.mktemp("stopped")
    recipe = recipe_of(folder, model, SHORT, training={"save_steps": 1, "save_total_limit": 1})
    with killed_after(2):
        finetune(recipe)
    assert (folder / "run" / "checkpoint-2").exists()
    return recipe


def test_a_run_does_not_go_on_with_other_data(stopped, no_model):
    path = Path(stopped.data.train)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[1:], lines[0]]))
    try:
        with pytest.raises(
            htsr.UsageError, match=r"began with other data.*: train, 16 records .* and now 16 records .*"
        ):
            finetune(stopped, resume=True)
    finally:
        path.write_text("".join(lines))


@pytest.mark.parametrize("how", ["cut", "empty", "gone"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
def test_a_spoiled_checkpoint_is_named(tmp_path, stopped, no_model, name, how):
    shutil.copytree(stopped.output, tmp_path / "run")
    recipe = dataclasses.replace(stopped, output=str(tmp_path / "run"))
    file = tmp_path / "run" / "checkpoint-2" / name
    content = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if how == "cut" else b"")
    said = {"optimizer.pt": "state of the optimizer", "model.safetensors": "weights of the model"}.get(name, name)
    message = f"checkpoint-2 has no {said}" if how == "gone" else f"checkpoint-2/{name} is damaged .*--resume goes on"
    with pytest.raises(htsr.SourceError, match=message):
        finetune(recipe, resume=True)


TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}</s>"


def test_an_end_of_text_and_a_chat_template_that_the_tokenizer_has_not(tmp_path):
    from transformers import PreTrainedTokenizerFast

    llama(2).save_pretrained(tmp_path / "model")
    inner = word_tokenizer().backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(tmp_path / "model")
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    recipe = recipe_of(
        tmp_path, tmp_path / "model", CHAT,
        training={"eos_token": "</s>", "chat_template_path": str(tmp_path / "chat.jinja"), "max_steps": 1},
    )  # fmt: skip
    said = []
    assert finetune(recipe, say=said.append).metrics["steps"] == 1
    (told,) = [sentence for sentence in said if sentence.startswith("messages: ")]
    assert told.startswith("messages: every token has a label, those of system prompts and questions too")
    assert told.endswith("a template with {% generation %}, which that of " + f"{tmp_path / 'model'} lacks")
    assert (tmp_path / "run" / "chat_template.jinja").read_text() == TEMPLATE
    text = recipe_of(tmp_path, tmp_path / "model", SHORT, output=str(tmp_path / "text"), training={"eos_token": "</s>"})
    assert finetune(text).metrics["steps"] == 3


@pytest.mark.parametrize(
    ("train", "more", "message"),
    [
        (SHORT, {"training": {"eos_token": "<end>"}}, "training.eos_token: .* has no token '<end>'"),
        (
            CHAT,
            {"training": {"chat_template_path": "none.jinja"}},
            "chat_template_path: none.jinja cannot be read: .*No",
        ),
        (CHAT, {"training": {"chat_template_path": "org/model"}}, "org/model is no .jinja or .j2 file"),
        (SHORT, {"training": {"assistant_only_loss": True}}, "assistant_only_loss is for chats"),
        (CHAT, {"training": {"assistant_only_loss": True}}, "may name a template with {% generation %}, which that"),
        (SHORT, {"method": "galore", "low_rank": {"rank": 999}}, "low_rank.rank: no matrix of .* can have rank 999"),
        (SHORT, {"method": "lisa", "sampling": {"active": 3}}, "sampling.active is 3, and .* has 2 blocks to draw"),
        (
            SHORT,
            {"method": "galore", "low_rank": {"rank": 4, "gradients": "update"}},
            "update takes one .* take project",
        ),
        (
            SHORT,
            {
                "method": "apollo",
                "low_rank": {"rank": 4, "gradients": "update"},
                "training": {"gradient_accumulation_steps": 2, "max_grad_norm": 0},
            },
            "update takes one backward a step and cannot clip: take keep, or",
        ),
        (SHORT, {"method": "gum", "low_rank": {"rank": 8}}, "gum.active is 2, and is below the 2 blocks of"),
        ([*SHORT, {"text": "w5"}], {}, "train.jsonl, line 17: text, while line 1 has prompt and completion"),
        ([{"chosen": "w5", "rejected": "w6"}], {}, "holds preferences .*: TRL's DPOTrainer trains on them"),
        ([*CHAT, SHORT[0]], {}, "line 9: prompt and completion, while line 1 has messages"),
        (
            [{"instruction": "w5", "response": "w6"}],
            {},
            "this one has instruction, response; data.columns in a recipe gives fields these names",
        ),
    ],
)
def test_what_was_known_only_of_the_loaded_model_is_known_before(tmp_path, model, no_model, train, more, message):
    more = {**more, "training": dict(more.get("training", {}))}
    if "assistant_only_loss" in more["training"] and train is CHAT:
        (tmp_path / "chat.jinja").write_text(TEMPLATE)
        more["training"]["chat_template_path"] = str(tmp_path / "chat.jinja")
    with pytest.raises(htsr.HtsrError, match=message):
        finetune(recipe_of(tmp_path, model, train, **more))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"method": "galore", "training": {"optim": "sgd"}}, "training.optim has no meaning for the method galore"),
        ({"method": "owlore", "training": {"optim_args": "x=1"}}, "training.optim_args has no meaning"),
        (
            {"method": "galore", "low_rank": {"gradients": "update"}, "layerwise": "llr"},
            "low_rank.gradients: update steps before layerwise",
        ),
    ],
)
def test_what_a_recipe_cannot_mean(tmp_path, model, more, message):
    with pytest.raises(htsr.UsageError, match=message):
        recipe_of(tmp_path, model, SHORT, **more)


def test_tempbalance_measures_once_an_epoch(tmp_path, model, monkeypatch):
    from htsr.finetuning import trainer

    seen = []
    original = trainer.layerwise
    monkeypatch.setattr(trainer, "layerwise", lambda *a, **k: seen.append((a[2].interval, k)) or original(*a, **k))
    training = {"gradient_accumulation_steps": 3}  # 16 records, 2 a batch: 8 batches
    rates = {"policy": "tempbalance", "min_size": 8}
    assert finetune(recipe_of(tmp_path, model, SHORT, layerwise=rates, training=training)).metrics["steps"] == 3
    assert seen == [(3, {"total_steps": 3})]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"method": "lora", "layerwise": {"*.lora_b": 16}}, r"'\*\.lora_b'; the nearest is \*\.lora_B"),
        ({"method": "lora", "layerwise": {"norm": 2}}, "'norm' matches nothing that trains: all of it is frozen"),
        ({"method": "lora", "layerwise": {"embed": 0.1}}, "'embed' .* frozen; what lora.modules_to_save names trains"),
        ({"method": "full", "layerwise": {"embed": 1}}, "changes nothing: all that trains has the multiplier 1"),
        ({"method": "lora", "layerwise": {"*.lora_B": 16, "embed": 3}}, "'embed' matches nothing that trains"),
        ({"method": "lisa", "layerwise": {"mlp.*": 2, "head": 3}}, "'head' matches nothing that trains"),
        ({"method": "lisa", "layerwise": "llr"}, r"layerwise changes nothing: .* 50 eigenvalues \(min_size\)"),
        ({"method": "full", "layerwise": {"score": None, "attn.*": 2}}, r"a policy has no attn\.\*"),
    ],
)
def test_rates_of_what_does_not_train_are_refused_before_a_model_is_loaded(tmp_path, model, no_model, more, message):
    more = {"sampling": {"active": 1}} | more if more["method"] == "lisa" else more
    with pytest.raises(htsr.UsageError, match=message):
        finetune(recipe_of(tmp_path, model, SHORT, **more))


def test_what_is_told_of_a_run(tmp_path, model, capsys):
    from htsr_cli.main import main

    recipe_of(tmp_path, model, SHORT)
    for more in ([], ["--resume"]):
        assert main(["finetune", "--config", str(tmp_path / "recipe.yaml"), *more]) == 0
        told = capsys.readouterr()
        lines = dict(
            re.split(" {2,}", line.strip(), maxsplit=1) for line in told.out.splitlines() if "  " in line.strip()
        )
        assert "peak of" not in lines
        assert lines["peak memory"].endswith(("MiB (resident, whole process)", "MiB (accelerator, training)"))
        assert lines["trainable parameters"] == f"{sum(p.numel() for p in llama(2).parameters()):,}"
        assert ("the train loss is the mean over all steps" in told.err) == bool(more)
        assert "questions" not in told.err
