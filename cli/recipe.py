"""The `htsr recipe` command."""

from __future__ import annotations

from typing import Annotated

import typer


def recipe(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="The recipe to print; without it all are listed.")
    ] = None,
) -> None:
    """The recipes that htsr carries: what each is for, or the text of one, to be copied and changed.

    For example:  [bold]htsr recipe one_cpu > my.yaml[/bold]
    """
    from htsr.errors import UsageError
    from htsr.finetuning.reading import recipe_text, shipped

    known = shipped()
    if name is None:
        width = max(map(len, known))
        for key, purpose in known.items():
            typer.echo(f"{key:<{width}}  {purpose}")
    elif name in known:
        typer.echo(recipe_text(name), nl=False)
    else:
        from htsr.finetuning.recipe_values import nearest

        raise UsageError(f"htsr carries no recipe {name}{nearest(name, known)}")
