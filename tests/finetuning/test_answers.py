"""Answers are found in what a chat template writes, as they are where it marks them."""

import re
from types import SimpleNamespace

import pytest

import htsr
from htsr.calibration.record_texts import as_dataset
from htsr.finetuning.answers import AnswerTemplate, _within, answers_alone, marked, spans_of
from htsr.finetuning.tokens import tokenized, with_labels
from tests.transformer import llama, word_tokenizer

pytest.importorskip("trl")

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n'}}[{{message['content'] + '<|im_end|>' + '\n'}}]{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "}}[{{ message['content'] | trim + '<|eot_id|>' }}]{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}{{ '[INST] ' }}{% if loop.index0 == 1 "
    "and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}{{ message.content + ' [/INST]' }}"
    "{% elif message.role == 'assistant' %}[{{ ' ' + message.content + eos_token }}]{% endif %}{% endfor %}"
)
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who wrote it?"},
    {"role": "assistant", "content": " She did. "},
    {"role": "user", "content": "She did. When?"},
    {"role": "assistant", "content": "In spring, or in May"},
]
CHATS = [{"messages": turns} for turns in (TURNS, TURNS[1:], TURNS[1:3], TURNS[:4], TURNS[2:], TURNS[:2])]
ALONE = SimpleNamespace(completion_only_loss=None, assistant_only_loss=True, dataset_num_proc=None)


def plain(template):
    return template.replace("}}[{{", "}}{{").replace("}}]{%", "}}{%").replace("%}[{{", "%}{{")


