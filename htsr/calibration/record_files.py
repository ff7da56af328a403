"""Where records lie: files of several kinds, folders of them, data sets that `datasets` has saved or a hub holds.

Text and JSON are read line by line, for the place of what is wrong in them; all else by pandas and `datasets`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

from htsr.calibration.loading import resolve
from htsr.calibration.record_json import first_refused, from_json, is_one_object
from htsr.errors import HtsrError, MissingDependencyError, SourceError, reason_of, refused
from htsr.matrices.hub import is_hub_id, reached
from htsr.ranks import is_first

logger = logging.getLogger(__name__)

KINDS = (".jsonl", ".ndjson", ".json", ".txt", ".csv", ".tsv", ".parquet")
_COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}


def raw_records(source: str, *, streaming: bool = False) -> Iterator[tuple[str, Any]]:
    """Each record of a `source` as it lies there, with its place.

    Args:
        source: file, folder or id, see `htsr.calibration.records.read_records`.
        streaming: whether a data set of the hub is read while it comes, and not fetched first.

    Raises:
        SourceError: it cannot be read, or is of no kind that is known; file and line are named.
        MissingDependencyError: a package that the kind needs is not installed.
    """
    if source.startswith("package:") or kind_of_file(Path(source)):
        yield from _read_file(Path(resolve(source)))
        return
    name, config, split = _parts(source)
    folder = Path(name).expanduser()
    if not name.strip():  # which would be the working directory
        raise SourceError(f"a source of records is named {source!r}, which names nothing")
    if not folder.is_dir() and (folder.exists() or not is_hub_id(name)):
        raise SourceError(
            f"{source} is no {', '.join(KINDS[:-1])} or {KINDS[-1]} file, nor a folder, nor a data set of the hub"
        )
    files = _files_of(folder, split) if folder.is_dir() else []
    if config is not None and (files or _is_saved(folder)):
        raise SourceError(f"{source}: {folder} has no configurations: no README.md names any")
    if files:
        for file in files:
            yield from _read_file(file)
    else:
        yield from _read_dataset(source, folder, name, config, split, streaming)


def _parts(source: str) -> tuple[str, str | None, str]:
    """Name, configuration and split of ``NAME``, ``NAME:SPLIT`` or ``NAME:CONFIGURATION:SPLIT``.

    A split may be a part of one, as `datasets` writes it: ``train[:100]``.
    """
    name, _, rest = source.partition(":")
    config, colon, split = rest.partition(":")
    if not colon or "[" in config:
        return name, None, rest or "train"
    return name, config or None, split or "train"


def kind_of_file(path: Path) -> str:
    """The kind of a file by its name, one of `KINDS`, whether it is compressed or not; empty where it is none.

    Args:
        path: path of the file, which need not exist.

    Examples:
        >>> from pathlib import Path
        >>> from htsr.calibration.record_files import kind_of_file
        >>> kind_of_file(Path("train.jsonl.gz")), kind_of_file(Path("notes.docx"))
        ('.jsonl', '')
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in KINDS and suffixes[-1] != ".parquet" else ""
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else ""


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    kind = kind_of_file(path)
    if kind == ".parquet":
        yield from _numbered(path, _parquet(path))
        return
    try:
        path = path.expanduser()
        newline = None if kind in (".txt", "") else "\n"  # texts in JSON may hold other separators of lines
        with _opened(path, newline) as file:
            if kind in (".csv", ".tsv"):
                yield from _numbered(path, _table(file, kind))
            elif kind in (".jsonl", ".ndjson"):
                yield from _lines(path, file)
            else:
                yield from _whole(path, file.read(), kind)
    except HtsrError:
        raise
    except ImportError as error:
        raise MissingDependencyError(f"{path} cannot be read: {reason_of(error)}") from error
    except Exception as error:  # no such file, no UTF-8, no such user, cut short, no table: each library has its own
        raise SourceError(f"{path} cannot be read: {reason_of(error, path)}") from error


@contextmanager
def _opened(path: Path, newline: str | None) -> Iterator[IO[str]]:
    """The text in a file, which may be compressed."""
    compression = _COMPRESSED.get(path.suffix.lower())
    if compression is None:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield file
        return
    import fsspec  # torch and the hub bring it

    if compression not in fsspec.available_compressions():
        raise MissingDependencyError(f"{path} needs zstandard: pip install zstandard")
    path.stat()  # for the system's own word where there is none
    with fsspec.filesystem("file").open(
        str(path.absolute()), "rt", compression=compression, encoding="utf-8-sig", newline=newline
    ) as file:
        yield file


def _lines(path: Path, file: IO[str]) -> Iterator[tuple[str, Any]]:
    for i, line in enumerate(file, 1):
        if line.strip():
            yield f"{path}, line {i}", _parsed(line, f"{path}, line {i}")


