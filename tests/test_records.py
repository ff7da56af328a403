"""Records that cannot be used are refused with their place and reason."""

import pytest

import htsr
from htsr.records import as_dataset, question_of, read_records, split, text_of

QUESTION = {"question": "Why?", "choices": ["x", "y"], "answer": 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": ', "a.jsonl, line 3: no JSON object"),
        ("a.jsonl", b'{"text": "a"}\n"b"\n', "line 2: one JSON object a line is wanted, not a str"),
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
    with pytest.raises(htsr.SourceError, match="nor a data set that can be had"):
        read_records(str(tmp_path / "nothing:train"), limit)


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
