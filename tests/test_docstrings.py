"""What can be proved of docstrings without understanding them: nothing public is undescribed, nothing else described,
and every example prints what it says.

Descriptions are read by griffe, as the documentation is, so nothing is imported for them.
"""

import ast
import builtins
import doctest
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import griffe
import pytest
import torch

import htsr
from htsr import errors

ERRORS = {
    name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.HtsrError)
}

FOLDER = Path(htsr.__file__).parent

# In other modules (reporting, the files of results, work shared among processes) a parameter may go without a word.
API = re.compile(r"htsr\.(?!reporting\.|analysis\.(execution|journal|saving)\.)")
# Methods whose parameters are those of the Trainer that calls them, or of Lightning's.
OF_THE_TRAINER = ("on_train_begin", "on_log", "on_step_end", "on_evaluate", "create_model_card")
OF_THE_TRAINER += ("on_train_start", "on_train_batch_end", "on_validation_end")

ARRAY = re.compile(r"\b(Array|ArrayLike|Floats|NDArray|Tensor|Vector)\b")
AXIS = r"(?:min\(m, n\)|[\w…·'/-]+)"
SHAPE = re.compile(rf"\({AXIS},(?: ?{AXIS}(?: \w+)?,?)*\)|\bshape\b|\bscalar\b")

# A description is a phrase of its own, which no reader has to complete: "seed of the draws", never "of the draws".
CLIPPED = re.compile(r"(as|by|for|from|in|likewise|of|on|over|that|to|whose|with)\b", re.IGNORECASE)

Object = griffe.Function | griffe.Class | griffe.Attribute


@pytest.fixture(scope="module")
def public() -> list[Object]:
    package = griffe.load("htsr", docstring_parser="google", search_paths=[FOLDER.parent])
    found = list(_public(package))
    assert len(found) > 300
    return found


def _public(container: griffe.Object) -> Iterator[Object]:
    """Functions, classes, their methods and properties whose names, and whose module's, do not begin with _."""
    for member in container.members.values():
        if member.is_alias or member.name.startswith("_"):
            continue
        if member.is_module or member.is_class:
            if member.is_class:
                yield member
            yield from _public(member)
        elif member.is_function or "property" in member.labels:
            yield member


def _section(thing: Object, kind: str) -> dict[str, str]:
    """Descriptions by name in a section of a docstring; errors are named by their class."""
    parsed = thing.docstring.parsed if thing.docstring else []
    items = [item for section in parsed if section.kind.value == kind for item in section.value]
    return {str(getattr(item, "name", None) or item.annotation).lstrip("*"): item.description for item in items}


def _is_dataclass(thing: Object) -> bool:
    return thing.is_class and "dataclass" in thing.labels


def _fields(thing: griffe.Class) -> set[str]:
    return {
        name
        for name, member in thing.members.items()
        if member.is_attribute and "property" not in member.labels and not name.startswith("_")
    }


def _constructor(thing: Object, names: tuple[str, ...] = ("__init__",)) -> list[griffe.Function]:
    """The function itself; of a class those of its own methods that make it."""
    if thing.is_function:
        return [thing]
    return [thing.members[name] for name in names if thing.is_class and name in thing.members]


def _parameters(thing: Object) -> dict[str, str]:
    """Annotations by name of what a caller passes."""
    if _is_dataclass(thing):
        return {}
    return {
        parameter.name.lstrip("*"): str(parameter.annotation or "")
        for function in _constructor(thing)
        for parameter in function.parameters
        if parameter.name not in ("self", "cls") and not parameter.name.startswith("_")
    }


def _raised(function: griffe.Function) -> set[str]:
    """The errors of htsr that the body raises by name, functions inside it not counted."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call):
                found.add(getattr(child.exc.func, "id", ""))
            visit(child)

    for statement in ast.parse(textwrap.dedent(function.source)).body:  # empty where a dataclass makes it
        visit(statement)
    return found & ERRORS


def test_every_public_name_has_a_docstring(public):
    assert not [thing.path for thing in public if not thing.docstring]


def test_every_parameter_is_described(public):
    """Under Args; inside the package a name in backticks, or a matrix's letter, in the text will do."""
    missing = []
    for thing in public:
        if not API.match(thing.path) or thing.name in OF_THE_TRAINER:
            continue
        owner = thing.parent.name if thing.parent.is_class else thing.name
        text = thing.docstring.value
        for name in _parameters(thing).keys() - _section(thing, "parameters").keys():
            word = rf"\b{name}\b" if len(name) == 1 else f"`{name}`"
            if owner in htsr.__all__ or not re.search(word, text):
                missing.append(f"{thing.path}({name})")
    assert not missing, "\n".join(missing)


