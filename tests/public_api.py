"""What users may rely on, as text: every name of `htsr.__all__`, and every command with its options.

`python -m tests.public_api` writes public_api.txt anew.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import typer
from htsr_cli.main import app

import htsr

LIST = Path(__file__).with_name("public_api.txt")


def public_api() -> str:
    """The list, one line a fact."""
    lines = [line for name in sorted(htsr.__all__) if name != "__version__" for line in of_name(name)]
    return "\n".join([*lines, "", *of_command(typer.main.get_command(app), "htsr")]) + "\n"


def of_name(name: str) -> Iterator[str]:
    """A function with its signature, or a class with its fields and its own methods."""
    thing = getattr(htsr, name)
    if not inspect.isclass(thing):
        yield f"{name}{signature(thing)}"
        return
    bases = ", ".join(base.__name__ for base in thing.__bases__ if base is not object)
    yield f"class {name}({bases})" if bases else f"class {name}"
    constructor = vars(thing).get("__init__")
    if dataclasses.is_dataclass(thing):
        yield from (
            f"{name}.{field.name}: {field.type}{default(field)}"
            for field in dataclasses.fields(thing)
            if not field.name.startswith("_")
        )
    elif inspect.isfunction(constructor):
        yield f"{name}.__init__{signature(constructor)}"
    members: dict[str, Any] = {}
    for owner in reversed(thing.__mro__):
        if owner.__module__.startswith("htsr"):
            members |= {key: value for key, value in vars(owner).items() if not key.startswith("_")}
    for key, member in sorted(members.items()):
        if isinstance(member, property):
            yield f"{name}.{key}: property{signature(member.fget).rpartition(')')[2]}"
        elif isinstance(member, (classmethod, staticmethod)):
            yield f"{name}.{key}{signature(member.__func__)}  # {type(member).__name__}"
        elif inspect.isfunction(member):
            yield f"{name}.{key}{signature(member)}"


def default(field: dataclasses.Field[Any]) -> str:
    """What a field is if nothing is said."""
    if field.default is not dataclasses.MISSING:
        return f" = {field.default!r}"
    if field.default_factory is not dataclasses.MISSING:
        return f" = {field.default_factory()!r}"
    return ""


class _Words(str):
    """An annotation, shown without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def signature(function: Any) -> str:
    """Parameters with annotations and defaults, as the source has them."""
    found = inspect.signature(function)
    parameters = [
        p.replace(annotation=_Words(p.annotation)) if isinstance(p.annotation, str) else p
        for p in found.parameters.values()
    ]
    result = found.return_annotation
    result = _Words(result) if isinstance(result, str) else result
    return str(found.replace(parameters=parameters, return_annotation=result))


def of_command(command: Any, path: str) -> Iterator[str]:
    """A command's arguments and options with the types of its function, and those of its commands."""
    yield path
    types = get_type_hints(command.callback) if command.callback else {}
    for parameter in command.params:
        if parameter.name not in types:  # Typer's own, for completion in the shell
            continue
        given = [*parameter.opts, *parameter.secondary_opts]
        names = "/".join(given) if parameter.param_type_name == "option" else parameter.metavar
        value = "" if parameter.required else f" = {parameter.default!r}"
        kind = inspect.formatannotation(types[parameter.name]).replace("pathlib._local.", "pathlib.")  # of Python 3.13
        yield f"{path} {names}: {kind}{value}"
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        yield from of_command(inner, f"{path} {name}")


if __name__ == "__main__":
    LIST.write_text(public_api())
