"""YAML into frozen dataclasses: every key known, every value of its kind, sizes bounded."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from htsr.errors import Refusals, UsageError
from htsr.finetuning.other_names import told

MOST_CHARACTERS, MOST_VALUES, MOST_ENTRIES = 30_000, 10_000, 2_000


def load_yaml(text: str) -> Any:
    """What a YAML `text` says, where 1e-4 is a number.

    Raises:
        ValueError: it is no YAML, says a key of one section twice, or has a size that no recipe has, its anchors
            written out.

    Examples:
        >>> from htsr.finetuning.recipe_values import load_yaml
        >>> load_yaml("training: {learning_rate: 1e-4, max_steps: 10}")
        {'training': {'learning_rate': 0.0001, 'max_steps': 10}}
    """
    import yaml

    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"a text of more than {MOST_CHARACTERS:,} characters is no recipe")
    if sum(map(text.count, "[{,\n")) > MOST_ENTRIES:  # the parser is slow, and takes the square of a depth
        raise ValueError(f"more than {MOST_ENTRIES:,} entries: no recipe has as many")
    Loader = _with_numbers(yaml.SafeLoader)
    try:
        loader = Loader(text)
        try:
            node = loader.get_single_node()
            if node is not None:
                _written_out(node, {})
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("sections inside sections without end") from None
    except Exception as error:  # besides its own errors, those of dates, numbers and keys
        raise ValueError(" ".join(str(error).split())[:300]) from error


def dump_yaml(content: Any) -> str:
    """`content` as a YAML text from which `load_yaml` reads the same.

    Args:
        content: dictionaries, lists, texts, numbers, true, false and null.

    Examples:
        >>> from htsr.finetuning.recipe_values import dump_yaml
        >>> print(dump_yaml({"model": "1e-4", "training": {"learning_rate": 1e-4}}), end="")
        model: '1e-4'
        training:
          learning_rate: 0.0001
    """
    import yaml

    Dumper = _with_numbers(yaml.SafeDumper)
    Dumper.ignore_aliases = lambda *_: True
    how = {"Dumper": Dumper, "sort_keys": False, "width": 120}
    text = str(yaml.dump(content, allow_unicode=True, **how))
    if any(mark in text for mark in "\x85\u2028\u2029"):  # which PyYAML writes as line breaks, and reads as spaces
        text = str(yaml.dump(content, allow_unicode=False, **how))
    return text


def _with_numbers(base: type) -> Any:
    """A loader or dumper for which 1e-4 is a number, which YAML 1.1 takes for a word."""
    kind: Any = type(base.__name__, (base,), {})
    number = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    kind.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return kind


def _written_out(node: Any, known: dict[int, int]) -> int:
    """Number of values under a node with its anchors written out.

    Raises:
        ValueError: there are too many, a node holds itself, or a section has a key twice.
    """
    if id(node) in known:
        if known[id(node)] == 0:
            raise ValueError("an anchor that holds itself")
        return known[id(node)]
    known[id(node)] = 0
    inner = node.value if isinstance(node.value, list) else []
    _insist_on_one_of_each([item[0] for item in inner if isinstance(item, tuple)])
    parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
    size = 1 + sum(_written_out(part, known) for part in parts)
    if size > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES:,} values, anchors written out: no recipe has as many")
    known[id(node)] = size
    return size


def _insist_on_one_of_each(keys: Sequence[Any]) -> None:
    """Refuse a key that a section has twice, of which PyYAML keeps the last."""
    lines: dict[tuple[str, str], int] = {}
    for key in keys:
        if not isinstance(key.value, str) or key.tag == "tag:yaml.org,2002:merge":  # several << drop nothing
            continue
        line = key.start_mark.line + 1
        if first := lines.get((key.tag, key.value)):
            where = f"line {line}" if first == line else f"lines {first} and {line}"
            raise ValueError(f"{key.value[:80]} stands twice in one section, in {where}: write it once")
        lines[key.tag, key.value] = line


def made(kind: Any, content: Mapping[str, Any], where: str) -> Any:
    """The dataclass `kind` made of keys and values.

    Args:
        kind: a dataclass, whose fields are the keys.
        content: values by key.
        where: file or section, for the message.

    Raises:
        UsageError: a key is unknown or missing, or a value is of another kind; its place is named.
    """
    hints, refusals = get_type_hints(kind), Refusals()
    refusals.unless(_check_keys, kind, hints, content, where)
    values = {
        key: refusals.unless(_value, hints[key], value, f"{where}: {key}")
        for key, value in content.items()
        if key in hints
    }
    refusals.end()
    try:
        return kind(**values)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def _check_keys(kind: Any, hints: Mapping[str, Any], content: Mapping[str, Any], where: str) -> None:
    unknown = [key for key in content if key not in hints]
    if len(unknown) == 1:
        raise UsageError(f"{where}: unknown key {str(unknown[0])[:80]}{nearest(unknown[0], hints)}")
    if unknown:
        words = [told(key).replace("here it is", "here") for key in unknown[:40]]
        named = [f"{str(key)[:80]}{f' ({of})' if of else ''}" for key, of in zip(unknown, words, strict=False)]
        raise UsageError(f"{where}: unknown keys {', '.join(named)}{', …' * (len(unknown) > len(named))}")
    for f in fields(kind):
        missing = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if missing and f.name not in content:
            raise UsageError(f"{where}: the key {f.name} is missing")


def _value(hint: Any, value: Any, where: str) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            return made(option, value, where)
        if get_origin(option) is Literal:
            if isinstance(value, str) and value in get_args(option):
                return value
            raise UsageError(f"{where} is one of {', '.join(map(str, get_args(option)))}, not {kind_of(value)}")
        if get_origin(option) is tuple and isinstance(value, list):
            return tuple(_value(get_args(option)[0], one, f"{where}[{i}]") for i, one in enumerate(value))
        if get_origin(option) is Mapping and isinstance(value, dict):
            return value
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                break
        if option in (int, str, bool) and type(value) is option:
            return value
    kinds = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    wanted = " or ".join(
        kinds.get(option, "a list" if get_origin(option) is tuple else "a section of keys")
        for option in options
        if option is not type(None)
    )
    raise UsageError(f"{where} is {wanted}, not {kind_of(value)}")


def kind_of(value: Any) -> str:
    """What a message calls a `value`: the value itself where it is short, else its kind or its beginning."""
    if isinstance(value, (dict, list)):
        return "a section of keys" if isinstance(value, dict) else "a list"
    text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "a number beyond reason"
    return text if len(text) <= 80 else f"{text[:77]}…"


def nearest(key: Any, known: Any) -> str:
    """Which of the `known` keys an unknown `key` may have meant, as the end of a message."""
    import difflib

    if words := told(key):
        return f"; {words}"
    near = difflib.get_close_matches(str(key)[:80], list(known), n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}" if len(known) < 20 else ""
