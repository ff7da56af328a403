"""One record in every form and every kind of file is the same record; what nothing reads in it is named."""

import gzip
import json
from pathlib import Path

import pytest

import htsr
from htsr.calibration.record_forms import Names
from htsr.calibration.record_texts import as_dataset, for_model, merged, preamble_of, template_of_headings
from htsr.calibration.records import Source, mixed, read_records, text_of

datasets = pytest.importorskip("datasets")

PAIRS = [{"prompt": "007", "completion": "NA"}, {"prompt": "a;b\t", "completion": 'c, "d"\nnull'}]
ALPACA = {"instruction": "Add.", "input": "2, 3", "output": "5"}


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write(folder, name, records=PAIRS):
    """A file of the kind that its name says."""
    path = folder / name
    if name.endswith(".parquet"):
        datasets.Dataset.from_list(records).to_parquet(path)
    elif name.endswith((".csv", ".tsv")):
        import pandas

        pandas.DataFrame(records).to_csv(path, index=False, sep="\t" if name.endswith("tsv") else ",")
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines(records)))
    elif name.endswith(".zst"):
        path.write_bytes(pytest.importorskip("zstandard").compress(lines(records)))
    else:
        path.write_bytes(json.dumps(records).encode() if name.endswith(".json") else lines(records))
    return str(path)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.csv.gz", "a.ndjson.zst"]
)
def test_every_kind_of_file_holds_the_same_records(tmp_path, name):
    if name == "a.csv.gz":
        plain = write(tmp_path, "a.csv")
        (tmp_path / name).write_bytes(gzip.compress(Path(plain).read_bytes()))
    else:
        write(tmp_path, name)
    assert read_records(str(tmp_path / name), alike=True) == PAIRS
    assert read_records(str(tmp_path / name), limit=1) == PAIRS[:1]
    (tmp_path / name).write_bytes(b"\xff\xfe\x00broken")
    with pytest.raises(htsr.HtsrError, match=name):
        read_records(str(tmp_path / name))


def test_a_table_with_semicolons_and_one_with_a_broken_row(tmp_path):
    (tmp_path / "a.csv").write_text("prompt;completion\na, b;c\n")
    assert read_records(str(tmp_path / "a.csv")) == [{"prompt": "a, b", "completion": "c"}]
    (tmp_path / "a.csv").write_text("prompt,completion\na,b\na,b,c\n")
    with pytest.raises(htsr.SourceError, match=r"a\.csv cannot be read: .*line 3"):
        read_records(str(tmp_path / "a.csv"))


def test_a_folder_is_its_files_of_one_split(tmp_path, caplog):
    folder = tmp_path / "several"
    (folder / "more").mkdir(parents=True)
    write(folder, "a.jsonl", PAIRS[:1])
    write(folder / "more", "b.parquet", PAIRS[1:])
    assert read_records(str(folder)) == PAIRS
    assert not caplog.messages
    (folder / "notes.md").write_text("of whom")
    assert read_records(str(folder)) == PAIRS
    assert caplog.messages == [f"{folder}: read as the split train, without notes.md"]
    split = tmp_path / "split"
    split.mkdir()
    write(split, "train.csv", PAIRS[:1])
    write(split, "test.jsonl", PAIRS[1:])
    assert read_records(f"{split}:test") == PAIRS[1:]
    assert read_records(str(split)) == PAIRS[:1]  # never trained on what is kept for the test
    assert "without test.jsonl" in caplog.text
    with pytest.raises(htsr.SourceError, match="has no files of the split validation; there are train, test"):
        read_records(f"{split}:validation")


