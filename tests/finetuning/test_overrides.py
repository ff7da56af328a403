"""Keys from the command line, the recipes that htsr carries, and the recipe that a run leaves behind."""

import json
import math
from typing import get_args

import pytest
import yaml
from htsr_cli.main import main
from hypothesis import given, settings
from hypothesis import strategies as st

import htsr
from htsr.finetune import read_recipe
from htsr.finetuning.budget import parse_memory
from htsr.finetuning.reading import shipped
from htsr.finetuning.recipe import Method
from htsr.finetuning.recipe_values import dump_yaml, load_yaml
from htsr.finetuning.run_folder import begin_folder, check_same_run, plain, resolved

pytest.importorskip("trl")

MINIMAL = {"model": "m", "output": "o", "data": {"train": "t.jsonl"}}


def write(folder, content):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_an_override_is_what_the_file_would_say(tmp_path):
    overrides = [
        "data.train=a=b.jsonl", "seed=3", "method=owlore", "sampling.active=4", "low_rank={rank: 4, scale: 2}",
        "training.learning_rate=1e-4", "training.gradient_checkpointing_kwargs.use_reentrant=false",
        "training.report_to=[tensorboard]", "data.limit=null", "dtype=bfloat16",
    ]  # fmt: skip
    found = read_recipe(write(tmp_path, MINIMAL | {"training": {"max_steps": 2}, "lora": {"rank": 4}}), {}, overrides)
    said = {
        **MINIMAL,
        "data": {"train": "a=b.jsonl"},
        "seed": 3,
        "dtype": "bfloat16",
        "method": "owlore",
        "sampling": {"active": 4},
        "low_rank": {"rank": 4, "scale": 2},
        "training": {
            "max_steps": 2,
            "learning_rate": 1e-4,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "report_to": ["tensorboard"],
        },
    }
    assert found == read_recipe(write(tmp_path, said))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.actve=3", "--set sampling.actve: sampling has no key actve; did you mean active?"),
        ("learning_rate=1e-4", "--set learning_rate: unknown key learning_rate; did you mean training.learning_rate?"),
        ("evaluation=a", "--set evaluation: unknown key evaluation; did you mean data.evaluation?"),
        ("sed=3", "--set sed: unknown key sed; did you mean seed?"),
        ("seed.a=3", "--set seed.a: seed is a value, and no section of keys"),
        ("data.train.a=3", "--set data.train.a: data.train has no key a; there are source,"),
        ("seed", "--set seed: it is KEY=VALUE"),
        ("=3", "it is KEY=VALUE"),
        ("lora..rank=3", "it is KEY=VALUE"),
        ("lora.rank=[", "--set lora.rank: "),
        ("lora.rank=four", "lora: rank is a whole number, not 'four'"),
        ("training.max_stps=4", "training.max_stps is no argument of SFTConfig; did you mean max_steps?"),
        ("training.max_steps.a=4", "training.max_steps is 2 in the recipe, no section"),
        ("lora.options.use_dorra=true", "did you mean use_dora"),
        ("sampling={active: 1}", None),
        ("low_rank.rank=1", "the section low_rank has no meaning for the method lora"),
    ],
)
def test_an_override_that_means_nothing_is_refused_with_its_key(tmp_path, override, message):
    path = write(tmp_path, MINIMAL | {"training": {"max_steps": 2}})
    if message is None:
        assert read_recipe(path, None, [override]).sampling.active == 1
        return
    with pytest.raises(htsr.UsageError) as caught:
        read_recipe(path, None, [override])
    assert message in str(caught.value)


def test_overrides_on_the_command_line(tmp_path, capsys):
    path = write(tmp_path, MINIMAL | {"output": str(tmp_path / "o")})
    assert main(["finetune", "--config", path, "--set", "seed=1", "--set", "model=nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert main(["finetune", "--config", path, "--set", "lora.ranks=1"]) == 2
    assert capsys.readouterr().err == "htsr: --set lora.ranks: lora has no key ranks; did you mean rank?\n"


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
    | st.sampled_from(["1e-4", "null", "1_0", "0x1", "~", "yes", "2026-11-27", "1:30", "=", "<<", "- a", "#", ".inf"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(PLAIN)
@settings(max_examples=200, deadline=None)
def test_what_is_dumped_is_loaded_again(content):
    found = load_yaml(dump_yaml(content))
    assert found == content
    assert not isinstance(content, float) or math.copysign(1, found) == math.copysign(1, content)


@pytest.mark.parametrize("name", shipped())
def test_a_carried_recipe_is_printed_and_its_resolved_form_is_the_same_run(tmp_path, capsys, name):
    assert main(["recipe"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[0] == name]
    assert len(line) < 160
    assert main(["recipe", name]) == 0
    text = capsys.readouterr().out
    (tmp_path / "my.yaml").write_text(text)
    recipe = read_recipe(str(tmp_path / "my.yaml"))
    assert recipe == read_recipe(name)
    (tmp_path / "resolved.yaml").write_text(resolved(recipe))
    assert read_recipe(str(tmp_path / "resolved.yaml")) == recipe
    assert (tmp_path / "resolved.yaml").read_text().startswith("# a recipe of htsr finetune, with the defaults of")


@pytest.mark.parametrize("method", get_args(Method))
def test_the_resolved_form_of_every_method_is_the_same_run(tmp_path, method):
    recipe = read_recipe(write(tmp_path, MINIMAL | {"method": method}))
    (tmp_path / "resolved.yaml").write_text(resolved(recipe))
    assert read_recipe(str(tmp_path / "resolved.yaml")) == recipe


def test_a_recipe_that_is_not_carried(capsys):
    assert main(["recipe", "one_cup"]) == 2
    assert capsys.readouterr().err == "htsr: htsr carries no recipe one_cup; did you mean one_cpu?\n"


def test_a_run_of_an_older_version_goes_on_where_keys_have_come_since(tmp_path):
    """And then it is kept as this version keeps it."""
    recipe = read_recipe(write(tmp_path, MINIMAL | {"method": "lisa", "output": str(tmp_path / "run")}))
    content = plain(recipe)
    for section, key in (
        (content, "frozen_weights"),
        (content, "rounding"),
        (content["sampling"], "calibration_samples"),
    ):
        del section[key]
    (tmp_path / "run").mkdir()
    old = tmp_path / "run" / "recipe.json"
    old.write_text(json.dumps(content))
    check_same_run(recipe, tmp_path / "run", pytest.fail)
    begin_folder(recipe, tmp_path / "run", resume=True)
    assert not old.exists()
    check_same_run(recipe, tmp_path / "run", pytest.fail)
    assert read_recipe(str(tmp_path / "run" / "recipe.yaml")) == recipe
    (tmp_path / "run" / "recipe.yaml").write_text("model: [")
    with pytest.raises(htsr.SourceError, match=r"recipe.yaml cannot be read"):
        check_same_run(recipe, tmp_path / "run", pytest.fail)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24e9), ("24 gib", 24 * 2**30), ("900m", 900e6), ("1e3GB", None), ("", None), ("0GB", None), ("GB", None),
     ("24 GX", None), ("-1GB", None), ("1048575", None), ("2000000", 2e6), ("100B", 100), ("1.5TiB", 1.5 * 2**40)],
)  # fmt: skip
def test_an_amount_of_memory(text, size):
    if size is None:
        with pytest.raises(htsr.UsageError, match="--memory"):
            parse_memory(text)
    else:
        assert parse_memory(text) == size
    with pytest.raises(htsr.UsageError, match=r"--memory 24 has no unit, .*: write 24GB or 24GiB"):
        parse_memory("24")