def with_marks(template):
    """The template with marks by hand, around what it writes of an assistant's turn."""
    begin = "{% if message['role'] == 'assistant' %}{% generation %}"
    parts = re.fullmatch(r"(.*)\[(\{\{.*?\}\})\](.*)", template, re.S).groups()
    return f"{parts[0]}{begin}{parts[1]}{{% endgeneration %}}{{% else %}}{parts[1]}{{% endif %}}{parts[2]}"


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer of pieces of words, of which some are an end and a beginning at once."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [f"<|{word}|>" for word in ("im_start", "im_end", "start_header_id", "end_header_id", "eot_id")]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<s>", "</s>", *special], initial_alphabet=alphabet)
    inner.train_from_iterator([turn["content"] + "\n\n" for turn in TURNS] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.mark.parametrize("template", [SMOLLM2, LLAMA3, MISTRAL])
def test_answers_are_those_of_the_same_template_with_marks_by_hand(tokenizer, template):
    chats = [chat for chat in CHATS if chat["messages"][0]["role"] != "assistant"]
    tokenizer.chat_template = with_marks(template)
    assert AnswerTemplate.of(tokenizer) == AnswerTemplate(True)
    expected = list(tokenized(chats, tokenizer, ALONE))
    tokenizer.chat_template = plain(template)
    assert AnswerTemplate.of(tokenizer) == AnswerTemplate(False)
    found = list(tokenized(chats, tokenizer, ALONE))
    assert found == expected
    assert [any(tokens.labels) for tokens in found] == [True, True, True, True, False]
    answer = tokenizer.decode([i for i, its in zip(found[2].ids, found[2].labels, strict=True) if its])
    assert answer.split()[0] == "She"
    assert answer.strip().endswith({SMOLLM2: "<|im_end|>", LLAMA3: "<|eot_id|>", MISTRAL: "</s>"}[template])
    said = []
    assert answers_alone("m", tokenizer, chats, None, said.append)
    assert said == [
        "messages: the answers alone have labels; training.assistant_only_loss: false gives them to all tokens"
    ]


def test_answers_are_those_of_the_templates_that_trl_has_marked(tokenizer):
    from importlib.resources import files

    folder, equal = files("trl") / "chat_templates", set()
    for marked_file in folder.iterdir():
        own = folder / marked_file.name.replace("_training", "")
        if "_training" not in marked_file.name or not own.is_file():
            continue
        for chat in (CHATS[1], CHATS[2]):
            record, turns = chat, chat["messages"]
            tokenizer.chat_template = own.read_text()
            try:
                found = marked(turns, record, tokenizer, AnswerTemplate(False))
                theirs = marked(turns, record, tokenizer, AnswerTemplate(True, marked_file.read_text()))
            except htsr.SourceError:  # no chat of texts, or one whose beginning is not written alike
                continue
            if found[0] == theirs[0]:  # others write more into their template than marks
                # some of TRL's begin with the header of the turn, which the question ends with when the model is asked
                assert all(its or not ours for ours, its in zip(found[1], theirs[1], strict=True)), marked_file.name
                equal |= {marked_file.name.removesuffix("_training.jinja")} if found == theirs else set()
    assert {"llama3", "gemma", "gemma3", "cohere", "lfm2", "qwen3_instruct_2507"} <= equal


@pytest.mark.parametrize("own_turn", ["", "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"])
def test_the_beginning_of_another_answer_is_no_part_of_an_answer(tokenizer, own_turn):
    """That Llama 3's first template writes after whatever turn is the last, whether or not it is asked for."""
    chats, begin = CHATS[1:3], "<|start_header_id|>assistant<|end_header_id|>\n\n"
    tokenizer.chat_template = plain(LLAMA3).replace("{{ bos_token }}", f"{{{{ bos_token }}}}{own_turn}")
    expected = list(tokenized(chats, tokenizer, ALONE))
    tokenizer.chat_template = re.sub(
        r"{% if add_generation_prompt %}(.*?){% endif %}", r"\1", tokenizer.chat_template, flags=re.S
    )
    always, said = list(tokenized(chats, tokenizer, ALONE)), []
    for asked, unasked in zip(expected, always, strict=True):
        assert tokenizer.decode(unasked.ids) == tokenizer.decode(asked.ids) + begin
        answers = [
            tokenizer.decode([i for i, its in zip(t.ids, t.labels, strict=True) if its]) for t in (asked, unasked)
        ]
        # with a turn of the template's own before all others, what headers begin with counts as the end
        assert answers[1] == (
            answers[0].replace("<|eot_id|>", "<|eot_id|><|start_header_id|>") if own_turn else answers[0]
        )
    assert answers_alone("m", tokenizer, chats, True, said.append)
    assert not said
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if loop.last and m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    )
    (found,) = tokenized(CHATS[2:3], tokenizer, ALONE)
    assert tokenizer.decode([i for i, its in zip(found.ids, found.labels, strict=True) if its]) == " She did. </s>"


def test_a_token_of_the_next_question_is_none_of_the_answer_whose_last_space_it_has():
    assert list(_within("[a] </s> [b]", [(0, 3), (4, 8), (8, 10)], [(3, 9)])) == [False, True, False]


def test_an_answer_that_is_written_otherwise_once_others_follow_has_no_label(tokenizer):
    """The last one has: up to it the chat is what the model is asked."""
    last = "'<s>' * (loop.last and message['role'] == 'assistant')"
    tokenizer.chat_template = plain(SMOLLM2).replace("{{message['content']", f"{{{{{last} + message['content']")
    said = []
    for wanted in (None, True):
        assert answers_alone("m", tokenizer, CHATS[:3], wanted, said.append)
    assert said[0] == said[2]
    assert said[0].endswith("m writes 2 of the answers otherwise once others follow: these have no label")
    (found,) = tokenized(CHATS[:1], tokenizer, ALONE)
    answers = tokenizer.decode([i for i, its in zip(found.ids, found.labels, strict=True) if its])
    assert answers == "<s>In spring, or in May<|im_end|>\n"


