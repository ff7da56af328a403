"""Every code block of the README and of the documentation's pages runs.

Blocks of Python on one page share a namespace, which begins with `starts`; those of bash are run by bash, those of YAML
are recipes. They run in a folder of the page's own that holds small models under the names that the pages use: MODEL,
BASE, FINE_TUNED, ADAPTER, A, B, and two checkpoints in RUN, with data and recipes. A block that cannot run, or takes
too long as it stands, says so in a comment above it:

    <!-- not run: it installs packages, which CI does itself -->
    <!-- run with --config small.yaml: the recipe takes minutes -->

The second appends what it says to the last command of the block. Blocks of text are not code. Bash blocks that hold
nothing but commands of htsr, which may read from one of bash and write to a file, run in this process, which has torch
imported already.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
import yaml
from htsr_cli.main import main
from markdown_it import MarkdownIt

import htsr
from htsr.finetuning.reading import FOLDER, read_recipe
from tests.transformer import llama, word_tokenizer

ROOT = Path(__file__).parents[1]
SITE = ROOT / "reports" / "documentation"
PAGES = SITE / "pages"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(PAGES.rglob("*.md"))]
MARK = re.compile(r"<!-- (not run|run with (?P<more>[^:]+)): (?P<why>\w.*) -->")
PLAIN = re.compile(  # nothing that bash would expand
    r"""(?:(?P<before>(?:echo|printf)(?:[^'"|]|'[^']*'|"[^"]*")*)\| )?"""
    r"""(?P<command>htsr(?:[^'"#|&;<>$`*?(){}\[\]\\!~]|'[^']*'|"[^"$`\\]*")*)(?:> (?P<file>[\w./]+))?(?:\s+#.*)?"""
)
PRELUDE = r"""
set -euo pipefail
python() { "$PYTHON" "$@"; }
accelerate() { python -m accelerate.commands.accelerate_cli "$@"; }
torchrun() { python -m torch.distributed.run "$@"; }
htsr() { # 3 is what --fail-on is for
  local code=0
  python -m htsr_cli.main "$@" || code=$?
  [[ $code == 3 && " $* " == *" --fail-on "* ]] || return "$code"
}
"""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the number of its first line, and what the comment above it says."""

    language: str
    code: str
    line: int
    run: bool = True
    more: str = ""


def blocks(text: str) -> list[Block]:
    """The blocks of a page; a comment that looks like a mark and is none, or stands above no block, is an error."""
    tokens = MarkdownIt("commonmark").parse(text)
    found, mark = [], None
    for token in tokens:
        if token.type == "html_block" and re.search(r"<!-- (not )?run\b", token.content):
            mark = MARK.search(token.content)
            assert mark, f"line {token.map[0] + 1}: not a mark that the test knows: {token.content}"
        elif token.type in ("fence", "code_block"):
            run = mark is None or bool(mark["more"])
            found.append(Block(token.info, token.content, token.map[0] + 2, run, mark["more"] or "" if mark else ""))
            mark = None
        else:
            assert mark is None, f"a mark above no block: {mark[0]}"
    assert mark is None, f"a mark above no block: {mark[0]}"
    return found


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A folder with everything that the pages name."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("documentation")
    for name, seed in (("MODEL", 0), ("BASE", 0), ("FINE_TUNED", 1), ("A", 0), ("B", 1)):
        model = llama(2)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += seed * 0.01 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    for step, name in ((100, "A"), (200, "B")):
        shutil.copytree(folder / name, folder / "RUN" / f"checkpoint-{step}")
    adapter = get_peft_model(llama(2), LoraConfig(r=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    adapter.peft_config["default"].base_model_name_or_path = "BASE"
    adapter.save_pretrained(folder / "ADAPTER")
    texts = [" ".join(f"w{4 + (i + j) % 60}" for j in range(12)) for i in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    question = {"question": "w5 w6", "choices": ["w7", "w8 w9"], "answer": 0}
    (folder / "test.jsonl").write_text(f"{json.dumps(question)}\n" * 4)
    small = yaml.safe_load((FOLDER / "one_cpu.yaml").read_text()) | {"model": "MODEL"}
    small["sampling"] |= {"active": 1, "threshold": 3.0}
    small["low_rank"] |= {"rank": 8}
    small["training"] |= {"max_steps": 2, "max_length": 32, "save_steps": 1, "eval_on_start": False}
    (folder / "small.yaml").write_text(yaml.safe_dump(small))
    data = {"data": {"train": "train.jsonl"}, "output": "runs/first"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(small | data))
    return folder


def starts() -> dict[str, object]:
    """What a page's Python begins with."""
    model = llama(2, width=64)
    tokens = torch.randint(3, 64, (8, 16), generator=torch.Generator().manual_seed(0))
    return {
        "__name__": "page",
        "htsr": htsr,
        "torch": torch,
        "model": model,
        "model_or_path": "MODEL",
        "batches": [{"input_ids": rows, "labels": rows} for rows in tokens.split(2)],
        "dataset": [{"input_ids": row, "labels": row} for row in tokens],
    }


def shell(block: Block, folder: Path) -> subprocess.CompletedProcess[str]:
    """The block, run by bash."""
    code = block.code
    if block.more:
        lines = code.rstrip().splitlines()
        lines[-1] = f"{lines[-1].split(' #')[0].rstrip()} {block.more}"
        code = "\n".join(lines)
    environment = os.environ | {
        "PYTHON": sys.executable,
        "HTSR_CACHE": str(folder / "cache"),
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(["bash", "-c", PRELUDE + code], cwd=folder, env=environment, capture_output=True, text=True)


@dataclass(frozen=True)
class Command:
    """The arguments of `htsr`, the command of bash that it reads from, and the file that it writes to."""

    arguments: list[str]
    before: str = ""
    file: str = ""


def plain_commands(block: Block) -> list[Command]:
    """What `htsr` is told, line by line, where a block of bash holds nothing else; or no lines."""
    found = [PLAIN.fullmatch(line) for line in block.code.strip().splitlines()]
    if block.more or not all(found):
        return []
    return [
        Command(shlex.split(line["command"])[1:], (line["before"] or "").strip(), line["file"] or "") for line in found
    ]


def run_here(command: Command, folder: Path, monkeypatch) -> int:
    """The exit code of a command that runs in this process."""
    if command.before:
        said = subprocess.run(["bash", "-c", command.before], capture_output=True, text=True, check=True).stdout
        monkeypatch.setattr("sys.stdin", io.StringIO(said))
    if not command.file:
        return main(command.arguments)
    with (folder / command.file).open("w") as file, contextlib.redirect_stdout(file):
        return main(command.arguments)


def name_of(document: Path) -> str:
    return str(document.relative_to(PAGES if PAGES in document.parents else ROOT).with_suffix(""))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_code_blocks_run(document, prepared, tmp_path, monkeypatch):
    folder = tmp_path / "page"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MPLBACKEND", "agg")
    namespace = starts()
    for block in blocks(document.read_text(encoding="utf-8")):
        where = f"{document.name}, line {block.line}"
        if not block.run or block.language == "text":
            continue
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.code, str(document), "exec"), namespace)
        elif block.language == "bash" and (commands := plain_commands(block)):
            for command in commands:
                code = run_here(command, folder, monkeypatch)
                assert code == 0 or (code == 3 and "--fail-on" in command.arguments), f"{where}: {command}, {code}"
        elif block.language == "bash":
            done = shell(block, folder)
            assert done.returncode == 0, f"{where}:\n{block.code}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        elif block.language == "yaml":
            (tmp_path / "block.yaml").write_text(block.code)
            read_recipe(str(tmp_path / "block.yaml"))
        else:
            pytest.fail(f"{where}: a block says what it is: python, bash, yaml or text, not {block.language!r}")


def test_marks():
    page = "<!-- not run: {} -->\n```bash\nls\n```\n"
    assert [block.run for block in blocks(page.format("it needs several GPUs"))] == [False]
    more = blocks("<!-- run with --a b: takes minutes -->\n\n```bash\nls\nhtsr x # y\n```\n")
    assert [(block.run, block.more, block.line) for block in more] == [(True, "--a b", 4)]
    for wrong in (page.format(""), "<!-- not run -->\n```bash\nls\n```\n", "<!-- not run: why -->\n\ntext\n"):
        with pytest.raises(AssertionError, match="mark"):
            blocks(wrong)


def test_what_needs_bash_is_run_by_it():
    lines = "htsr analyze A --role 'attn.*' --include \"*.o\"  # all\nhtsr --version\n"
    expected = [Command(["analyze", "A", "--role", "attn.*", "--include", "*.o"]), Command(["--version"])]
    assert plain_commands(Block("bash", lines, 1)) == expected
    lines = 'echo "a | b" | htsr chat A\nhtsr analyze A > b.txt  # all\n'
    expected = [Command(["chat", "A"], 'echo "a | b"'), Command(["analyze", "A"], file="b.txt")]
    assert plain_commands(Block("bash", lines, 1)) == expected
    for line in (
        "htsr analyze A >> b",
        "cat a | htsr chat A",
        "htsr analyze A | head",
        "htsr analyze *.npz",
        "htsr analyze $A",
        "ls",
        "htsr a; ls",
        "htsr a && b",
        "htsr ~",
    ):
        assert not plain_commands(Block("bash", f"htsr analyze A\n{line}\n", 1)), line
    assert not plain_commands(Block("bash", "htsr finetune\n", 1, more="--config a"))


def test_a_block_that_fails_is_found(prepared, tmp_path):
    for code in ("htsr analyze NOTHING", "false\ntrue", "htsr analyze MODEL --fail-on 'alpha>0'; exit 3"):
        assert shell(Block("bash", code, 1), prepared).returncode != 0, code
    assert shell(Block("bash", "htsr analyze MODEL --fail-on 'alpha>0'", 1), prepared).returncode == 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document):
    """Those to files of the repository, as they lie there."""
    for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", document.read_text(encoding="utf-8")):
        if not target.startswith(("http", "studies/", "../studies/")):
            assert (document.parent / target).exists(), target


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("mkdocs")
    specification = importlib.util.spec_from_file_location("hooks", SITE / "hooks.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_every_column_is_defined(hooks):
    meanings = hooks.attributes(htsr.LayerMetrics)
    assert list(meanings) == [field.name for field in fields(htsr.LayerMetrics)]
    assert all(f"| `{name}` | " in hooks.metric_table() for name in meanings)
    assert meanings["name"].endswith("for a part of a fused tensor.")


def test_links_to_the_repository_are_turned(hooks):
    assert hooks.turned("../../estimators/README.md#x", "") == "studies/estimators/README.md#x"
    assert hooks.turned("../../../pictures/report.png", "coming-from") == "../studies/pictures/report.png"
    assert hooks.turned("../../../htsr/finetuning/recipes/one_cpu.yaml", "") == "recipes/one_cpu.yaml"
    for own in ("analyze.md", "../definitions.md", "../../../../README.md", "https://example.org/a"):
        assert hooks.turned(own, "coming-from") == own


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", SITE / "mkdocs.yml", "-d", tmp_path / "site"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site" / "studies" / "index.html").exists()


def test_the_page_on_reports_explains_all_that_a_report_shows():
    from htsr.analysis.tables import METRICS
    from htsr.reporting import figures

    page = (PAGES / "reading-a-report.md").read_text(encoding="utf-8")
    shown = {column.header for column, _ in METRICS}
    shown |= set(figures.LABELS.values()) | set(figures.LABELS)
    assert not {word for word in shown if word not in page}
    from htsr.spectra.notes import notes

    warnings = re.findall(r"^    ([a-zA-Z-]+(?: [\w<>]+)*)  +\S", notes.__doc__, re.MULTILINE)
    assert {"tail of 7", "heavy tail α<2"} <= set(warnings)
    assert not {word for word in warnings if f"`{word}`" not in page}
