"""A finished run on the hub: the folder of the result, without checkpoints, in one commit."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from htsr.errors import HtsrError, reason_of
from htsr.finetuning.run_folder import ACCURACY_BEFORE, DATA
from htsr.finetuning.starts import START

# what only --resume reads, and arguments that name places of this machine
_KEPT_BACK = ("_*", "checkpoint-*", "*training_args.bin", DATA, START, ACCURACY_BEFORE)


def hub_repository(arguments: Any) -> str | None:
    """The repository that TRL's `arguments` name for the result, made where it is not there; None where none is wanted.

    Raises:
        HtsrError: the hub does not give it.
    """
    if not arguments.push_to_hub:
        return None
    from huggingface_hub import HfApi

    name = arguments.hub_model_id or Path(arguments.output_dir).absolute().name
    try:
        made = HfApi().create_repo(name, private=arguments.hub_private_repo, exist_ok=True)
    except Exception as error:  # of the network, the login or the name
        raise HtsrError(
            f"training.push_to_hub: the hub does not give the repository {name}: {reason_of(error)}"
        ) from error
    return str(made.repo_id)


def publish(repository: str, arguments: Any, output: Path) -> None:
    """Push the folder `output` to the `repository`: model, adapter, card, results and spectra.

    Args:
        repository: name of the repository.
        arguments: arguments of TRL, of which hub_revision is read.
        output: folder of the result.

    Raises:
        HtsrError: the hub does not take it; the result itself is whole.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().upload_folder(
            repo_id=repository,
            folder_path=str(output),
            commit_message="Model, adapter where there is one, card and reports of the run",
            ignore_patterns=list(_KEPT_BACK),
            revision=arguments.hub_revision,
        )
    except Exception as error:  # of the network, the login or the hub
        command = ["hf", "upload", repository, str(output)]
        command += ["--revision", arguments.hub_revision] if arguments.hub_revision else []
        command += [word for pattern in _KEPT_BACK for word in ("--exclude", pattern)]
        raise HtsrError(
            f"the result in {output} is whole, but {repository} does not take it: {reason_of(error)}. Push it by "
            f"{shlex.join(command)}"
        ) from error
