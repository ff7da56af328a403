"""What `htsr finetune --check` does, once its arguments are understood."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from htsr_cli.conditions import say_error
from htsr_cli.output import Target, Words, console

from htsr.finetuning.budget import parse_memory
from htsr.finetuning.reading import check_options
from htsr.ranks import is_first
from htsr.reporting.text import visible

if TYPE_CHECKING:
    from htsr.finetuning.check import Check
    from htsr.finetuning.preview import Shown
    from htsr.finetuning.recipe import Recipe

MOST_CHARACTERS = 400  # of a piece of a record; of a longer one beginning and end are shown


def check(recipe: Recipe, words: Words, target: Target, *, resume: bool, memory: str | None) -> int:
    """Check `recipe`, show what it will do, and say what would be refused; returns the exit code."""
    size = None if memory is None else parse_memory(memory)
    with words.of_others():
        check_options(recipe)
        from htsr.finetuning.check import check as look

        found = look(recipe, resume=resume, memory=size)
    if not is_first():
        return 0
    if target.format == "table" and target.output is None:
        show(found)
    target.write(found, words)
    for note in found.notes:
        words.say(note)
    for sentence in found.refusals:
        say_error(sentence)
    return 0 if not found.refusals else 2 if found.is_wrong_usage else 1


def show(found: Check) -> None:
    """Print the recipe, and records in which tokens that enter the loss stand out.

    On a terminal these are in colour, elsewhere between ⟦ and ⟧.
    """
    from rich.text import Text

    to = console()
    to.print(found.text, soft_wrap=True)  # to be copied: a line that is folded is another value
    colours = sys.stdout.isatty()
    marked = "in colour" if colours else "between ⟦ and ⟧"
    for number, record in enumerate(found.preview.shown if found.preview else (), start=1):
        cut = f", {record.cut:,} more are cut off" if record.cut else ""
        head = f"record {number}: {record.tokens:,} tokens{cut}; {record.labels:,} enter the loss, {marked}"
        to.print(Text(head, style="bold" if colours else ""))
        to.print(_marked(record, colours), soft_wrap=True)
        to.print()


def _marked(record: Shown, colours: bool) -> Any:
    from rich.text import Text

    text = Text()
    for piece, is_label in record.pieces:
        shown = "\n".join(map(visible, _short(piece).split("\n")))
        if colours:
            text.append(shown, style="green" if is_label else "dim")
        else:
            text.append(f"⟦{shown}⟧" if is_label else shown)
    return text


def _short(piece: str) -> str:
    if len(piece) <= MOST_CHARACTERS:
        return piece
    half = MOST_CHARACTERS // 2
    return f"{piece[:half]} … ({len(piece) - 2 * half:,} characters) … {piece[-half:]}"