def test_what_cannot_be_told_is_said_or_refused(tokenizer):
    late = MISTRAL.replace("loop.index0 == 1", "loop.last")
    tokenizer.chat_template = plain(late)  # with the system's turn in a question that is the last turn
    said = []
    assert not answers_alone("m", tokenizer, CHATS[:3], None, said.append)
    assert said[0].startswith("messages: every token has a label")
    assert "writes the turns up to {'role': 'assistant', 'content': 'In spring, or in May'} otherwise than" in said[0]
    assert "(so in 1 of 3 chats)" in said[0]
    with pytest.raises(htsr.SourceError, match=r"assistant_only_loss: the chat template writes the turns up to .* wit"):
        answers_alone("m", tokenizer, CHATS[:3], True, said.append)
    assert not answers_alone("m", tokenizer, CHATS, False, said.append)
    assert not answers_alone("m", tokenizer, [{"text": "a"}], None, said.append)
    assert len(said) == 1
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    assert answers_alone("m", tokenizer, CHATS[2:3], None, said.append)
    assert "ends an answer by no special token within it" in said[-1]


def test_a_turn_that_answers_nobody_is_no_answer(tokenizer):
    tokenizer.chat_template = plain(SMOLLM2)
    text, spans = spans_of(TURNS[2:], {}, tokenizer)
    assert [text[first:last] for first, last in spans] == ["In spring, or in May<|im_end|>\n"]


def test_trl_takes_them_as_it_takes_its_own(tmp_path, caplog):
    import datasets
    from trl import SFTConfig

    from htsr.finetuning.recipe import Data, Recipe
    from htsr.finetuning.trainer import FinetuneTrainer

    body = (
        "{% for message in messages %}{{ message.role == 'user' and '<s> ' or '' }}[{{ message.content + ' </s> ' }}]"
    )
    body += "{% endfor %}"
    chats = [
        {"messages": [{"role": "user", "content": f"w{i} w9"}, {"role": "assistant", "content": "w6"}] * (i - 3)}
        for i in (4, 5, 6, 7, 8)
    ]
    recipe = Recipe(model="m", output=str(tmp_path), data=Data(train="t"), method="full")
    for more in ({}, {"packing": True}):
        rows = []
        for template in (with_marks(body), plain(body)):
            tokenizer = word_tokenizer()
            tokenizer.chat_template = template
            arguments = SFTConfig(
                str(tmp_path),
                assistant_only_loss=True,
                max_length=24,
                bf16=False,
                use_cpu=True,
                max_steps=1,
                report_to="none",
                **more,
            )
            found = as_dataset(chats)
            if template == plain(body):
                found = with_labels(found, tokenizer, arguments)
                arguments.assistant_only_loss = False
            trainer = FinetuneTrainer(
                recipe=recipe, model=llama(1), args=arguments, processing_class=tokenizer, train_dataset=found
            )
            rows.append([{key: row[key] for key in ("input_ids", "labels")} for row in trainer.train_dataset])
        assert rows[0] == rows[1]
        assert any(-100 in row["labels"] for row in rows[0])

    def two():
        yield chats[0]
        yield from [{"messages": [{"role": "assistant"}]}] * 12  # what nobody can write

    stream = with_labels(datasets.IterableDataset.from_generator(two), tokenizer, ALONE)
    assert [any(label != -100 for label in row["labels"]) for row in stream] == [True] + [False] * 12
    told = [message for message in caplog.messages if message.startswith("a record is left out")]
    assert [message.split(": ")[0].split("(")[1] for message in told] == [
        f"{count} so far, told of at 1, 10, 100 …)" for count in (1, 10)
    ]
    assert "the chat template cannot write [{'role': 'assistant'}]" in told[0]


def test_a_run_that_began_with_labels_of_all_tokens_does_not_go_on_with_others(tmp_path):
    from htsr.finetuning.preflight import Prepared
    from htsr.finetuning.run_folder import check_same_data, write_json

    before, now = (Prepared(None, CHATS, [], [], None, None, answers_by_default=its) for its in (False, True))
    write_json(tmp_path / "data.json", before.digests)
    check_same_data(before.digests, tmp_path)
    with pytest.raises(
        htsr.UsageError, match=r"other data.*: labels, None and now .*assistant_only_loss: false has those"
    ):
        check_same_data(now.digests, tmp_path)
