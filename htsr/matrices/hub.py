"""Models by hub id: the needed files only, through huggingface_hub and its cache (offline too)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from htsr.errors import SourceError
from htsr.matrices.folders import TRANSFORMERS_ORDER, shards_of

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_FILES = (
    ".safetensors",
    ".gguf",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".npz",
    ".json",
    ".jsonl",
    ".txt",
    ".csv",
    ".parquet",
)
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "*.md", "*.py", "*.tiktoken")


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a hub id: ``owner/model`` or ``model``, and not that of a path to a file."""
    looks_local = name.startswith(".") or ".." in name or name.endswith(_FILES)
    return bool(_HUB_ID.match(name)) and not looks_local


def answers(repo: str, revision: str | None = None, kind: Literal["model", "dataset"] = "model") -> bool:
    """Whether the hub answers that it has `repo`: one question without retries, before anything is loaded from it.

    Args:
        repo: ``owner/name`` or ``name``.
        revision: branch, tag or commit; the default branch if None.
        kind: model or data set.

    Returns:
        False where the hub cannot be reached, so that only the cache is left.

    Raises:
        SourceError: the hub has no such repository or revision.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    what = {"model": "model", "dataset": "data set"}[kind]
    try:
        HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=10)
    except GatedRepoError:
        return True  # who may have what is for the download to say
    except RepositoryNotFoundError as error:
        raise SourceError(f"{repo} is no file or folder here, nor a {what} on the hub") from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{repo} has no revision {revision}") from error
    except Exception:  # offline by choice, no network, an ill server: each HTTP library has errors of its own
        return False
    return True


@contextmanager
def reached(repo: str, revision: str | None = None, kind: Literal["model", "dataset"] = "model") -> Iterator[None]:
    """A context in which huggingface_hub uses only its cache if the hub does not answer for `repo`.

    Without it each file would be asked for again and again, and each failure logged.

    Args:
        repo: ``owner/name`` or ``name``.
        revision: branch, tag or commit; the default branch if None.
        kind: model or data set.

    Raises:
        SourceError: the hub has no such repository or revision.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = not answers(repo, revision, kind)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def fetch(repo: str, revision: str | None = None) -> Path:
    """The local folder of a hub model, downloaded as far as it is not in the cache.

    Args:
        repo: ``owner/model`` or ``model``.
        revision: branch, tag or commit; the default branch if None.

    Raises:
        SourceError: the hub has no such model or revision, refuses access, or has no weights in a known format; or it
            cannot be reached, and the cache does not hold the model.
    """
    with reached(repo, revision):
        return _fetched(repo, revision)


def _fetched(repo: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    offline = False

    def get(file: str) -> Path | None:
        nonlocal offline
        try:
            return Path(hf_hub_download(repo, file, revision=revision))
        except LocalEntryNotFoundError:
            offline = True
            return None
        except EntryNotFoundError:
            return None

    at = f" at revision {revision}" if revision else ""
    try:
        get("config.json")
        is_adapter = get("adapter_config.json") is not None
        for name in (*_ADAPTERS, *TRANSFORMERS_ORDER) if is_adapter else (*TRANSFORMERS_ORDER, *_ADAPTERS):
            if (file := get(name)) is None:
                continue
            missing = [shard for shard in shards_of(file) if get(shard) is None] if file.suffix == ".json" else []
            if missing:
                raise SourceError(f"{repo}{at}: {missing[0]} is neither on the hub nor in the cache")
            return file.parent
    except GatedRepoError as error:
        raise SourceError(f"{repo} is gated: accept its licence on the hub and log in (hf auth login)") from error
    except RepositoryNotFoundError as error:
        raise SourceError(f"{repo} is no file or folder here, nor a model on the hub") from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{repo} has no revision {revision}") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise SourceError(f"{repo} could not be had from the hub: {error}") from error
    if offline:
        raise SourceError(
            f"{repo} is no file or folder here, nor{at} in the local cache, and the hub cannot be reached"
        )
    raise SourceError(f"{repo}{at} has no model.safetensors, pytorch_model.bin or index of shards on the hub")


def fetch_rest(repo: str, revision: str | None = None) -> None:
    """Bring what else a hub model has, but weights, into its local folder: tokenizer, generation config, model card.

    What cannot be had (offline) is left out, with a warning in the log.

    Args:
        repo: ``owner/model`` or ``model``.
        revision: branch, tag or commit; the default branch if None.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot_download(repo, revision=revision, allow_patterns=list(_SMALL))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        logger.warning("%s: tokenizer and other small files could not be fetched: %s", repo, error)
