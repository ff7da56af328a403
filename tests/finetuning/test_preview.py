"""What is shown before training is what TRL makes of the records."""

import json

import pytest
import yaml

from htsr.errors import UsageError
from htsr.finetuning.labels import check_tools
from htsr.finetuning.preview import preview
from tests.transformer import llama, word_tokenizer

pytest.importorskip("trl")

TEMPLATE = (
    "{% for m in messages %}{{ m.role == 'user' and '<s> ' or '' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }} </s> {% endgeneration %}{% else %}{{ m.content }} {% endif %}{% endfor %}"
)
TEXTS = [{"text": " ".join(f"w{4 + j}" for j in range(size))} for size in (3, 9, 20, 1, 7, 40)]
COMPLETIONS = [{"prompt": " ".join(["w5"] * size), "completion": " w6 w7"} for size in (2, 5, 31, 40)]
CHATS = [
    {"messages": [{"role": "user", "content": f"w{i} w9"}, {"role": "assistant", "content": "w6"}] * i}
    for i in (4, 5, 6)
]
TURNS = [
    {"prompt": [{"role": "user", "content": f"w{i}"}], "completion": [{"role": "assistant", "content": "w6 w7"}]}
    for i in (4, 5, 6)
]


@pytest.mark.parametrize(
    ("records", "training"),
    [
        (TEXTS, {}),
        (TEXTS, {"packing": True, "packing_strategy": "wrapped"}),
        (TEXTS, {"packing": True, "packing_strategy": "bfd", "shuffle_dataset": True}),
        (COMPLETIONS, {}),
        (COMPLETIONS, {"truncation_mode": "keep_end"}),
        (COMPLETIONS, {"completion_only_loss": False}),
        (COMPLETIONS, {"packing": True}),  # of the last record the prompt fills a sequence, and no label is left
        (COMPLETIONS, {"packing": True, "packing_strategy": "wrapped", "max_length": 8}),
        (COMPLETIONS, {"packing": True, "packing_strategy": "bfd_split", "max_length": 8}),
        (CHATS, {"max_length": 20}),
        (CHATS, {"assistant_only_loss": True}),
        (TURNS, {}),
        (TURNS, {"assistant_only_loss": True}),
    ],
)
def test_the_preview_is_what_trl_makes(tmp_path, records, training):
    from htsr.calibration.record_texts import as_dataset
    from htsr.finetuning.arguments import training_arguments
    from htsr.finetuning.reading import read_recipe
    from htsr.finetuning.trainer import FinetuneTrainer

    content = {"model": "m", "output": str(tmp_path / "run"), "data": {"train": "t.jsonl"}, "method": "full"}
    content["training"] = {"max_length": 32, "max_steps": 1, "report_to": "none", **training}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(content))))
    recipe = read_recipe(str(tmp_path / "recipe.yaml"))
    arguments = training_arguments(recipe)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    found = preview(records, tokenizer, arguments)
    trainer = FinetuneTrainer(
        recipe=recipe, model=llama(1), args=arguments, processing_class=tokenizer, train_dataset=as_dataset(records)
    )
    theirs = list(trainer.train_dataset)
    assert found.sequences(arguments) == len(theirs)
    assert found.records == len(records)
    assert found.labels == sum(label != -100 for row in theirs for label in row["labels"])
    assert all(any(label != -100 for label in row["labels"]) for row in theirs)
    if arguments.packing:
        if records is TEXTS:  # else there are sequences without a label
            assert found.tokens == sum(len(row["input_ids"]) for row in theirs)
        return
    by_text = {tokenizer.decode(row["input_ids"]): row for row in theirs}
    assert len(found.shown) == 3
    for shown in found.shown:
        text = "".join(piece for piece, _ in shown.pieces)
        assert len(text.split()) == shown.tokens
        if shown.labels:
            row = by_text[text]
            marks = [has_label for piece, has_label in shown.pieces for _ in piece.split()]
            assert marks == [label != -100 for label in row["labels"]]
    assert found.cut.cut == sum(size > arguments.max_length for size in found_sizes(records, tokenizer))
    assert found.lengths["longest"] == max(found_sizes(records, tokenizer))


def found_sizes(records, tokenizer):
    sizes = []
    for record in records:
        if "messages" in record or isinstance(record.get("prompt"), list):
            turns = record.get("messages") or record["prompt"] + record["completion"]
            sizes.append(len(tokenizer.apply_chat_template(turns, tokenize=False).split()))
        else:
            sizes.append(len((record.get("text") or record["prompt"] + record["completion"]).split()) + 1)
    return sizes


def test_a_template_that_writes_no_calls_is_refused_and_one_that_writes_no_tools_is_told():
    tokenizer, told = word_tokenizer(), []
    call = {"type": "function", "function": {"name": "w9", "arguments": {}}}
    turns = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    records = [{"messages": turns, "tools": [{"name": "w9"}]}, {"messages": turns}, CHATS[0]]
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(UsageError, match="tool_calls: the chat template of m does not write them, in 2 of 2 records"):
        check_tools("m", tokenizer, records, told.append)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ m.tool_calls or '' }}{% endfor %}"
    check_tools("m", tokenizer, records, told.append)
    assert told == ["tools: the chat template of m does not write them, in 1 records that have some"]
    check_tools("m", tokenizer, [CHATS[0], {"text": "w5"}], told.append)
    assert len(told) == 1
