import re
import shlex
import sys

import pytest
import yaml
from htsr_cli.main import main

import htsr
from htsr.finetune import read_recipe
from htsr.finetuning.arguments import training_arguments
from htsr.finetuning.reading import FOLDER
from tests.transformer import llama

pytest.importorskip("trl")

MINIMAL = {"model": "m", "output": "o", "data": {"train": "t.jsonl"}}


def write(folder, content):
    path = folder / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def test_defaults_and_numbers(tmp_path):
    recipe = read_recipe(write(tmp_path, MINIMAL))
    assert (recipe.method, recipe.lora.rank, recipe.sampling, recipe.low_rank) == ("lora", 8, None, None)
    text = yaml.safe_dump(MINIMAL) + "training:\n  learning_rate: 1e-4\n  weight_decay: 1\n"
    assert read_recipe(write(tmp_path, text)).training == {"learning_rate": 1e-4, "weight_decay": 1}
    text = yaml.safe_dump(MINIMAL) + "method: galore\nlow_rank: {scale: 1}\n"
    assert read_recipe(write(tmp_path, text)).low_rank.scale == 1.0


def test_all_that_is_wrong_is_told_at_once(tmp_path, monkeypatch):
    content = {"plot_loss": True, "seed": "one", "data": {"val_size": 0.1, "train": {"path": "p"}}, "lora": {"r": 8}}
    content["training"] = {"sequence_len": 8, "learning_rate": -1, "max_steps": "many", "hub_strategy": "checkpoint"}
    with pytest.raises(htsr.UsageError) as told:
        read_recipe(write(tmp_path, MINIMAL | content))
    lines = str(told.value).splitlines()
    starts = (
        "recipe.yaml: unknown key plot_loss", "recipe.yaml: seed is a whole number", "recipe.yaml: lora: unknown key r",
        "recipe.yaml: data: unknown key val_size", "recipe.yaml: data: train: unknown key path",
        "training.sequence_len is no", "training.max_steps is 'many'", "training.hub_strategy: ",
        "training.learning_rate is -1",
    )  # fmt: skip
    assert len(lines) == len(starts)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "trl.trainer.sft_config", None)
        with pytest.raises(htsr.MissingDependencyError, match="fine-tuning needs TRL"):
            read_recipe(write(tmp_path, MINIMAL))
    assert all(any(line.startswith(start) for line in lines) for start in starts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": "m"}, "recipe.yaml: unknown key modle; did you mean model?"),
        ({"plot_loss": True}, "recipe.yaml: unknown key plot_loss; leave it out: the losses are in"),
        (
            {"data": {"train": {"path": "p", "type": "t"}}},
            "unknown keys path (here source), type (leave it out: the form",
        ),
        ({"data": {"train": "t", "evaluatoin": "e"}}, "recipe.yaml: data: unknown key evaluatoin; did you mean"),
        ({"data": {}}, "data: the key train is missing"),
        ({"data": "t.jsonl"}, "data is a section of keys, not 't.jsonl'"),
        ({"method": "dora"}, "recipe.yaml: method is one of full, lora, qlora, "),
        ({"seed": "one"}, "seed is a whole number, not 'one'"),
        ({"spectra": 1}, "spectra is true or false, not 1"),
        ({"sampling": {"active": 2.5}}, "sampling: active is a whole number, not 2.5"),
        ({"method": "full", "sampling": {}}, "the section sampling has no meaning for the method full"),
        ({"seed": -1}, "seed is -1; it is at least 0 and below 4.29497e+09"),
        ({"model": ""}, "model is empty"),
        ({"data": {"train": "t", "limit": 0}}, "data.limit is 0; it is at least 1"),
        ({"data": {"train": "t", "evaluation_share": 1}}, "data.evaluation_share is 1.0; it is at least 0 and below 1"),
        ({"sampling": {"active": 0}}, "sampling.active is 0; it is at least 1"),
        ({"sampling": {"interval": -3}}, "sampling.interval is -3; it is at least 1"),
        ({"sampling": {"threshold": float("nan")}}, "sampling.threshold is nan; it is above 0 and finite"),
        ({"method": "apollo", "low_rank": {"gradients": "project"}}, "low_rank.gradients: project drops the whole"),
        ({"method": "apollo", "low_rank": {"moments": "rotate"}}, "rotate has no meaning under a random projection"),
        ({"method": "galore", "low_rank": {"scaled_by": "tensor"}}, "scaled_by is for the method apollo, not for gal"),
        ({"method": "galore", "low_rank": {"method": "random"}}, "random is for the method apollo with moments: keep"),
        ({"method": "lisa", "sampling": {"embedding": "lowrank"}}, "lowrank is for the method owlore, and lisa has no"),
        (
            {"sampling": {"embedding": "lowrank"}, "lora": {"modules_to_save": ["embed"]}},
            "lowrank is for the method owl",
        ),
        ({"sampling": {"embedding": "train"}}, "sampling.embedding: train has no meaning for the method lora, where"),
        ({"lora": {"rank": 10**9}}, "lora.rank is 1000000000; no matrix of any model has one above 65,536"),
        ({"lora": {"rank": 10**25}}, "lora.rank is a number beyond reason; no matrix"),
        (
            {"training": {"max_steps": 10**30}},
            "training.max_steps is a number beyond reason; no run comes to more than",
        ),
        ({"training": {"num_train_epochs": 1e30}}, "training.num_train_epochs is 1e+30; no run comes to more than"),
        ({"method": "lisa", "sampling": {"unit": "matrix", "embedding": "sampled"}}, "take sampling.unit: block"),
        (
            {"method": "lisa", "sampling": {"unit": "matrix"}, "frozen_weights": "host"},
            "unit: matrix trains parts of all",
        ),
        ({"method": "lisa", "sampling": {"strategy": "gradient_norm", "top": True}}, "sampling.top takes the most"),
        (
            {
                "method": "owlore",
                "sampling": {"strategy": "gradient_norm", "unit": "matrix"},
                "low_rank": {"gradients": "project"},
            },
            "gradient_norm draws by gradients, which low_rank.gradients: project drops",
        ),
        ({"low_rank": {"rank": 0}}, "low_rank.rank is 0; it is at least 1"),
        ({"low_rank": {"scale": float("inf")}}, "low_rank.scale is inf; it is above 0 and finite"),
        ({"method": "lora", "lora": {"rank": 0}}, "lora.rank is 0; it is at least 1"),
        ({"method": "lora", "lora": {"dropout": 1.0}}, "lora.dropout is 1.0; it is at least 0 and below 1"),
        ({"method": "lora", "lora": {"score": "alhpa"}}, "lora.score: rows have no metric 'alhpa'"),
        ({"method": "lora", "spectra": False, "lora": {"score": "alpha"}}, "lora.score needs spectra: true"),
        ({"spectra": False, "sampling": {"strategy": "erg"}}, "sampling.strategy erg needs spectra: true"),
        (
            {"method": "lora", "lora": {"options": {"use_dora": "yes"}}},
            "lora.options.use_dora is 'yes', and LoraConfig",
        ),
        ({"method": "lora", "lora": {"options": {"use_dora": True, "megatron_config": {"a": 1}}}}, "lora.options: "),
        ({"training": {"learning_rate": "fast"}}, "training.learning_rate is 'fast', and SFTConfig wants float"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate is nan; it is a finite number"),
        ({"training": {"learning_rate": -1}}, "training.learning_rate is -1; it is at least 0"),
        ({"training": {"per_device_train_batch_size": 0}}, "training.per_device_train_batch_size is 0; it is above 0"),
        ({"training": {"per_device_train_batch_size": 2.5}}, "training.per_device_train_batch_size is 2.5, and SFT"),
        ({"training": {"max_length": 0}}, "training.max_length is 0; it is above 0"),
        ({"training": {"max_steps": 0}}, "training.max_steps is 0; it is at least 1, or -1 for num_train_epochs"),
        ({"training": {"num_train_epochs": -1}}, "training.num_train_epochs is -1; it is above 0"),
        ({"training": {"packing": "yes"}}, "training.packing is 'yes', and SFTConfig wants bool"),
        ({"training": {"report_to": {"wandb": True}}}, "training.report_to is a section of keys, and SFTConfig wants"),
        ({"training": {"adam_beta1": 1}}, "training.adam_beta1 is 1; it is at least 0 and below 1"),
        ({"method": "lora", "lora": {"options": {"r": 4}}}, "lora.options.r is set by lora.rank"),
        ({"method": "lora", "lora": {"options": {"use_dorra": True}}}, "did you mean use_dora"),
        ({"method": "lora", "lora": {"options": {"init_lora_weights": "pisa"}}}, "init_lora_weights is 'pisa'; it is"),
        ({"method": "lora", "lora": {"modules_to_save": "embed"}}, "modules_to_save is a list, not 'embed'"),
        ({"method": "lora", "lora": {"targets": ["q_proj", 1]}}, "targets[1] is a text, not 1"),
        ({"method": "lora", "layerwise": "llr"}, "which the method lora does not train"),
        (
            {"method": "owlore", "layerwise": "ends"},
            "ends sets the learning rates of embedding and head, which sampling.embedding: freeze",
        ),
        ({"method": "lisa", "layerwise": "ends"}, "does not train: take sampling.embedding: train, or leave layerwise"),
        (
            {"method": "full", "layerwise": "alphadecay"},
            "alphadecay shares out weight decay, which is 0 where training",
        ),
        ({"layerwise": {"*.lora_B": 16, "score": "alpha"}}, "recipe.yaml: layerwise: a policy has no *.lora_B"),
        ({"layerwise": {"score": None, "embedings": 5}}, "a policy has no embedings; did you mean embeddings?"),
        (
            {"layerwise": {"embedings": "max"}},
            "embedings is 'max', and a pattern has a number, its multiplier; a policy",
        ),
        ({"layerwise": {}}, "layerwise is an empty section: name a policy"),
        ({"layerwise": ["llr"]}, "layerwise is one of none, ends, llr, tempbalance, alphadecay, not a list"),
        ({"layerwise": {"policy": "lrr"}}, "layerwise: unknown policy 'lrr'"),
        ({"method": "full", "layerwise": {"bounds": [5, 1]}}, "layerwise: bounds are (s1, s2), finite numbers"),
        ({"method": "full", "layerwise": {"bounds": [1, 10**400]}}, "layerwise: bounds are (s1, s2), finite numbers"),
        ({"method": "full", "layerwise": {"exclude": 5}}, "layerwise: exclude is a tuple of patterns, not 5"),
        ({"method": "full", "layerwise": {"windows": {"rows": 0, "count": 1}}}, "layerwise.windows: windows need rows"),
        ({"method": "full", "layerwise": {"windows": {"row": 64, "count": 1}}}, "layerwise.windows has no 'row'"),
        ({"layerwise": {"score": None, "embeddings": 5}}, "trains only where lora.modules_to_save has them"),
        (
            {"method": "lisa", "layerwise": {"embeddings": 5}},
            "layerwise sets the learning rates of embedding and head, which sampling.embedding: freeze does not train",
        ),
        (
            {"method": "galore", "layerwise": {"spectrum": "momentum"}},
            "layerwise.spectrum: momentum of low-rank matrices are in their subspace only",
        ),
        ({"training": {"learning_rat": 1}}, "training.learning_rat is no argument of SFTConfig; did you mean learning"),
        ({"training": {"seed": 1}}, "training.seed is set by seed"),
        ({"training": {"dataset_text_field": "body"}}, "training.dataset_text_field is set by data.text_field"),
        ({"rounding": "up"}, "rounding is one of stochastic, kahan, master, nearest, not 'up'"),
        (
            {"method": "lisa", "rounding": "kahan", "training": {"optim": "sgd"}},
            "rounding: kahan is for htsr's AdamW, and training.optim asks for another optimizer",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, change, message):
    with pytest.raises(htsr.UsageError) as error:
        read_recipe(write(tmp_path, MINIMAL | change))
    assert message in str(error.value)


def test_layerwise_rates_of_what_trains(tmp_path):
    for more in ({"layerwise": {"*.lora_B": 16}}, {"method": "lisa", "layerwise": {"attn.*": 2, "head": 1.5}}):
        assert read_recipe(write(tmp_path, MINIMAL | more)).layerwise == more["layerwise"]
    ends = {"layerwise": {"score": None, "embeddings": 5}}
    for more in ({"method": "full"}, {"lora": {"modules_to_save": ["lm_head"]}}):
        assert read_recipe(write(tmp_path, MINIMAL | ends | more)).layerwise == ends["layerwise"]
    for more in ({"method": "galore"}, {"method": "lisa", "sampling": {"embedding": "train"}}):
        assert read_recipe(write(tmp_path, MINIMAL | more | {"layerwise": "ends"})).layerwise == "ends"


@pytest.mark.parametrize(
    ("method", "rate"), [("full", 2e-5), ("lora", 2e-4), ("qlora", 2e-4), ("lisa", 2e-5), ("galore", 2e-5)]
)
def test_a_learning_rate_that_is_not_named_is_the_methods(tmp_path, method, rate):
    from trl import SFTConfig

    from htsr.finetuning.arguments import training_arguments
    from htsr.finetuning.model_card import model_card
    from htsr.finetuning.recipe import USUAL_RATE
    from htsr.finetuning.result import Result

    recipe = read_recipe(write(tmp_path, MINIMAL | {"method": method}))
    assert recipe.training == {"learning_rate": rate}
    assert training_arguments(recipe).learning_rate == rate
    assert f"| training.learning_rate | {rate} |" in model_card(recipe, Result("o", {}, ()), None)
    assert SFTConfig.learning_rate == USUAL_RATE


def test_no_recipe(tmp_path):
    with pytest.raises(htsr.SourceError, match=r"neither a file nor one of the recipes .*one_cpu"):
        read_recipe(str(tmp_path / "none.yaml"))
    with pytest.raises(htsr.SourceError, match="is no YAML"):
        read_recipe(write(tmp_path, "a: [1"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {max_length: 16}\nseed: 1\ntraining: {max_steps: 3}\n", "training stands .*, in lines 5 and 7"),
        ("method: lora\nmethod: full\n", "method stands twice in one section, in lines 5 and 6: write it once"),
        ("training:\n  max_steps: 3\n  'max_steps': 3\n", "max_steps stands twice in one section, in lines 6 and 7"),
        ("layerwise: {mlp: 2, attn: 3, mlp: 4}\n", "mlp stands twice in one section, in line 5"),
        ("training: &a {max_steps: 3}\nlora:\n  options: {<<: *a, <<: *a, r: 4, r: 4}\n", "r stands twice"),
    ],
)
def test_what_stands_twice_is_refused_with_its_lines(tmp_path, text, message):
    with pytest.raises(htsr.SourceError, match=f"recipe.yaml is no YAML: {message}"):
        read_recipe(write(tmp_path, yaml.safe_dump(MINIMAL) + text))
    with pytest.raises(htsr.UsageError, match="max_steps stands twice"):
        read_recipe(write(tmp_path, MINIMAL), None, ["training={max_steps: 3, max_steps: 4}"])


def test_a_method_from_the_command_line_leaves_the_sections_of_others_out(tmp_path):
    path = write(tmp_path, MINIMAL | {"sampling": {"active": 3}, "low_rank": {"rank": 4}})
    recipe = read_recipe(path, {"method": "lisa", "output": "elsewhere"})
    assert (recipe.method, recipe.output, recipe.low_rank, recipe.sampling.active) == ("lisa", "elsewhere", None, 3)


@pytest.mark.parametrize(
    ("method", "overrides", "left", "active"),
    [
        ("lora", [], "sampling, low_rank, frozen_weights", None),
        ("lora", ["sampling.active=3"], "sampling, low_rank", 3),
        ("full", [], "sampling, low_rank, frozen_weights", None),
        ("lisa", [], "low_rank", 2),
    ],
)
def test_another_method_takes_nothing_of_a_recipe_that_it_does_not_need(caplog, method, overrides, left, active):
    recipe = read_recipe("one_gpu_8gb", {"method": method}, overrides)
    assert (recipe.sampling and recipe.sampling.active) == active
    assert recipe.frozen_weights == ("host" if active else "device")
    assert f"method {method}: left out what the recipe says for the method owlore: {left}\n" in caplog.text


def test_sampled_adapters_stay_sampled_by_another_method_of_adapters(tmp_path, caplog):
    path = write(tmp_path, MINIMAL | {"sampling": {"active": 3}})
    assert [read_recipe(path, {"method": name}).sampling.active for name in ("lora", "qlora")] == [3, 3]
    assert not caplog.text
    with pytest.raises(htsr.UsageError, match="frozen_weights: host is for blocks that are sampled"):
        read_recipe(path, {"method": "full", "frozen_weights": "host"})


def test_the_output_of_a_user_is_one_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    path = write(tmp_path, MINIMAL | {"output": "~/runs/x"})
    recipe = read_recipe(path, None, ["training.use_cpu=true"])
    assert recipe.output == str(tmp_path / "runs/x")
    assert training_arguments(recipe).output_dir == recipe.output
    assert read_recipe(path, {"output": "~/y"}) == read_recipe(path, None, ["output=~/y"])


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_hold(path):
    assert read_recipe(path.stem) == read_recipe(str(path))


def test_commands_in_shipped_recipes_run(tmp_path, capsys):
    llama(8).save_pretrained(tmp_path)
    commands = re.findall(
        r"^# +(htsr memory .*?)(?: +#.*)?$", "\n".join(p.read_text() for p in FOLDER.glob("*.yaml")), re.MULTILINE
    )
    assert commands
    for command in commands:
        arguments = shlex.split(command)[1:]
        arguments[1] = str(tmp_path)  # for a model of the hub
        assert main(arguments) == 0
        assert "owlore" in capsys.readouterr().out


def test_a_recipe_has_keys_and_values(tmp_path):
    (tmp_path / "a.yaml").write_text("- model\n- data\n")
    with pytest.raises(htsr.SourceError, match="holds no keys and values"):
        read_recipe(str(tmp_path / "a.yaml"))