def test_a_data_set_that_was_saved_with_turns_of_several_keys(tmp_path):
    """Arrow gives every turn and every call the keys of all others; they are not told to the template."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    other = {"type": "function", "function": {"name": "g", "arguments": {"y": "b"}}}
    chats = [
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}], "id": 1},
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [other], "name": "n"}], "id": 2},
    ]
    expected = [{"messages": chat["messages"]} for chat in chats]
    found = datasets.Dataset.from_list(chats)
    found.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": found, "test": found.select([1])}).save_to_disk(tmp_path / "two")
    assert read_records(str(tmp_path / "one")) == expected
    assert read_records(str(tmp_path / "two")) == expected
    assert read_records(f"{tmp_path / 'two'}:test") == expected[1:]
    as_dataset(expected).to_parquet(tmp_path / "a.parquet")
    assert read_records(str(tmp_path / "a.parquet")) == expected


def test_conversations_are_messages(tmp_path):
    call = {"name": "f", "arguments": {"x": 1}}
    conversation = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "b", "weight": 0},
    ]
    tools = [{"name": "f"}]
    record = {"conversations": conversation, "system": "s", "tools": json.dumps(tools), "id": 5}
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": call}], "content": ""},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "b", "weight": 0},
    ]
    path = write(tmp_path, "a.jsonl", [record])
    assert read_records(path) == [{"messages": turns, "tools": tools}]
    openai = {"type": "function", "id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [openai]}
    path = write(tmp_path, "b.jsonl", [{"messages": [message], "parallel_tool_calls": False}])
    (found,) = read_records(path)
    assert found["messages"][0]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    path = write(tmp_path, "c.jsonl", [{"messages": [{"from": "human", "value": "a"}]}])
    assert read_records(path) == [{"messages": [{"role": "user", "content": "a"}]}]
    roles = [("human", "user"), ("function_call", "assistant"), ("observation", "tool"), ("GPT", "assistant")]
    spoken = [{"role": role, "content": json.dumps(call)} for role, _ in roles]
    (found,) = read_records(write(tmp_path, "d.jsonl", [{"messages": spoken}]))
    assert [turn["role"] for turn in found["messages"]] == [role for _, role in roles]
    assert found["messages"][1] == turns[2]
    own = [{"role": "user", "content": "a"}, {"role": "observation", "content": "b"}]  # of a template that knows it
    assert read_records(write(tmp_path, "e.jsonl", [{"messages": own}])) == [{"messages": own}]
    with pytest.raises(htsr.SourceError, match="a source of records is named ':train', which names nothing"):
        read_records(":train")


def test_turns_that_are_json_in_cells(tmp_path, caplog):
    turns = [{"role": "user", "content": 'a, "b"\n'}, {"role": "assistant", "content": "c", "weight": 1}]
    spoken = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "c"}]
    for name, records in (
        ("a.csv", [{"messages": json.dumps(turns), "tools": json.dumps([{"name": "f"}])}]),
        ("b.parquet", [{"conversations": json.dumps(spoken), "system": "s"}]),
    ):
        (found,) = read_records(write(tmp_path, name, records))
        if name == "a.csv":
            assert found == {"messages": turns, "tools": [{"name": "f"}]}
            assert "nothing reads weight of turns (1)" in caplog.text
        else:
            assert [turn["role"] for turn in found["messages"]] == ["system", "user", "assistant"]
    pair = {
        "prompt": json.dumps(turns[:1]),
        "completion": json.dumps(turns[1:]),
        "chat_template_kwargs": '{"think": 1}',
    }
    (found,) = read_records(write(tmp_path, "d.csv", [pair]))
    assert found == {"prompt": turns[:1], "completion": turns[1:], "chat_template_kwargs": {"think": 1}}
    answers = {"prompt": json.dumps(spoken[:1]), "chosen": json.dumps(spoken[1:]), "rejected": json.dumps(turns[1:])}
    (found,) = read_records(write(tmp_path, "e.csv", [answers]))
    assert [found[key][0]["role"] for key in answers] == ["user", "assistant", "assistant"]
    for texts in ({"prompt": "as JSON", "completion": json.dumps(turns)}, {"prompt": "[1, 2]", "completion": "[3]"}):
        assert read_records(write(tmp_path, "f.jsonl", [texts])) == [texts]
    caplog.clear()
    kinds = [{"text": "a", "messages": "", "prompt": ""}, {"text": "", "messages": json.dumps(turns[:1]), "prompt": ""}]
    assert read_records(write(tmp_path, "g.jsonl", kinds)) == [{"text": "a"}, {"messages": turns[:1]}]
    assert not caplog.messages
    path = write(tmp_path, "c.csv", [{"messages": str(turns)}])  # as pandas writes a list
    with pytest.raises(
        htsr.SourceError, match=r"c\.csv, record 1: messages is a list of turns, not a text without JSON"
    ):
        read_records(path)


def test_a_configuration_of_a_data_set_is_named_before_its_split(tmp_path):
    folder = tmp_path / "arc"
    for config, split, text in (("easy", "train", "a"), ("easy", "test", "b"), ("hard", "train", "c")):
        (folder / config).mkdir(parents=True, exist_ok=True)
        write(folder / config, f"{split}.jsonl", [{"text": text}, {"text": text * 2}])
    configs = [
        {"config_name": name, "data_files": [{"split": s, "path": f"{name}/{s}.jsonl"} for s in splits]}
        for name, splits in (("easy", ("train", "test")), ("hard", ("train",)))
    ]
    (folder / "README.md").write_text("---\n" + json.dumps({"configs": configs}) + "\n---\n")
    assert read_records(f"{folder}:easy:test") == [{"text": "b"}, {"text": "bb"}]
    assert read_records(f"{folder}:hard:") == [{"text": "c"}, {"text": "cc"}]
    assert read_records(f"{folder}:hard:train[1:]", limit=None) == [{"text": "cc"}]
    for source, sentence in (
        (f"{folder}", "name one of them, as in .*arc:CONFIGURATION:train"),
        (f"{folder}:medium:train", "medium"),
        (f"{folder / 'easy'}:easy:train", "has no configurations: no README.md names any"),
    ):
        with pytest.raises(htsr.SourceError, match=sentence):
            read_records(source)


def test_instructions_are_turns_where_there_is_a_template():
    from tests.transformer import word_tokenizer

    heading = "### Instruction:\nAdd.\n\n### Input:\n2, 3\n\n### Response:\n"
    assert for_model(ALPACA, word_tokenizer()) == {"prompt": heading, "completion": "5"}
    assert text_of(ALPACA | {"input": ""}) == "### Instruction:\nAdd.\n\n### Response:\n5"
    assert text_of(ALPACA | {"system": "Be brief."}).startswith("Be brief.\n\n### Instruction:")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    assert text_of(ALPACA | {"system": "s"}, tokenizer) == "system:s;user:Add.\n\n2, 3;assistant:5;"
    turns = for_model(ALPACA | {"input": None}, tokenizer)
    assert turns["prompt"] == [{"role": "user", "content": "Add."}]
    chat = {"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f"}]}
    (first,), (second,) = merged([[turns], [chat]])
    assert first == {"messages": [*turns["prompt"], {"role": "assistant", "content": "5"}]}
    assert second == chat
    with pytest.raises(htsr.SourceError, match="several forms, text and chat; one run is of one form"):
        merged([[{"text": "a"}], [chat]])


def test_a_model_trained_under_headings_is_asked_under_them():
    from tokenizers.processors import TemplateProcessing

    from tests.transformer import word_tokenizer

    for begins in (False, True):
        tokenizer = word_tokenizer()
        if begins:
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
        for more in ({}, {"system": "w5"}):
            record = for_model({"instruction": "w6 w7", "output": "w8"} | more, tokenizer)
            turns = [{"role": "system", "content": "w5"}] if more else []
            turns.append({"role": "user", "content": "w6 w7"})
            tokenizer.chat_template = template_of_headings(tokenizer)
            asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            assert asked == "<s>" * begins + record["prompt"]
            asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
            assert asked == tokenizer(record["prompt"])["input_ids"]
            turns.append({"role": "assistant", "content": "w8"})
            whole = record["prompt"] + record["completion"] + "</s>"
            assert tokenizer.apply_chat_template(turns, tokenize=False).removeprefix("<s>") == whole
            tokenizer.chat_template = None
            assert preamble_of([record]) == "w5\n\n" * bool(more)
    assert preamble_of([record, PAIRS[0]]) is None
    assert preamble_of([{"text": "a"}]) is None
    above = 'Below is "one" \\ {{ of }} the 😀 {% two %}.\n\n'
    trained = for_model({"instruction": "w6 w7", "output": "w8"}, tokenizer)
    longer = for_model({"instruction": "w6", "input": "w7", "output": "w8"}, tokenizer)
    records = [{**one, "prompt": text + one["prompt"]} for text, one in ((above, trained), ("paired\n\n", longer))]
    assert preamble_of([records[1]] * 2 + records[:1]) == above
    assert preamble_of([*records, trained, trained]) == ""
    tokenizer.chat_template = template_of_headings(tokenizer, above)
    for turns, before in (([], above), ([{"role": "system", "content": "w5"}], "w5\n\n")):
        turns = [*turns, {"role": "user", "content": "w6 w7"}]
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        assert asked == "<s>" + before + trained["prompt"]
    again = for_model({"instruction": "w6", "input": "w7", "output": "w8"}, tokenizer)  # a second stage of training
    asked = tokenizer.apply_chat_template(again["prompt"], add_generation_prompt=True, tokenize=False)
    assert asked == "<s>" + above + longer["prompt"]


def test_preferences_are_what_trl_reads(tmp_path):
    record = {"prompt": "1 +", "chosen": " 1", "rejected": " 2", "score": 3}
    (found,) = read_records(write(tmp_path, "a.jsonl", [record]))
    assert as_dataset([found]).to_list() == [{"prompt": "1 +", "chosen": " 1", "rejected": " 2"}]
    turns = {key: [{"role": "assistant", "content": "a"}] for key in ("chosen", "rejected")}
    assert as_dataset([turns])[0] == turns
    with pytest.raises(htsr.SourceError, match="preferences, with chosen and rejected, is two texts"):
        text_of(found)


def test_what_nothing_reads_is_named_once(tmp_path, caplog):
    turn = {"role": "user", "content": "a", "weight": 0}
    path = write(
        tmp_path, "a.jsonl", [{"messages": [turn] * 2, "id": i, "source": None, "prompt": "a"} for i in (1, 2)]
    )
    read_records(path)
    assert caplog.messages == [f"{path}: of 2 records nothing reads id (2), prompt (2), weight of turns (2)"]
    for name, record, nothing in (
        ("tools", {"prompt": "a", "completion": "b", "tools": []}, "tools (1)"),  # without turns nobody would see them
        ("tatsu", ALPACA | {"text": "Below …"}, "text (1)"),
        ("system", ALPACA | {"system": "s", "history": [1]}, "history (1)"),
    ):
        caplog.clear()
        path = write(tmp_path, f"{name}.jsonl", [record])
        read_records(path)
        assert caplog.messages == [f"{path}: of 1 records nothing reads {nothing}"]


def test_names_of_fields(tmp_path, caplog):
    dolly = {"instruction": "Add.", "context": "2, 3", "response": "5", "category": "qa"}
    path = write(tmp_path, "dolly.jsonl", [dolly])
    names = Names(columns={"context": "input", "response": "output", "category": None})
    assert read_records(path, names=names) == [ALPACA]
    assert not caplog.messages
    assert read_records(path, names=Names(text="context")) == [{"text": "2, 3"}]
    assert "nothing reads instruction (1), response (1), category (1)" in caplog.text
    with pytest.raises(
        htsr.SourceError, match=r"dolly\.jsonl, line 1: the field body is absent; there are category, co"
    ):
        read_records(path, names=Names(text="body"))
    with pytest.raises(
        htsr.SourceError, match=r"has category, context, instruction, response; data\.columns in a reci"
    ):
        read_records(path)
    caplog.clear()
    both = write(tmp_path, "both.jsonl", [{"text": "a", "body": "b"}])
    assert read_records(both, names=Names(columns={"body": "text", "titel": None})) == [{"text": "b"}]
    assert caplog.messages == [
        f"{both}: of 1 records none has titel, which columns names",
        f"{both}: of 1 records nothing reads text (1)",
    ]


def test_weights_are_shares(tmp_path):
    parts = [[{"text": f"{name}{i}"} for i in range(size)] for name, size in (("a", 300), ("b", 20))]
    plain = mixed(parts, [None, None], seed=0)
    assert sorted(plain, key=str) == sorted(parts[0] + parts[1], key=str)
    assert 0 < sum(record["text"].startswith("b") for record in plain[:100]) < 20  # any first ones stand for all
    assert mixed(parts[:1], [None], seed=0) == parts[0]
    found = mixed(parts, [3.0, None], seed=1)
    assert {record["text"] for record in found} == {record["text"] for part in parts for record in part}
    share = sum(record["text"].startswith("a") for record in found) / len(found)
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / len(found)) ** 0.5
    assert found == mixed(parts, [3.0, None], seed=1) != mixed(parts, [3.0, None], seed=2)
    with pytest.raises(htsr.UsageError, match="by these weights an epoch has about 320,000,300 records"):
        mixed(parts[::-1], [1.0, 1e-6 * 300 / 320], seed=0)
    with pytest.raises(htsr.UsageError, match="weight is 0; it is above 0"):
        Source(source="a", weight=0)
