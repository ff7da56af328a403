"""The pages that map other tools to htsr: complete on their side, true on ours."""

import ast
import inspect
import logging
import re
import warnings
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

import htsr

PAGES = Path(__file__).parents[1] / "reports" / "documentation" / "pages"
COMING_FROM = sorted((PAGES / "coming-from").glob("*.md"))
HERE = [*COMING_FROM, *PAGES.glob("faq.md")]
CODE = re.compile(r"`([^`]+)`")


def tables(page: Path) -> list[dict[str, str]]:
    """Rows of all tables of a page: cells by the title of their column."""
    rows, header = [], None
    fenced = False
    for line in page.read_text(encoding="utf-8").splitlines():
        fenced ^= line.startswith("```")
        if fenced or not line.startswith("|"):
            header = None
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if header is None:
            header = cells
        elif not set(line) <= set("|-: "):
            assert len(cells) == len(header), f"{page.name}: {line}"
            rows.append(dict(zip(header, cells, strict=True)))
    return rows


def theirs(page: str) -> set[str]:
    """What stands in backticks in the first column of a page's tables; of a call also its arguments."""
    found = set()
    for row in tables(PAGES / "coming-from" / page):
        for code in CODE.findall(next(iter(row.values()))):
            found |= {code} | set(re.findall(r"\w+", code))
    return found


def weightwatcher():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("weightwatcher")
    logging.getLogger("weightwatcher").setLevel(logging.CRITICAL)
    return module


METHODS = (
    "__init__", "analyze", "describe", "get_summary", "get_details", "get_ESD", "get_Weights", "get_framework_layer",
    "distances", "model_deltas", "matrix_distance", "SVDSmoothing", "SVDSharpness", "analyze_vectors",
)  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_argument_of_weightwatcher_is_on_its_page(method):
    signature = inspect.signature(getattr(weightwatcher().WeightWatcher, method))
    wanted = set(signature.parameters) - {"self"}
    assert not wanted - theirs("weightwatcher.md"), method
    assert method in ("__init__", "analyze") or method in theirs("weightwatcher.md")


def test_the_defaults_of_its_analyze_are_as_it_has_them():
    parameters = inspect.signature(weightwatcher().WeightWatcher.analyze).parameters
    rows = [row for row in tables(PAGES / "coming-from" / "weightwatcher.md") if "default" in row]
    stated = {name: row["default"] for row in rows for name in CODE.findall(row["WeightWatcher"])}
    assert stated == {
        name: str(p.default) if p.default != p.default or not isinstance(p.default, str) else repr(p.default)
        for name, p in parameters.items()
        if name != "self"
    }


@pytest.fixture(scope="module")
def run():
    """A small model, and what WeightWatcher makes of it with all options on."""
    module = weightwatcher()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30, bias=False))
    model[0].weight.data += 0.3 * torch.randn(30, 1) * torch.randn(1, 40)
    watcher = module.WeightWatcher(model=model)
    watcher.analyze(ERG=True, randomize=True, mp_fit=True, vectors=True, fix_fingers="clip_xmax", savefig=False)
    return model, watcher


def test_every_column_of_weightwatcher_is_on_its_page(run):
    """Those that a run has with all options on, and those that its source adds to a row."""
    model, watcher = run
    columns = set(watcher.get_details()) | set(watcher.describe())
    columns |= set(watcher.distances(model, model)[2].reset_index())
    for call in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(type(watcher))))):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_column":
            if isinstance(call.args[0], ast.Constant):
                columns.add(call.args[0].value)
    assert {"alpha", "slice_id", "Xflag", "Lambda", "raw_alpha", "bulk_var_part_ratio", "delta_W"} <= columns
    assert not columns - theirs("weightwatcher.md")


def test_the_formulas_that_stand_for_columns_are_right(run):
    model, watcher = run
    (theirs_row,) = watcher.get_details().itertuples()
    analysis = htsr.analyze(model, device="cpu", bulk=True, permuted=True, fit="clip_xmax")
    row, eigenvalues = analysis[0], analysis.eigenvalues[analysis[0].name]
    scale = (row.num_eigenvalues / row.norm) ** 0.5
    assert theirs_row.W_scale == pytest.approx(scale)
    assert theirs_row.rand_W_scale == pytest.approx(scale)
    assert theirs_row.sv_max == pytest.approx(row.lambda_max**0.5)
    assert theirs_row.sv_min == pytest.approx(eigenvalues[0] ** 0.5)
    assert theirs_row.weak_rank_loss == (eigenvalues < 1e-6).sum()
    assert theirs_row.raw_alpha == pytest.approx(htsr.analyze(model, device="cpu")[0].alpha)
    sigma = row.sigma_mp * scale * row.N**0.5
    assert theirs_row.sigma_mp == pytest.approx(sigma, rel=0.3)  # another estimate of the bulk
    assert theirs_row.rand_sigma_mp == pytest.approx(1.0, rel=0.1)
    assert theirs_row.ww_softrank == pytest.approx(row.max_rand_eval / row.lambda_max, rel=0.3)  # another permutation
    assert (row.rand_threshold / row.max_rand_eval < 1) == (row.num_traps > 0)