def test_every_field_is_described(public):
    assert not [
        f"{thing.path}.{name}"
        for thing in public
        if _is_dataclass(thing)
        for name in _fields(thing) - _section(thing, "attributes").keys()
    ]


def test_nothing_is_described_that_does_not_exist(public):
    stale = []
    for thing in public:
        stale += [f"{thing.path}({name})" for name in _section(thing, "parameters").keys() - _parameters(thing).keys()]
        known = ERRORS | vars(builtins).keys() | {"LinAlgError"}
        stale += [f"{thing.path}: {name}" for name in _section(thing, "raises").keys() - known]
        if _is_dataclass(thing):
            stale += [f"{thing.path}.{name}" for name in _section(thing, "attributes").keys() - _fields(thing)]
    assert not stale, "\n".join(stale)


def test_every_error_that_is_raised_is_named(public):
    unnamed = {
        thing.path: missing
        for thing in public
        for function in _constructor(thing, ("__init__", "__post_init__"))
        if (missing := _raised(function) - _section(thing, "raises").keys())
    }
    assert not unnamed


def test_every_array_has_a_shape(public):
    without = []
    for thing in public:
        if not API.match(thing.path):
            continue
        text = thing.docstring.value
        described = _section(thing, "parameters") | _section(thing, "attributes")
        arrays = _parameters(thing)
        if _is_dataclass(thing):
            arrays |= {name: str(thing.members[name].annotation) for name in _fields(thing)}
        for name, annotation in arrays.items():
            if _is_array(annotation) and not SHAPE.search(described.get(name, text)):
                without.append(f"{thing.path}({name})")
        if thing.is_function and _is_array(str(thing.returns or "")) and not SHAPE.search(text):
            without.append(f"{thing.path} -> {thing.returns}")
    assert not without, "\n".join(without)


def _is_array(annotation: str) -> bool:
    return ARRAY.search(annotation) is not None and not annotation.startswith("Callable")


def test_descriptions_are_whole_phrases(public):
    clipped = []
    for thing in public:
        parsed = thing.docstring.parsed if thing.docstring else []
        for section in parsed:
            if section.kind.value in ("parameters", "attributes", "returns", "raises"):
                clipped += [
                    f"{thing.path}: {item.description}" for item in section.value if CLIPPED.match(item.description)
                ]
    assert not clipped, "\n".join(clipped)


def test_examples_stand_in_their_section(public):
    """Elsewhere the documentation's site shows ``>>>`` as quotations."""
    bare = []
    for thing in public:
        sections = [section for section in thing.docstring.parsed if section.kind.value == "examples"]
        inside = sum(_examples(text) for section in sections for _, text in section.value)
        bare += [thing.path] if inside < _examples(thing.docstring.value) else []
    assert not bare


def test_every_function_of_the_api_has_an_example():
    functions = [name for name in htsr.__all__ if inspect.isfunction(getattr(htsr, name))]
    assert functions
    assert not [name for name in functions if ">>>" not in inspect.getdoc(getattr(htsr, name))]


def _modules_with_examples() -> list[str]:
    """Names of the modules that have a line of an example."""
    return [
        ".".join(path.relative_to(FOLDER.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted(FOLDER.rglob("*.py"))
        if _examples(path.read_text(encoding="utf-8"))
    ]


def _examples(source: str) -> int:
    return len(re.findall(r"^ *>>> ", source, re.MULTILINE))


@pytest.mark.parametrize("name", _modules_with_examples())
def test_examples(name, tmp_path, monkeypatch):
    """An example imports what it uses, seeds what it draws, and leaves no file behind but in an empty folder."""
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    found = doctest.DocTestFinder().find(module, name, globs={"__name__": "__main__"})
    failures: list[str] = []
    for example in found:
        with torch.random.fork_rng(devices=[]):
            runner.run(example, out=failures.append)
    assert not failures, "".join(failures)
    assert sum(len(example.examples) for example in found) == _examples(Path(module.__file__).read_text("utf-8"))
