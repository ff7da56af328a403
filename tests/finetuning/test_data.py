"""Several sources, and streams, in a run: nothing held out is trained on, shares hold, and a stream resumes."""

import gzip
import json
from collections import Counter
from itertools import islice

import pytest
import torch
import yaml
from htsr_cli.main import main
from safetensors.torch import load_file

import htsr
from htsr.finetuning.data import training_records
from htsr.finetuning.reading import read_recipe
from tests.training.runs import killed_after
from tests.transformer import llama, word_tokenizer

pytest.importorskip("trl")

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model with a chat template, and data: instructions, conversations, texts."""
    folder = tmp_path_factory.mktemp("data")
    llama(2).save_pretrained(folder / "model")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    alpaca = [{"instruction": f"w{i}", "input": "w9", "output": f"w{i} w{i + 1}", "text": "w5"} for i in range(4, 24)]
    (folder / "alpaca.json").write_text(json.dumps(alpaca))
    share = [
        {"conversations": [{"from": "human", "value": f"w{i}"}, {"from": "gpt", "value": f"w{i + 1}"}], "id": i}
        for i in range(30, 40)
    ]
    (folder / "sharegpt.jsonl.gz").write_bytes(gzip.compress(lines(share).encode()))
    (folder / "texts.csv").write_text("body,who\n" + "".join(f"w{i} w{i + 1},a\n" for i in range(4, 34)))
    return folder


def recipe_file(work, output, data, **more):
    training = {"max_steps": 7, "save_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    training |= {"logging_steps": 100, "max_length": 32, "disable_tqdm": True} | more.pop("training", {})
    content = {"model": str(work / "model"), "output": str(output), "method": "full", "spectra": False}
    content |= {"data": data, "training": training, **more}
    path = output.parent / f"{output.name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def records_of(work, tmp_path, data, tokenizer=None, **more):
    said = []
    if tokenizer is None:
        tokenizer = word_tokenizer()
        tokenizer.chat_template = TEMPLATE
    recipe = read_recipe(recipe_file(work, tmp_path / "run", data, **more))
    return *training_records(recipe, tokenizer, said.append), said


def test_sources_are_mixed_and_nothing_held_out_is_trained_on(work, tmp_path):
    sources = [
        {"source": str(work / "alpaca.json"), "weight": 1},
        {"source": str(work / "sharegpt.jsonl.gz"), "weight": 4},
    ]
    train, held_out, stream, said = records_of(work, tmp_path, {"train": sources, "evaluation_share": 0.2})
    assert stream is None
    assert len(held_out) == 4 + 2
    assert all(list(record) == ["messages"] for record in [*train, *held_out])
    first = {record["messages"][0]["content"] for record in train}
    assert not first & {record["messages"][0]["content"] for record in held_out}
    assert len(first) == 16 + 8  # each at least once
    assert said[0].startswith("data.train: some sources have messages, so all records are written as such")
    counts = Counter("w9" in record["messages"][0]["content"] for record in train)
    assert said[1] == f"{sources[0]['source']}: {counts[True]} of {len(train)} training records" + (
        f", each {counts[True] / 16:.2g} times" * (counts[True] > 16)
    )
    assert counts[False] > 2 * counts[True]
    plain = records_of(work, tmp_path, {"train": sources[0]["source"], "limit": 5, "evaluation_share": 0})
    assert len(plain[0]) == 5
    assert plain[0][0]["completion"][0]["role"] == "assistant"
    evaluation = [str(work / "sharegpt.jsonl.gz"), {"source": str(work / "alpaca.json")}]
    _, held_out, _, _ = records_of(work, tmp_path, {"train": str(work / "alpaca.json"), "evaluation": evaluation})
    assert len(held_out) == 30
    without = word_tokenizer()
    assert records_of(work, tmp_path, {"train": sources[0]["source"]}, without)[0][0]["prompt"].startswith("### Instr")
    with pytest.raises(htsr.SourceError, match="of several forms, completion and chat; one run is of one form"):
        records_of(work, tmp_path, {"train": sources}, without)


def test_a_limit_is_drawn_over_all_sources(work, tmp_path):
    sources = [str(work / "alpaca.json"), str(work / "sharegpt.jsonl.gz")]
    data = {"train": sources, "limit": 15, "evaluation_share": 0}
    train, _, _, said = records_of(work, tmp_path, data)
    of_alpaca = sum("w9" in record["messages"][0]["content"] for record in train)
    assert len(train) == 15
    assert 5 < of_alpaca < 15  # 20 and 10 records: 10 are expected
    shares = [f"{sources[0]}: {of_alpaca} of 15 training", f"{sources[1]}: {15 - of_alpaca} of 15 training"]
    assert said[-2:] == [f"{share} records" for share in shares]
    weighted = [{"source": sources[0]}, {"source": sources[1], "weight": 8}]
    train, _, _, said = records_of(work, tmp_path, data | {"train": weighted})
    of_alpaca = sum("w9" in record["messages"][0]["content"] for record in train)
    assert said[-2] == f"{sources[0]}: {of_alpaca} of 15 training records"
    assert said[-1].startswith(f"{sources[1]}: {15 - of_alpaca} of 15 training records")


def test_what_teaches_nothing_is_counted(work, tmp_path, caplog):
    turns = [{"from": "human", "value": "w4"}, {"from": "gpt", "value": " "}]
    records = [{"conversations": turns[:n]} for n in (1, 2)] + [
        {"conversations": [turns[0], turns[1] | {"value": "w5"}]}
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text(lines(records))
    train, held_out, _, _ = records_of(work, tmp_path, {"train": {"source": str(path)}, "evaluation": str(path)})
    assert len(train) == len(held_out) == 3
    told = f"{path}: 2 of 3 records have an empty text or answer, or none: they teach to end at once"
    common = "data: 3 of 3 held-out records are trained on, too, and their loss tells nothing of others"
    assert caplog.messages == [told, told, common]
    caplog.clear()
    path.write_text(lines([{"instruction": "w4", "output": ""}, {"instruction": "w4", "output": "w5"}]))
    records_of(work, tmp_path, {"train": str(path), "evaluation_share": 0})
    assert caplog.messages == [told.replace("2 of 3", "1 of 2")]


def test_a_stream_begins_after_what_is_held_out_and_never_ends(work, tmp_path):
    data = {"train": str(work / "texts.csv"), "text_field": "body", "streaming": True, "evaluation_records": 5}
    train, held_out, stream, said = records_of(work, tmp_path, data)
    texts = [f"w{i} w{i + 1}" for i in range(4, 34)]
    assert [record["text"] for record in held_out] == texts[:5]
    assert [record["text"] for record in train] == texts[5:]
    assert "on the first 25 records" in said[-1]
    drawn = [row["text"] for row in islice(stream, 300)]
    assert set(drawn) == set(texts[5:])
    assert drawn[:25] != texts[5:30]
    assert drawn == [row["text"] for row in islice(stream, 300)]
    data |= {"evaluation_records": 30}
    with pytest.raises(htsr.UsageError, match=r"data\.evaluation_records: .* has no more than 30 records"):
        records_of(work, tmp_path, data)
    sources = [
        {"source": str(work / "alpaca.json"), "weight": 1},
        {"source": str(work / "sharegpt.jsonl.gz"), "weight": 3},
    ]
    _, _, stream, _ = records_of(work, tmp_path, {"train": sources, "streaming": True})
    drawn = list(islice(stream, 400))
    assert {tuple(row) for row in drawn} == {("tools", "chat_template_kwargs", "messages")}
    share = sum("w9" in row["messages"][0]["content"] for row in drawn) / 400
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": "a", "streaming": True, "limit": 5}, "data.limit has no meaning with streaming"),
        ({"train": ["a", "b"], "streaming": True}, "never comes to the end of a source: give several of them a weight"),
        (
            {"train": "a", "streaming": True, "evaluation_share": 0.5},
            "data.evaluation_share has no meaning with stream",
        ),
        ({"train": "a", "multiple_choice": ""}, "data.multiple_choice is empty"),
        ({"train": "a", "evaluation_records": 5}, "data.evaluation_records is for streaming: true"),
        ({"train": "a", "streaming": True, "evaluation": "b", "evaluation_records": 5}, "no meaning beside data.eval"),
        ({"train": "a", "text_field": "b", "columns": {"c": "text"}}, "data.text_field and data.columns: where"),
        ({"train": "a", "columns": {"c": "txt"}}, "data.columns: c is to be 'txt'; did you mean text?"),
        ({"train": "a", "columns": {"c": "text", "d": "text"}}, "data.columns: two fields are to be text"),
        ({"train": []}, "data.train is empty"),
        ({"train": ["a", 3]}, r"train\[1\] is a text or a section of keys, not 3"),
        ({"train": [{"source": "a", "weight": -1}]}, r"train\[0\]: weight is -1.0; it is above 0"),
        ({"train": "a", "evaluation": [{"source": "b", "weight": 1}]}, "data.evaluation: weight is for training"),
    ],
)
def test_what_data_cannot_mean(work, tmp_path, data, message):
    with pytest.raises(htsr.UsageError, match=message):
        read_recipe(recipe_file(work, tmp_path / "run", data))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"training": {"max_steps": -1}}, "the end of a stream is not known; set training.max_steps"),
        ({"layerwise": "tempbalance"}, "tempbalance measures once an epoch, of which data.streaming knows none"),
    ],
)
def test_what_a_stream_cannot_have(work, tmp_path, more, message):
    with pytest.raises(htsr.UsageError, match=message):
        read_recipe(recipe_file(work, tmp_path / "run", {"train": "a", "streaming": True}, **more))


def test_a_stream_goes_on_where_it_was_killed(work, tmp_path, capsys, caplog):
    """Over the ends of its sources: 28 of 18 and 10 records are trained on, some of them again."""
    sources = [{"source": str(work / "alpaca.json"), "weight": 1}, str(work / "sharegpt.jsonl.gz")]
    data = {"train": sources, "streaming": True, "evaluation_records": 2}
    more = {"method": "owlore", "low_rank": {"rank": 8, "refresh_every": 2}}
    more["sampling"] = {"active": 1, "interval": 2, "threshold": 3.0, "calibration_samples": 4}
    assert main(["finetune", "--config", recipe_file(work, tmp_path / "whole", data, **more)]) == 0
    assert "a stream of training records, 4 held out" in capsys.readouterr().err
    assert "of 20 records nothing reads text (20)" in caplog.text
    broken = recipe_file(work, tmp_path / "broken", data, **more)
    with killed_after(5):
        main(["finetune", "--quiet", "--config", broken])
    assert main(["finetune", "--quiet", "--config", broken, "--resume"]) == 0
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    start = load_file(work / "model" / "model.safetensors")
    assert any(not torch.equal(a[name], start[name]) for name in a)
    assert all(torch.equal(a[name], b[name]) for name in a)
