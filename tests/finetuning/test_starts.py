"""Adapters that begin at more than a draw: made by PEFT, taken up again, and merged."""

import json
import re
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import yaml
from htsr_cli.main import main
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import htsr
from htsr.calibration.loading import load_model
from htsr.finetuning.adapters import adapter_config
from htsr.finetuning.chat import open_chat
from htsr.finetuning.recipe import Data, Lora, Recipe
from htsr.finetuning.starts import START, Start, begun, for_stored_weights, made_start
from tests.training.runs import killed_after
from tests.transformer import llama, save_work, word_tokenizer

pytest.importorskip("trl.trainer.sft_trainer")

RECORDS = [{"prompt": f"w{4 + i} w{5 + i}", "completion": " w6 w7 w8 w9 w10 w11 w12"} for i in range(30)]
TOKENS = torch.arange(4, 24)[None]
ARGUMENTS = SimpleNamespace(
    max_length=32, packing=False, packing_strategy="bfd", truncation_mode="keep_start", completion_only_loss=None
)


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize(
    ("start", "options"),
    [
        ("pissa", {}),
        ("pissa", {"use_dora": True}),
        ("pissa_niter_4", {"use_rslora": True}),
        ("olora", {}),
        ("corda", {"corda_config": {"corda_method": "kpm"}}),
        ("lora_ga", {}),
        ("eva", {"eva_config": {"rho": 1.5}}),
    ],
)
def test_adapters_begin_as_pefts_own_and_leave_the_model_as_it_is(tmp_path, start, options):
    if start == "corda":
        pytest.importorskip("attr")  # by which PEFT reads it
    lora = Lora(rank=4, options={"init_lora_weights": start, **options}, calibration_samples=20)
    recipe = Recipe(model="m", output="o", data=Data(train="t"), lora=lora)
    model = llama(2)
    original, before = deepcopy(model), logits(model)
    config = adapter_config(lora, model, None)
    state = torch.get_rng_state()
    found = made_start(recipe, model, config, word_tokenizer(), RECORDS, ARGUMENTS)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))
    found.save(tmp_path / START)
    adapted, again = (
        begun(m, config, Start.load(tmp_path / START), changed=start != "eva") for m in (model, deepcopy(original))
    )
    assert all(torch.equal(a, b) for a, b in zip(adapted.parameters(), again.parameters(), strict=True))
    torch.testing.assert_close(logits(adapted), before, rtol=1e-4, atol=1e-5)
    if start in ("pissa", "olora"):  # deterministic, and without data
        reference = get_peft_model(
            deepcopy(original), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=start)
        )
        for name, tensor in get_peft_model_state_dict(reference).items():
            torch.testing.assert_close(found.tensors[name], tensor, rtol=0, atol=0)
    with adapted.disable_adapter():
        moved = (logits(adapted) - before).abs().max()
    assert (moved > 1e-3) == (start != "eva")
    sizes = {len(a) for name, a in found.tensors.items() if ".lora_A." in name}
    assert (len(sizes) > 1) == (start == "eva")  # which gives ranks where the data have variance

    adapted.train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = logits(adapted)
    assert (after - before).abs().max() > 1e-3
    if start == "eva":
        return
    tensors, converted = for_stored_weights(get_peft_model_state_dict(adapted), found, adapted.peft_config["default"])
    converted.save_pretrained(tmp_path / "adapter")
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(original, tmp_path / "adapter")), after, rtol=1e-3, atol=1e-4
    )


def recipe_file(folder, name, **changes):
    training = {"max_steps": 5, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    content = {
        "model": str(folder / "model"),
        "output": str(folder / name),
        "data": {"train": str(folder / "train.jsonl")},
        "spectra": False,
        "training": training | {"max_length": 32, "report_to": "none"},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content | changes))
    return str(folder / f"{name}.yaml")


def check(folder):
    """The merged model is the model as it was with the adapter that lies beside it."""
    base, merged = (load_model(str(f), causal=True) for f in (folder.parent / "model", folder))
    before = logits(base)
    adapted = PeftModel.from_pretrained(base, str(folder / "adapter"))
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-3, atol=1e-4)
    assert (logits(merged) - before).abs().max() > 1e-2
    return merged, json.loads((folder / "adapter" / "adapter_config.json").read_text())


