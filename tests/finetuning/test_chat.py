"""`htsr chat` says what transformers' generate says, and `htsr export` what llama.cpp's converter writes."""

import io
import json
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from htsr_cli.main import main
from peft import LoraConfig, get_peft_model

import htsr
from htsr.calibration.loading import absolute, load_model
from htsr.finetuning.chat import open_chat
from tests.transformer import llama, word_tokenizer

TEMPLATE = (
    "{% set marks = {'system': 'w12', 'user': 'w10', 'assistant': 'w11'} %}"
    "{% for turn in messages %}{{ marks[turn['role']] }} {{ turn['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}w11{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and one of turns, and an adapter of the first."""
    folder = tmp_path_factory.mktemp("chat")
    model, tokenizer = llama(2), word_tokenizer()
    model.save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    model.save_pretrained(folder / "turns")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "turns")
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    )
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "plain")
    adapted.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    word_tokenizer().save_pretrained(folder / "merged")
    return folder


def test_an_adapter_names_its_base_by_a_path_that_holds_anywhere(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    adapted = get_peft_model(load_model("plain", causal=True), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    base = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(folder / "plain") == absolute(str(folder / "plain"))
    assert absolute("owner/plain") == "owner/plain"


def test_a_base_that_is_not_there_is_told_with_the_adapter_that_names_it(folder, tmp_path):
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) | {
        "base_model_name_or_path": "gone"
    }
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    adapter = str(tmp_path / "adapter")
    for read in (open_chat, partial(htsr.analyze, base="auto")):
        with pytest.raises(
            htsr.SourceError, match=r"^gone .*; it is the base that adapter_config.json in .*adapter names"
        ):
            read(adapter)


def generated(folder, text, tokens=6):
    """What transformers alone makes of a `text`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    new = model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)


def piped(monkeypatch, capsys, text, *arguments):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    code = main(["chat", *map(str, arguments), "--device", "cpu", "--max-tokens", "6", "--temperature", "0"])
    return code, *capsys.readouterr()


def test_a_pipe_is_one_question(folder, monkeypatch, capsys):
    for name in ("plain", "merged"):
        code, out, _ = piped(monkeypatch, capsys, "w5 w6\n", folder / name)
        assert (code, out.split()) == (0, generated(folder / name, "w5 w6").split())
    assert piped(monkeypatch, capsys, "w5 w6\n", folder / "adapter")[1] == out  # on the base that it names
    assert out.split() != generated(folder / "plain", "w5 w6").split()
    _, out, _ = piped(monkeypatch, capsys, "w5 w6", folder / "turns", "--system", "w7")
    assert out.split() == generated(folder / "turns", "w12 w7 w10 w5 w6 w11").split()
    for more, sentence in (([], "nothing was said"), (["--system", "w7"], "has no chat template")):
        code, out, err = piped(monkeypatch, capsys, "w5" if more else " \n", folder / "plain", *more)
        assert (code, out) == (2, "")
        assert sentence in err


def test_a_text_is_read_as_it_is_and_an_answer_of_nothing_is_told(folder, monkeypatch, capsys):
    read = []
    monkeypatch.setattr("htsr.finetuning.chat.Chat.answer", lambda _, text, tell: read.append(text) or "")
    headed = "### Instruction:\nw5\n\n### Response:\n"  # training ends the prompt by this line break
    code, out, err = piped(monkeypatch, capsys, headed, folder / "plain")
    assert (code, out, read.pop()) == (0, "\n", headed)
    assert "the answer is empty" in err
    assert "no chat template" in err
    code, out, err = piped(
        monkeypatch, capsys, "w5\n\n", folder / "turns"
    )  # of echo, whose line break is not the turn's
    assert (code, out, read.pop()) == (0, "\n", "w5\n")
    assert "the answer is empty" in err
    assert "no chat template" not in err


def test_turns_are_remembered_until_they_are_too_long(folder, monkeypatch, capsys):
    said = iter(["w5", "", "w6 w7"])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)

    def ask(_prompt):
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    assert main(["chat", str(folder / "turns"), "--device", "cpu", "--max-tokens", "6", "--temperature", "0"]) == 0
    out, err = capsys.readouterr()
    assert "answers; Ctrl-D ends" in err
    first = generated(folder / "turns", "w10 w5 w11")
    second = generated(folder / "turns", f"w10 w5 w11 {first} w10 w6 w7 w11")
    assert [line.split() for line in out.splitlines() if line] == [first.split(), second.split()]
    talk = open_chat(str(folder / "turns"), options={"max_new_tokens": 6, "do_sample": False})
    talk.model.config.max_position_embeddings = 16
    for text in ("w5", "w6 w7", "w8 w9"):  # the last goes without the first turns
        talk.answer(text)
    assert talk.turns[-1]["content"] == generated(folder / "turns", "w10 w8 w9 w11")
    with pytest.raises(htsr.UsageError, match="more than the 16 that the model reads"):
        talk.answer("w5 " * 12)


CONVERTER = """#!{python}
import sys
folder, _, file, _, kind = sys.argv[1:]
print("words of the converter")
if kind == "q9":
    print("unknown type q9", file=sys.stderr)
    sys.exit(2)
open(file, "w").write(kind + open(folder + "/config.json").read())
"""


def test_the_converter_is_found_and_writes_whole_or_not_at_all(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    file, plain = tmp_path / "a.gguf", str(folder / "plain")
    export = ["export", plain, "--gguf", str(file)]
    assert main([*export, "--outtype", "f16"]) == 1  # the commands, to be copied
    command = f"python llama.cpp/convert_hf_to_gguf.py {plain} --outfile {file} --outtype f16"
    assert command in (err := capsys.readouterr().err).splitlines()
    assert "converting" not in err  # nothing does
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "convert_hf_to_gguf.py"
    script.write_text(CONVERTER.format(python=sys.executable))
    script.chmod(0o755)
    assert main([*export, "--outtype", "q9"]) == 1
    assert "could not convert" in (err := capsys.readouterr().err)
    assert "unknown type q9" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin"]
    assert main([*export, "--outtype", "f16"]) == 0
    assert file.read_text() == "f16" + Path(plain, "config.json").read_text()
    assert main(export) == 2  # nor is one overwritten
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "bin"))
    file.unlink()
    assert main(export) == 0
    assert file.read_text().startswith("auto{")
    capsys.readouterr()
    for arguments, code, sentence in (
        ([str(tmp_path), "--gguf", "b.gguf"], 1, "holds no model"),
        ([plain, "--gguf", "b.bin"], 2, "ends in .gguf"),
    ):
        assert main(["export", *arguments]) == code
        assert sentence in capsys.readouterr().err
    monkeypatch.setenv("LLAMA_CPP", str(folder))
    assert main(["export", plain, "--gguf", str(tmp_path / "c.gguf")]) == 1
    assert "there is no convert_hf_to_gguf.py in it" in capsys.readouterr().err
