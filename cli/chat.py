"""The `htsr chat` command."""

from __future__ import annotations

from typing import Annotated

import typer
from htsr_cli.options import Device, Quiet, Revision, Seed, Verbose

_GOES_ON = "goes on with what you write; text of several lines, such as headings, comes by a pipe"
_AS_TRAINED = "; it has no chat template, and wants the text as it was trained, headings and line breaks included"


def chat(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of a model or an adapter, hub id, or .gguf file.")
    ],
    system: Annotated[str | None, typer.Option(help="Turn of the system, before the first.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="0 for the likeliest token; by default as the model says.", show_default=False),
    ] = None,
    seed: Seed = 0,
    revision: Revision = None,
    device: Device = "auto",
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Talk with a model: line by line on a terminal; of a pipe all is one question.

    A model without a chat template goes on with the text as it is, its last line break included.

    For example:  [bold]echo 'What is a spectrum?' | htsr chat runs/first[/bold]
    """
    import sys

    from htsr_cli.output import Words

    from htsr.analysis.devices import pick_device
    from htsr.errors import UsageError
    from htsr.finetuning.chat import open_chat
    from htsr.reporting.text import visible

    words = Words(quiet, verbose)
    interactive = sys.stdin.isatty()
    text = "" if interactive else sys.stdin.read()
    if not interactive and not text.strip():
        raise UsageError("nothing was said on standard input")
    options: dict[str, float] = {"max_new_tokens": max_tokens}
    if temperature is not None:
        options |= {"do_sample": temperature > 0} | ({"temperature": temperature} if temperature > 0 else {})
    with words.of_others():
        from transformers import set_seed

        talk = open_chat(model, revision=revision, device=pick_device(device), system=system, options=options)
        set_seed(seed)

    def tell(piece: str) -> None:
        sys.stdout.write("\n".join(map(visible, piece.split("\n"))))
        sys.stdout.flush()

    def ask(text: str) -> None:
        answered = talk.answer(text, tell)
        tell("\n")
        if not answered.strip():
            words.say(f"htsr: the answer is empty{'' if talk.has_template else _AS_TRAINED}")

    if not interactive:
        ask(text.removesuffix("\n") if talk.has_template else text)  # a turn ends by itself
        return
    words.say(f"htsr: {model} {'answers' if talk.has_template else _GOES_ON}; Ctrl-D ends")
    while True:
        try:
            text = input("> ")
        except EOFError:
            tell("\n")
            return
        if text.strip():
            try:
                ask(text)
            except UsageError as error:
                words.say(f"htsr: {error}")