def _whole(path: Path, content: str, kind: str) -> Iterator[tuple[str, Any]]:
    """Paragraphs of a text, the records of an array, the one that a file is, or those of its lines."""
    if kind == ".txt":
        parts = (part.strip() for part in content.split("\n\n"))
        yield from ((f"{path}, paragraph {i}", {"text": part}) for i, part in enumerate(parts, 1) if part)
    elif content.lstrip().startswith("["):
        yield from ((f"{path}, record {i}", found) for i, found in enumerate(_parsed(content, str(path)), 1))
    elif is_one_object(content):
        yield f"{path}, record 1", _parsed(content, str(path))
    else:
        yield from _lines(path, iter(content.split("\n")))  # type: ignore[arg-type]


def _parsed(text: str, place: str) -> Any:
    try:
        return from_json(text)
    except RecursionError:
        raise SourceError(f"{place}: JSON of a depth without reason") from None
    except SourceError as error:
        one = f", record {first_refused(text)}" if text.lstrip().startswith("[") else ""
        raise SourceError(f"{place}{one}: {error}") from None
    except ValueError as error:
        raise SourceError(f"{place}: no JSON: {reason_of(error)}") from error


def _numbered(path: Path, records: Iterator[Any]) -> Iterator[tuple[str, Any]]:
    yield from ((f"{path}, record {i}", record) for i, record in enumerate(records, 1))


def _table(file: IO[str], kind: str) -> Iterator[dict[str, str]]:
    """Rows of a table, each cell a text: "NA" and "007" are words here. Most tables with semicolons are called .csv."""
    import pandas

    start = file.readline()
    file.seek(0)
    separator = "\t" if kind == ".tsv" else max(",;\t", key=start.count)
    options: Any = {"sep": separator, "dtype": str, "na_filter": False, "chunksize": 1000, "index_col": False}
    for part in pandas.read_csv(file, **options):
        yield from part.to_dict("records")


def _parquet(path: Path) -> Iterator[Any]:
    if not path.expanduser().is_file():
        raise SourceError(f"{path} cannot be read: no such file")
    datasets = _datasets(f"{path}")
    with refused(f"{path} cannot be read"):
        found = datasets.load_dataset("parquet", data_files=str(path.expanduser()), split="train", streaming=True)
        yield from _of_arrow(found)


def _files_of(folder: Path, split: str) -> list[Path]:
    """The files of one split in a folder, in the order of their names; none where `datasets` reads the folder itself.

    It does where it has saved the folder, or where a card in it says what is in which file. Which file is of which
    split, their names say, by the rules of `datasets`.
    """
    if _is_saved(folder) or _has_card(folder):
        return []
    folder = Path(os.path.abspath(folder))
    every = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path, folder))
    if not any(kind_of_file(path) for path in every):
        return []
    _datasets(str(folder))
    from datasets.data_files import DataFilesDict, get_data_patterns

    with refused(f"{folder} cannot be read"):
        patterns = get_data_patterns(str(folder))
        splits = DataFilesDict.from_patterns(patterns, base_path=str(folder))  # type: ignore[attr-defined]
    if split not in splits:
        raise SourceError(f"{folder} has no files of the split {split}; there are {', '.join(map(str, splits))}")
    wanted = {Path(name) for name in splits[split]}
    files = [path for path in every if path in wanted and kind_of_file(path)]
    left = [str(path.relative_to(folder)) for path in every if path not in files]
    if left and is_first():
        more = f" and {len(left) - 8} more" if len(left) > 8 else ""
        logger.warning("%s: read as the split %s, without %s%s", folder, split, ", ".join(left[:8]), more)
    return files


def _is_saved(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))


def _has_card(folder: Path) -> bool:
    card = folder / "README.md"
    return card.is_file() and card.read_text(encoding="utf-8", errors="replace").startswith("---")


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)


def _read_dataset(
    source: str, folder: Path, name: str, config: str | None, split: str, streaming: bool
) -> Iterator[tuple[str, Any]]:
    datasets = _datasets("a data set of the hub")
    where = nullcontext() if folder.is_dir() else reached(name, kind="dataset")
    with refused(f"{source} is a data set that cannot be had"), where:
        if _is_saved(folder):
            found = datasets.load_from_disk(str(folder))
            found = found if isinstance(found, datasets.Dataset) else found[split]
        else:
            path = str(folder) if folder.is_dir() else name
            try:
                found = datasets.load_dataset(path, config, split=split, streaming=streaming)
            except ValueError as error:
                if config is not None or "onfig name is missing" not in str(error):
                    raise
                raise SourceError(
                    f"{reason_of(error)}; name one of them, as in {name}:CONFIGURATION:{split}"
                ) from error
        yield from ((f"{source}, record {i}", record) for i, record in enumerate(_of_arrow(found), 1))


def _of_arrow(found: Any) -> Iterator[Any]:
    """The records of a data set. Arrow gives every turn the keys of all others, as null: those go again."""
    is_plain = "Json(" in str(found.features)  # written as they were
    for record in found:
        yield record if is_plain else {key: _without_null(value) for key, value in record.items()}


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(part) for key, part in value.items() if part is not None}
    return [_without_null(part) for part in value] if isinstance(value, list) else value


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(f"{what} needs datasets: pip install 'htsr[finetune]'") from error
    return datasets
