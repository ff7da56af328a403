"""Records that cannot be used are refused with their place and reason."""

import json

import pytest

import htsr
from htsr.calibration.records import as_dataset, question_of, read_records, split, text_of

QUESTION = {"question": "Why?", "choices": ["x", "y"], "answer": 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": ', "a.jsonl, line 3: no JSON"),
        ("a.jsonl", b'{"text": "a"}\n"b"\n', "line 2: a JSON object is wanted, not a text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b", "text": "c"}', r"a.jsonl, line 2: the key text stands twice in one"),
        ("a.json", b'[{"text": "a"},\n {"text": "b", "x": {"y": 1, "y": 1}}, {}]', "json, record 2: the key y stands"),
        ("a.json", b'{"text": "b",\n"text": "c"}', "a.json: the key text stands twice"),
        ("a.json", b'{"version": "1",\n "data": [{"text": "a"}]}', "has data, version; .* lie under data: let the"),
        ("a.json", b'{"train": [{"text": "a"}], "test": [{"text": "b"}]}', "seem to lie under train and test: let"),
        ("a.txt", b"\xff\xfe\xfa", "a.txt cannot be read"),
        ("a.txt", b"\n\n \n", "a.txt holds no records"),
        ("a.json", None, "a.json cannot be read"),
    ],
)
def test_files_that_hold_no_records(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(htsr.SourceError, match=message):
        read_records(str(tmp_path / name))


def test_blank_lines_count_for_places_and_the_limit_is_of_records(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": "a"}\n\n{"text": "b"}\n')
    assert read_records(str(tmp_path / "a.jsonl")) == [{"text": "a"}, {"text": "b"}]
    assert read_records(str(tmp_path / "a.jsonl"), limit=1) == [{"text": "a"}]


@pytest.mark.parametrize("limit", [None, 3])
def test_a_data_set_that_cannot_be_had(tmp_path, limit):
    with pytest.raises(
        htsr.SourceError, match=r"nothing:train is no \.jsonl, .* or \.parquet file, nor a folder, nor a data"
    ):
        read_records(str(tmp_path / "nothing:train"), limit)
    (tmp_path / "empty").mkdir()
    for source in (f"{tmp_path}/empty:train", "owner/nothing:train"):
        with pytest.raises(htsr.SourceError, match=r"(nothing|empty).* is a data set that cannot be had: "):
            read_records(source, limit)


def test_a_file_of_another_kind_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.xlsx").write_bytes(b"PK")
    with pytest.raises(htsr.SourceError, match=r"train\.xlsx is no \.jsonl, .* file, nor a folder, nor a data"):
        read_records("train.xlsx")


def test_questions_without_a_field_or_an_answer():
    assert question_of(QUESTION) == ("Question: Why?\nAnswer:", [" x", " y"])
    with pytest.raises(htsr.SourceError, match="'answer' is missing"):
        question_of({"question": "Why?", "choices": ["x"]})
    with pytest.raises(htsr.SourceError, match="no index of the choices"):
        question_of(QUESTION | {"answer": "y"})


def test_a_chat_is_written_by_the_template():
    class Tokenizer:
        chat_template = "some"

        def apply_chat_template(self, messages, tokenize):
            assert not tokenize
            return "|".join(message["content"] for message in messages)

    turns = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    assert text_of(turns, Tokenizer()) == "a|b"
    assert text_of(turns) == "a\nb"


def test_a_split_is_a_partition_and_leaves_something_to_train_on():
    records = [{"text": str(i)} for i in range(10)]
    train, held = split(records, 0.3, seed=1)
    assert len(held) == 3
    assert sorted(r["text"] for r in train + held) == [str(i) for i in range(10)]
    assert split(records, 0.3, seed=1) == (train, held)
    for share in (-0.1, 1.0):
        with pytest.raises(htsr.UsageError, match="share that is held out"):
            split(records, share, seed=0)
    with pytest.raises(htsr.UsageError, match="none is left"):
        split(records[:1], 0.9, seed=0)


def test_a_data_set_has_records_of_one_form():
    assert as_dataset([QUESTION]).to_list() == [{"prompt": "Question: Why?\nAnswer:", "completion": " y"}]
    with pytest.raises(htsr.UsageError, match="all of one form"):
        as_dataset([{"text": "a"}, QUESTION])
    with pytest.raises(htsr.SourceError, match="a record has"):
        as_dataset([{"other": 1}])


TURN = {"role": "user", "content": "w5"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
OTHER = {"type": "function", "function": {"name": "g", "arguments": {"y": None, "z": [1]}}}


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_newline_ends_a_record(tmp_path, separator):
    records = [{"text": f"a{separator}b"}, {"text": "c"}]
    lines = [json.dumps(record, ensure_ascii=separator in "\x0b\x0c\x1c") for record in records]
    (tmp_path / "a.jsonl").write_text("\r\n".join(lines), encoding="utf-8-sig", newline="")
    assert read_records(str(tmp_path / "a.jsonl")) == records


def test_an_array_of_records(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a", "id": 1}, QUESTION], indent=1))
    assert read_records(str(tmp_path / "a.json")) == [{"text": "a"}, QUESTION]
    (tmp_path / "b.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert len(read_records(str(tmp_path / "b.json"))) == 2
    (tmp_path / "c.json").write_text('[{"text": "a"}, 3]')
    (tmp_path / "b.json").write_text(json.dumps(QUESTION | {"prompt": '[{"a": 1, "a": 2}]'}, indent=1))
    assert read_records(str(tmp_path / "b.json")) == [QUESTION]  # with a text about JSON that stays a text
    with pytest.raises(htsr.SourceError, match=r"c\.json, record 2: a JSON object is wanted, not a number"):
        read_records(str(tmp_path / "c.json"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": None}, "this one has text: null"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, r"conversations\[0\] is from 'alien'; there are human"),
        ({"messages": [TURN, {"role": "gpt", "content": "a"}, TURN | {"role": "alien"}]}, r"\[2\] is from 'alien'"),
        ({"messages": [TURN | {"from": "gpt"}]}, r"messages\[0\] has the role 'user' and is from 'gpt': leave one"),
        ({"messages": [TURN | {"value": "b"}]}, r"messages\[0\] has a content and another value: leave one of them"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "is a call of a function, in JSON with name"),
        ({"conversations": [{"from": "human", "value": "a"}], "system": ["b"]}, "system is a text, not a list"),
        ({"messages": [TURN], "chosen": "a", "rejected": "b"}, r"messages and chosen \+ rejected in one record"),
        ({"chosen": "a", "rejected": [TURN]}, "chosen and rejected are both texts or both lists of turns"),
        ({"instruction": "a", "output": 5}, "output is a text, not a number"),
        ({"messages": [TURN | {"tool_calls": "f"}]}, r"messages\[0\].tool_calls is a list of calls, not a text"),
        ({"text": 5}, "text is a text, not a number"),
        ({"text": ["a"]}, "text is a text, not a list"),
        ({"text": "a", "messages": [TURN]}, r"text and messages in one record: which of them"),
        ({"text": "a", "prompt": "a", "completion": "b"}, r"text and prompt \+ completion in one record"),
        ({"prompt": "a", "completion": 5}, "completion is a text, not a number"),
        ({"prompt": [TURN], "completion": "b"}, "both texts or both lists of turns, not a list and a text"),
        ({"prompt": "a", "completion": [TURN]}, "both texts or both lists of turns, not a text and a list"),
        ({"messages": []}, "messages is a list of turns, not an empty one"),
        ({"messages": "a"}, "messages is a list of turns, not a text without JSON of one"),
        ({"messages": ["a"]}, r"messages\[0\] is a turn with role and content, not a text"),
        ({"messages": [TURN, {"role": "assistant", "content": None}]}, r"messages\[1\].content is a text, not null"),
        ({"messages": [TURN, {"role": "assistant"}]}, r"messages\[1\].content is a text, not null"),
        ({"messages": [{"role": 3, "content": "a"}]}, r"messages\[0\] is a turn with role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            r"messages\[0\] has content that is not text",
        ),
        ({"messages": [TURN], "tools": "{"}, "tools is no JSON"),
        ({"messages": [TURN], "tools": '[{"f": 1, "f": 2}]'}, "the key f stands twice"),
        ({"messages": '[{"role": "user", "content": "a", "content": "b"}]'}, "the key content stands twice"),
        ({"messages": [TURN], "tools": {"f": 1}}, "tools is a list, not an object"),
        ({"messages": [TURN], "chat_template_kwargs": [1]}, "chat_template_kwargs holds keys and values"),
        ({"text": "a\ud800"}, "half of a surrogate pair"),
        ({"messages": [TURN | {"name": "\udc00"}]}, "half of a surrogate pair"),
        (QUESTION | {"answer": True}, "answer True is no index of the choices"),
        (QUESTION | {"choices": [["x"]], "answer": 0}, "the choices of 'Why\\?' are a list of texts or numbers"),
        (QUESTION | {"question": 3}, "question is a text, not a number"),
    ],
)
def test_a_record_of_no_form_is_named_with_its_line(tmp_path, record, message):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + json.dumps(record) + "\n")
    with pytest.raises(htsr.SourceError, match=rf"a\.jsonl, line 2: .*{message}"):
        read_records(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("text", ['{"messages": ' + "[" * 100_000, '{"text": ' + "9" * 5000 + "}", "\0"])
def test_json_beyond_reason(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(htsr.SourceError, match=r"a\.jsonl, line 1: "):
        read_records(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("source", ["~nosuchuser/a.jsonl", "a\0.jsonl", "folder.jsonl"])
def test_paths_that_lead_nowhere(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(htsr.SourceError, match="cannot be read"):
        read_records(source)


def test_turns_reach_the_template_as_they_were_written():
    """TRL's own preparation: Arrow alone would add `y: null` to the first call, and the template would write it."""
    from trl.data_utils import apply_chat_template

    from tests.transformer import word_tokenizer

    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ tools | tojson }}{% for m in messages %}|{{ m | tojson }}{% endfor %}{{ mood }}"
    chats = [
        {
            "messages": [
                TURN,
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "tool", "content": "w6", "name": "f"},
            ]
        },
        {"messages": [TURN, {"role": "assistant", "content": None, "tool_calls": [OTHER]}], "tools": [{"name": "g"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "w"}, {"type": "text", "text": "5"}]}]},
        {"messages": [TURN], "chat_template_kwargs": {"mood": "w9"}, "tools": '[{"name": "h"}]'},
    ]
    found = as_dataset(chats)
    assert found.column_names == ["messages", "tools", "chat_template_kwargs"]
    assert found[0]["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert found[1]["messages"][1]["tool_calls"] == [OTHER]
    assert found[2]["messages"] == [TURN]
    for row, chat in zip(found.map(lambda row: {"size": len(row["messages"])}), chats, strict=True):
        theirs = apply_chat_template(
            {"messages": row["messages"], **row["chat_template_kwargs"]}, tokenizer, row["tools"]
        )
        assert text_of(chat, tokenizer) == tokenizer.apply_chat_template(
            row["messages"], tokenize=False, tools=row["tools"], **row["chat_template_kwargs"]
        )
        assert theirs["text"].startswith(text_of(chat, tokenizer)[:20])
    both = {"prompt": [TURN], "completion": [{"role": "assistant", "content": "w6"}]}
    assert as_dataset([both, both | {"tools": [CALL]}]).column_names == ["prompt", "completion", "tools"]
    with pytest.raises(htsr.UsageError, match="all of one form"):
        as_dataset([both, {"prompt": "a", "completion": "b"}])


def test_a_template_that_refuses_turns():
    from tests.transformer import word_tokenizer

    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles alternate') }}"
    with pytest.raises(htsr.SourceError, match=r"the chat template cannot write .*'w5'.*: roles alternate"):
        text_of({"messages": [TURN]}, tokenizer)
