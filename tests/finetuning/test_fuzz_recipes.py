"""Recipes and records, damaged by the hundred with a fixed seed: each is read or refused in one sentence."""

import copy
import json
import random

import pytest
import yaml

import htsr
from htsr.calibration.records import as_dataset, read_records, text_of
from htsr.finetuning.reading import FOLDER, read_recipe
from tests.transformer import word_tokenizer

pytest.importorskip("trl")

WILD = [
    None, "", "fast", " ", "\0", "~nosuchuser", "a" * 5000, "\ud800", "\u2028", float("nan"), float("inf"),
    -float("inf"), -1, 0, 1, 0.5, 1e308, -1e-300, 2**31, 10**30, 10**400, True, False, [], {}, [None], {"": None},
    {"a": {"b": []}}, [[[[]]]], "1e-4", "null", "*", "!!python/object:os.system", {"type": "text"}, [{"role": 1}],
]  # fmt: skip


def places(tree, path=()):
    """Paths to every value of a tree of dicts and lists."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def damaged(tree, draw):
    """A copy with a value or two replaced, removed, or put under a misspelt key."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.choice((1, 1, 2))):
        *path, last = draw.choice(list(places(tree)) or [("model",)])
        holder = tree
        for key in path:
            holder = holder[key]
        what = draw.random()
        if what < 0.75:
            holder[last] = draw.choice(WILD)
        elif what < 0.9 and isinstance(holder, dict):
            holder[f"{last}{draw.choice('sx_')}"] = holder.pop(last)
        else:
            del holder[last]
    return tree


def flipped(text, draw):
    """A copy with a few characters replaced, removed or doubled."""
    characters = list(text)
    for _ in range(draw.choice((1, 1, 2, 5))):
        i = draw.randrange(len(characters))
        characters[i] = draw.choice(["", characters[i] * 2, *"[]{}:,&*!|>-#\"'\\\0\t\n0eE.\u2028"])
    return "".join(characters)


def one_sentence(error, name=""):
    """An error of htsr's own, in one line of a length that is read, and with the file's name."""
    assert name in str(error) or "chat template" in str(error)
    assert len(str(error)) < 1500, str(error)
    assert "Traceback" not in str(error)


def tried(path):
    from htsr.finetuning.arguments import training_arguments

    try:
        recipe = read_recipe(str(path))
        training_arguments(recipe)
    except htsr.HtsrError as error:
        one_sentence(error)
        return False
    return True


@pytest.mark.parametrize("name", ["one_cpu", "one_gpu_24gb", "lora"])
def test_damaged_recipes(tmp_path, name):
    draw = random.Random(name)
    base = yaml.safe_load((FOLDER / "one_cpu.yaml" if name == "lora" else FOLDER / f"{name}.yaml").read_text())
    base["training"].pop("bf16", None)  # where it can be had is another matter
    if name == "lora":
        base = {key: value for key, value in base.items() if key not in ("sampling", "low_rank")}
        base |= {"method": "lora", "lora": {"rank": 4, "scaling": 2.0, "dropout": 0.1, "score": "alpha"}}
        base["lora"]["options"] = {"use_dora": True, "bias": "none", "init_lora_weights": "gaussian"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(base))
    assert tried(path)
    outcomes = []
    for i in range(160):
        text = yaml.dump(damaged(base, draw)) if i % 2 else flipped(yaml.safe_dump(base), draw)
        damaged_path = tmp_path / f"{i}.yaml"
        damaged_path.write_bytes(text.encode("utf-8", "surrogatepass"))
        outcomes.append(tried(damaged_path))
    assert 10 < sum(outcomes) < 120  # some harm is none


RECORDS = [
    {"text": "w5 w6"},
    {"prompt": "w5", "completion": " w6"},
    {"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}], "tools": [{"name": "f"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "w5"}]}], "chat_template_kwargs": {"a": 1}},
    {"prompt": [{"role": "user", "content": "w5"}], "completion": [{"role": "assistant", "content": "w6"}]},
    {"question": "w5", "choices": ["w6", "w7"], "answer": 1},
]


def test_damaged_records(tmp_path):
    draw = random.Random(0)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    outcomes = []
    for i in range(400):
        base = RECORDS[i % len(RECORDS)]
        text = json.dumps(damaged(base, draw)) if i % 2 else flipped(json.dumps(base), draw)
        path = tmp_path / f"{i}{draw.choice(['.jsonl', '.json'])}"
        path.write_bytes(f"\n{text}\n".encode("utf-8", "surrogatepass"))
        try:
            records = read_records(str(path))
            assert all(isinstance(text_of(record, tokenizer), str) for record in records)
            if i % 10 == 1:
                as_dataset(records)
            outcomes.append(True)
        except htsr.HtsrError as error:
            one_sentence(error, path.name)
            outcomes.append(False)
    assert 40 < sum(outcomes) < 350


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("b0: &b0 [1]\n" + "".join(f"b{i}: &b{i} [*b{i - 1}, *b{i - 1}]\n" for i in range(1, 30)), "anchors"),
        ("a: &a [*a]", "an anchor that holds itself"),
        ("[" * 5000, "entries"),
        ("- " * 9000, "sections inside sections"),
        ("x: " + "y" * 40_000, "characters"),
        ("model: 2001-13-45", "month must be"),
        ("? [a]\n: b", "unhashable"),
        ("model: " + "9" * 5000, "limit"),
        ("model: \0", "not allowed"),
    ],
)  # fmt: skip
def test_yaml_beyond_reason(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(htsr.SourceError, match=f"is no YAML: .*{message}"):
        read_recipe(str(tmp_path / "recipe.yaml"))