@pytest.mark.filterwarnings("error:You have requested .ensure_weight_tying.")  # nobody has, of a start
@pytest.mark.filterwarnings("error:The PEFT config.s .base_model_name_or_path. was renamed")  # nor was anything renamed
def test_a_start_from_weights_goes_on_as_it_was_with_an_embedding_that_trains_whole(tmp_path):
    save_work(tmp_path)
    llama(4, tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    lora = {"rank": 4, "targets": ["attn.*", "mlp.down"], "modules_to_save": ["embed"]}
    lora["options"] = {"init_lora_weights": "pissa", "use_dora": True}
    model_options = {"attn_implementation": "sdpa", "attention_dropout": 0.1}
    whole, broken = (
        recipe_file(tmp_path, name, lora=lora, model_options=model_options, dtype="auto")
        for name in ("whole", "broken")
    )
    assert main(["finetune", "--quiet", "--config", whole]) == 0
    with killed_after(3):
        main(["finetune", "--quiet", "--config", broken])
    assert main(["finetune", "--config", broken, "--resume"]) == 0  # quiet it would hide what is warned of
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        a, b = (load_file(tmp_path / run / name) for run in ("whole", "broken"))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    merged, config = check(tmp_path / "whole")
    assert (config["r"], config["init_lora_weights"], config["use_dora"]) == (8, True, True)
    assert config["base_model_name_or_path"] == str(tmp_path / "model")
    assert merged.config.attention_dropout == 0.1
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    start = load_file(tmp_path / "model" / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(merged.model.embed_tokens.weight, start)
    step = json.loads((tmp_path / "whole" / "checkpoint-5" / "adapter_config.json").read_text())
    assert "without" in step["base_model_name_or_path"]  # alone it would not fit the model as it is stored
    (tmp_path / "broken" / START).unlink()
    (tmp_path / "broken" / "results.json").unlink()
    assert main(["finetune", "--quiet", "--config", broken, "--resume"]) == 1


@pytest.mark.filterwarnings("error:Could not find a config file")  # of the base in a checkpoint, which is named as none
def test_adapters_that_are_not_merged_are_the_model_that_a_merged_run_leaves(tmp_path, capsys, monkeypatch):
    """By PEFT alone, in chat, in the spectra and answers after training, and as GGUF."""
    from transformers import AutoModelForCausalLM

    save_work(tmp_path)
    (tmp_path / "questions.jsonl").write_text('{"question": "w5", "choices": ["w6", "w7"], "answer": 0}\n' * 3)
    lora = {"rank": 4, "modules_to_save": ["head"], "options": {"init_lora_weights": "pissa", "use_dora": True}}
    data = {"train": str(tmp_path / "train.jsonl"), "multiple_choice": str(tmp_path / "questions.jsonl")}
    training = {"max_steps": 2, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    more = {"data": data, "spectra": True, "training": training | {"max_length": 32, "report_to": "none"}}
    monkeypatch.chdir(tmp_path)
    for name, merge in (("merged", True), ("alone", False)):
        path = recipe_file(tmp_path, name, lora=lora | {"merge": merge}, model="model", **more)
        assert main(["finetune", "--config", path]) == 0
        assert ("peft.AutoPeftModelForCausalLM.from_pretrained" in capsys.readouterr().err) == (not merge)
    merged, alone = tmp_path / "merged", tmp_path / "alone"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the adapter names its base by a path that holds here, too
    assert not (alone / "config.json").exists()
    assert not list(alone.glob("model*"))
    assert "library_name: peft" in (alone / "README.md").read_text()
    expected = logits(AutoModelForCausalLM.from_pretrained(merged))
    base = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    assert (expected - base).abs().max() > 1e-2
    for found in (AutoPeftModelForCausalLM.from_pretrained(alone), open_chat(str(alone)).model):
        torch.testing.assert_close(logits(found), expected, rtol=1e-3, atol=1e-4)
    a, b = (json.loads((folder / "results.json").read_text()) for folder in (merged, alone))
    assert a["metrics"]["accuracy"] == b["metrics"]["accuracy"]
    assert [one["name"] for one in a["moved"]] == [one["name"] for one in b["moved"]]
    assert [one["relative"] for one in a["moved"]] == pytest.approx([one["relative"] for one in b["moved"]], rel=1e-3)
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("import shutil, sys; shutil.copy(sys.argv[1] + '/model.safetensors', sys.argv[3])")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    assert main(["export", "--quiet", str(alone), "--gguf", str(tmp_path / "a.gguf")]) == 0
    own, theirs = load_file(tmp_path / "a.gguf"), load_file(merged / "model.safetensors")
    assert own.keys() == theirs.keys()
    assert all(torch.allclose(own[name], theirs[name], rtol=1e-3, atol=1e-4) for name in own)


def test_what_an_adapter_alone_cannot_keep_is_refused():
    for more, message in (
        ({"model": "a.gguf"}, "an adapter of a .gguf file could not be loaded again"),
        ({"model_options": {"rope_theta": 1e6}}, r"an adapter cannot keep model_options\.rope_theta"),
    ):
        with pytest.raises(htsr.UsageError, match=message):
            Recipe(**{"model": "m", "output": "o", "data": Data(train="t"), "lora": Lora(merge=False)} | more)


@pytest.mark.parametrize(
    ("method", "start", "rank"), [("lora", "eva", 4), ("lora", "lora_ga", 8), ("qlora", "loftq", 8)]
)
def test_a_start_from_data_or_four_bits_is_in_the_merged_model(tmp_path, method, start, rank):
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    save_work(tmp_path)
    path = recipe_file(
        tmp_path, "run", method=method, lora={"rank": 4, "options": {"init_lora_weights": start, "use_rslora": True}}
    )
    assert main(["finetune", "--quiet", "--config", path]) == 0
    _, config = check(tmp_path / "run")
    assert config["r"] == rank
    assert bool(config["rank_pattern"]) == (start == "eva")


@pytest.mark.parametrize(
    ("method", "start", "message"),
    [
        ("lora", "loftq", "loftq makes up for weights in 4 bits"),
        ("qlora", "pissa", "pissa changes the weights, which qlora keeps in 4 bits: take loftq or eva"),
        ("lora", "pisa", "is 'pisa'; it is true, gaussian, orthogonal, mica, or one of pissa"),
        ("lora", False, "init_lora_weights is False"),
        ("lora", "olora", "lora: .* cannot begin so with rank 40"),
        ("lora", "eva", "60 labels are wanted at a time, and the training records have 52"),
    ],
)
def test_what_cannot_begin_so_is_refused(tmp_path, capsys, method, start, message):
    save_work(tmp_path)
    lora = {"rank": 40 if start == "olora" else 30 if start == "eva" else 4, "calibration_samples": 4}
    path = recipe_file(tmp_path, "run", method=method, lora=lora | {"options": {"init_lora_weights": start}})
    assert main(["finetune", "--config", path]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_damaged_start_is_named(tmp_path):
    (tmp_path / START).write_bytes(b"not")
    with pytest.raises(htsr.SourceError, match=r"adapter_start\.safetensors cannot be read"):
        Start.load(tmp_path / START)
