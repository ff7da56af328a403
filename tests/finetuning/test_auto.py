"""`htsr finetune --method auto`: the first of the candidates whose run fits, with what the recipe says itself."""

import json
from pathlib import Path

import pytest
import yaml
from htsr_cli.main import main

import htsr
from htsr.finetuning.arguments import training_arguments
from htsr.finetuning.auto import CANDIDATES, choose
from htsr.finetuning.budget import Budget
from htsr.finetuning.memory import predicted_memory
from htsr.finetuning.reading import read_recipe
from tests.transformer import llama, word_tokenizer

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    """A recipe of a model without weights."""
    folder = tmp_path_factory.mktemp("auto")
    llama(4).save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    (folder / "model" / "model.safetensors").unlink()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": f"w{4 + i} w5"}) + "\n" for i in range(40)))
    content = {
        "model": str(folder / "model"),
        "output": str(folder / "run"),
        "data": {"train": str(folder / "train.jsonl")},
        "method": "full",
        "training": {"per_device_train_batch_size": 4, "max_length": 16, "use_cpu": True},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "recipe.yaml")


def needed(recipe):
    return Budget(0, "", is_host=True).needed(predicted_memory(recipe, training_arguments(recipe)))


def test_the_first_that_fits_is_taken_with_what_the_recipe_says(recipe_file):
    first = choose(recipe_file, memory=2**40)
    assert first.recipe.method == CANDIDATES[0].method
    wanted = [choose(recipe_file, memory=needed(first.recipe)), choose(recipe_file, memory=needed(first.recipe) - 1)]
    assert wanted[0].recipe == first.recipe
    assert needed(wanted[1].recipe) < needed(first.recipe)
    assert "reports/arena" in first.why
    assert "would not fit" in wanted[1].why
    other = choose(recipe_file, {"seed": 3}, ["lora.rank=5"], memory=2**40).recipe
    assert (other.seed, other.lora.rank) == (3, 5)
    assert read_recipe(recipe_file).method == "full"


def test_what_the_recipe_says_for_its_own_method_is_none_of_a_candidates(recipe_file, tmp_path):
    content = yaml.safe_load(Path(recipe_file).read_text()) | {"method": "owlore", "sampling": {"active": 2}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    choice = choose(str(tmp_path / "recipe.yaml"), memory=2**40)
    assert (choice.recipe.method, choice.recipe.sampling) == ("lora", None)
    assert "method lora: left out what the recipe says for the method owlore: sampling" in choice.why


def test_where_none_fits_that_is_said_with_what_would_help(recipe_file, capsys):
    assert main(["finetune", "--config", recipe_file, "--method", "auto", "--memory", "1MB"]) == 2
    assert "none of" in (err := capsys.readouterr().err)
    assert "per_device_train_batch_size" in err
    with pytest.raises(htsr.UsageError, match="rank is 0"):
        choose(recipe_file, {}, ["lora.rank=0"], memory=2**40)


def test_the_command_says_what_it_chose(recipe_file, capsys):
    asked = ["finetune", "--config", recipe_file, "--method", "auto", "--memory", "64GB", "--check", "--format", "json"]
    assert main(asked) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["recipe"]["method"] == CANDIDATES[0].method
    assert "htsr: method auto:" in err
    assert main(["finetune", "--config", recipe_file, "--memory", "64GB"]) == 2
    assert "--memory is for --check" in capsys.readouterr().err