def test_every_key_and_argument_of_galore_is_on_its_page():
    """Keys of a param group that its optimizers read, and what they are made with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        galore = pytest.importorskip("galore_torch")
    keys = set()
    for optimizer in (galore.GaLoreAdamW, galore.GaLoreAdamW8bit):
        source = inspect.getsource(inspect.getmodule(optimizer))
        keys |= set(re.findall(r"""\bgroup\[["'](\w+)["']\]""", source)) - {"weight_decay_saved"}
        keys |= set(inspect.signature(optimizer).parameters)
    assert {"rank", "update_proj_gap", "scale", "proj_type", "lr", "is_paged"} <= keys
    assert not keys - theirs("low-rank.md")


def text(value) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def test_the_presets_are_as_the_table_has_them():
    from htsr.training.layerwise.policy import PRESETS

    rows = [row for row in tables(PAGES / "coming-from" / "layerwise.md") if "`llr`" in row]
    fields_shown = [row["htsr"].strip("`").removeprefix("Policy.") for row in rows]
    assert len(fields_shown) > 10
    published = {name: policy for name, policy in PRESETS.items() if name != "ends"}
    for name, policy in published.items():
        stated = {field: row[f"`{name}`"] for field, row in zip(fields_shown, rows, strict=True)}
        del stated["bounds"]  # in words of their own
        if name == "tempbalance":
            assert stated.pop("interval") == "to be given"
        assert stated == {field: text(getattr(policy, field)) for field in stated}, name


def test_the_defaults_of_recipes_are_as_the_table_has_them():
    from htsr.finetuning.recipe import LowRank, Sampling

    rows = [row["htsr"] for row in tables(PAGES / "coming-from" / "low-rank.md") if "GaLore (script; README)" in row]
    found = 0
    for cell in rows:
        for section, name, value in re.findall(r"`(sampling|low_rank)\.(\w+)`: ([\w.]+)", cell):
            assert value == text(
                getattr({"sampling": Sampling(), "low_rank": LowRank().filled("galore")}[section], name)
            ), name
            found += 1
    assert found == 8


@cache
def options() -> dict[str, set[str]]:
    """Options of each command of `htsr`."""
    import typer.main
    from htsr_cli.main import app

    found = {}

    def walk(command, name):
        found[name] = {
            option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        for sub, inner in getattr(command, "commands", {}).items():
            walk(inner, f"{name} {sub}")

    walk(typer.main.get_command(app), "htsr")
    return found


@cache
def names() -> dict[str, set[str]]:
    """What may follow the dot of a name in the column of htsr."""
    from htsr.analysis.comparison import Pair
    from htsr.analysis.distance import Distance
    from htsr.finetuning.recipe import Data, EarlyStopping, Gum, Lora, LowRank, Recipe, Sampling

    found = {"htsr": set(htsr.__all__)}
    kinds = (htsr.Options, htsr.Policy, htsr.LayerMetrics, htsr.Filter, htsr.Windows, htsr.Analysis, Distance, Pair)
    for kind in (*kinds, htsr.LowRankAdamW, htsr.LayerSampler):
        own = {name for name in dir(kind) if not name.startswith("_")} | set(inspect.signature(kind).parameters)
        found[kind.__name__] = own
    for name in ("lora_config", "layerwise", "low_rank_groups", "predict_memory", "measure_outliers", "analyze"):
        found[name] = set(inspect.signature(getattr(htsr, name)).parameters)
    sections = {"data": Data, "sampling": Sampling, "low_rank": LowRank, "gum": Gum, "lora": Lora}
    for section, kind in (sections | {"early_stopping": EarlyStopping}).items():
        found[section] = {f.name for f in fields(kind)}
    found["recipe"] = {f.name for f in fields(Recipe)}
    return found


def problems(code: str) -> list[str]:
    """What of a piece of code in the column of htsr does not exist."""
    from htsr.errors import UsageError
    from htsr.finetuning.arguments import check_training

    wrong = []
    words = code.split()
    if words[0] == "htsr":
        command = max((name for name in options() if code == name or code.startswith(f"{name} ")), key=len)
        if command == "htsr" and len(words) > 1:
            wrong.append(f"no command {code}")
        known = options()[command]
    else:
        known = set().union(*options().values())
    wrong += [flag for flag in re.findall(r"(?<!\S)--[\w-]+", code) if flag not in known]
    owned = [] if words[0] == "htsr" else re.findall(r"(?<![\w./])(\w+)\.(\w+)", code)  # files in a command line
    for owner, name in owned:
        if owner == "training":
            try:
                check_training({name: None})
            except UsageError as error:
                if f"training.{name} is None" not in str(error):  # the name exists, with values of another kind
                    wrong.append(str(error))
        if owner in names() and name not in names()[owner]:
            wrong.append(f"{owner}.{name}")
        if owner[0].isupper() and owner not in names():
            wrong.append(f"nothing is known of {owner}")
    return wrong


@pytest.mark.parametrize("page", COMING_FROM, ids=lambda page: page.stem)
def test_every_name_of_htsr_exists(page):
    rows = tables(page)
    assert len(rows) > 20
    assert all("htsr" in row for row in rows), "every table has a column called htsr"
    codes = [code for row in rows for code in CODE.findall(row["htsr"])]
    assert len(codes) > 20
    assert not {code: wrong for code in codes if (wrong := problems(code))}


def test_a_name_that_does_not_exist_is_found():
    for code in (
        "--no-such",
        "htsr analyze --keep",
        "htsr nothing",
        "Options.alpha",
        "sampling.gamma",
        "htsr.optimise",
    ):
        assert problems(code), code
    for code in ("--bulk", "htsr project --keep", "Options.fit", "sampling.active", "htsr.esd(W)", "auto"):
        assert not problems(code), code


@pytest.mark.parametrize("page", HERE, ids=lambda page: page.stem)
def test_every_command_line_is_understood(page):
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    assert not {line: wrong for line in lines if line.startswith("htsr ") and (wrong := problems(line))}


def test_a_key_of_another_tool_is_told_what_it_is_here(tmp_path):
    """As the page on these tools has it; of a whole file of theirs all keys are named at once."""
    from htsr.finetuning.other_names import HERE
    from htsr.finetuning.reading import read_keys

    assert not {theirs: wrong for theirs, ours in HERE.items() if (wrong := problems(ours.partition(",")[0]))}
    for row in tables(PAGES / "coming-from" / "llamafactory.md"):
        for code in CODE.findall(row["LLaMA-Factory"] + row["Axolotl"]):
            ours = HERE.get(code, "").split(":")[0].split(",")[0]
            section = ours.partition(".")[0]
            shown = row["htsr"].replace("recipe.", "")
            assert not ours or section in ("lora", "model_options", "source") or ours in shown, (code, ours, shown)
    page = (PAGES / "coming-from" / "llamafactory.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        (tmp_path / "theirs.yaml").write_text(block, encoding="utf-8")
        with pytest.raises(htsr.UsageError, match=r"unknown keys .* \(here model\), .* \(here training\.max_length\)"):
            read_keys(str(tmp_path / "theirs.yaml"))
    (tmp_path / "one.yaml").write_text("model: M\noutput: o\ndata: {train: t}\nlearning_rate: 1e-4\n")
    with pytest.raises(htsr.UsageError, match=r"unknown key learning_rate; here it is training\.learning_rate"):
        read_keys(str(tmp_path / "one.yaml"))


@pytest.mark.parametrize(
    ("key", "here"),
    [
        ("train_on_inputs: false", "training.completion_only_loss, which is its opposite (of chats training.assistant"),
        ("train_on_prompt: false", "training.completion_only_loss, which is its opposite (of chats training.assistant"),
        ("pissa_init: true", "lora.options.init_lora_weights: pissa"),
    ],
)
def test_a_key_whose_value_would_mean_something_else_here_is_told_with_it(tmp_path, key, here):
    from htsr.finetuning.reading import read_recipe

    for section in ("", "data", "lora", "training"):
        recipe = {"model": "M", "output": "o", "data": {"train": "t"}, "training": {}, "lora": {}}
        (recipe[section] if section else recipe).update(yaml.safe_load(key))
        (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        with pytest.raises(htsr.UsageError, match=f"; here it is {re.escape(here)}"):
            read_recipe(str(tmp_path / "theirs.yaml"))


@pytest.mark.parametrize(("page", "method"), [("low-rank", "owlore"), ("llamafactory", "lora")])
def test_its_recipe_can_be_read(tmp_path, page, method):
    from htsr.finetuning.reading import read_recipe

    page = (PAGES / "coming-from" / f"{page}.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
    assert read_recipe(str(tmp_path / "recipe.yaml")).method == method


@pytest.mark.parametrize("page", HERE, ids=lambda page: page.stem)
def test_links_within_the_pages_lead_somewhere(page):
    """To a page that is there, or one of those that are written beside these."""
    siblings = {"index", "analyze", "layerwise", "fine-tune", "reading-a-report", "which-metric", "definitions"}
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            file = (page.parent / target).resolve()
            assert file.exists() or (file.parent == PAGES.resolve() and file.stem in siblings), target
