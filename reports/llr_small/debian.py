"""A corpus of technical English that any Debian has: the documentation in its packages, as tokens in one small file.

    python -m reports.llr_small.debian --output debian.pt

It downloads the packages with apt-get, without installing them, takes the text files out of them (of HTML the words),
trains a byte-level BPE on the training files, and writes both token streams as 16-bit numbers: less than 60 MiB, small
enough to carry to a machine with an accelerator. Files of equal content count once; of more text than `--tokens` whole
files are left out, in the order of a hash of their names.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import itertools
import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

import torch

from reports.llr_small.corpus import END, is_validation, tokenizer_of

PACKAGES = (
    "python3.11-doc", "linux-doc-6.1", "postgresql-doc-15", "git-doc", "perl-doc", "nodejs-doc", "cmake-doc",
    "sqlite3-doc", "python-django-doc", "python-sqlalchemy-doc", "python-sympy-doc", "python-scipy-doc",
    "python-pandas-doc", "octave-doc", "llvm-14-doc", "libboost1.74-doc", "apache2-doc", "bind9-doc",
    "debian-reference-en", "developers-reference",
)  # fmt: skip
TEXT = (".txt", ".rst", ".md", ".pod", ".texi", ".adoc")
HTML = (".html", ".htm", ".xhtml")
LISTS = ("genindex", "py-modindex", "search", "searchindex", "copyright", "changelog", "objects", "modindex")
OTHER_LANGUAGES = re.compile(
    r"/(cs|da|de|el|es|fi|fr|hu|id|it|ja|ko|nb|nl|pl|pt|ro|ru|sv|tr|uk|vi|zh)([-_][A-Za-z]+)?/"
)
FEWEST_CHARACTERS = 400
ENGLISH = 0.95  # share of ASCII characters; pages in most other languages have less
MOST_TOKENS = 28_000_000  # 2 bytes each: 53 MiB
MOST_BYTES = 60 << 20


def main() -> None:
    """Make the corpus."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--tokens", type=int, default=MOST_TOKENS, help="most tokens in the file")
    parser.add_argument("--packages", type=lambda names: names.split(","), default=PACKAGES, help="Debian packages")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.output.absolute().parent) as folder:
        files = collected(downloaded(args.packages, Path(folder)))
    facts = write(args.output, files, args.vocabulary, args.tokens, len(args.packages))
    print(json.dumps(facts, indent=1))


def downloaded(packages: Sequence[str], folder: Path) -> list[Path]:
    """The .deb files of `packages`, downloaded into `folder` by apt-get as its own user can."""
    folder.chmod(0o755)
    subprocess.run(["apt-get", "download", *packages], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return sorted(folder.glob("*.deb"))


def collected(packages: Sequence[Path]) -> dict[str, str]:
    """Texts by package and name, each content once; of a page whose source is there, too, the source."""
    found: dict[str, str] = {}
    seen: set[bytes] = set()
    for package in packages:
        texts = dict(texts_of(package))
        sources = {_page(name) for name in texts if "/_sources/" in name}
        for name, text in texts.items():
            digest = hashlib.sha256(text.encode()).digest()
            if digest in seen or (name.endswith(HTML) and _page(name) in sources):
                continue
            seen.add(digest)
            found[f"{package.name.split('_')[0]}/{name}"] = text
    return found


def _page(name: str) -> str:
    """What a page and its source have in common: the path without suffixes."""
    path = Path(name.replace("/_sources/", "/"))
    return f"{path.parent}/{path.name.split('.')[0] or path.name}"


def texts_of(package: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each file of documentation in a .deb, in English, in the order of the archive."""
    archive = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(package)], check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files:
            name = member.name.removeprefix("./").removesuffix(".gz")
            stem = Path(name).name.split(".")[0].lower()
            held = files.extractfile(member) if member.isfile() and name.endswith(TEXT + HTML) else None
            if held is None or stem in LISTS or OTHER_LANGUAGES.search(name):
                continue
            content = held.read()
            raw = gzip.decompress(content) if member.name.endswith(".gz") else content
            text = raw.decode("utf-8", errors="replace")
            text = words_of(text) if name.endswith(HTML) else text.strip()
            ascii_share = sum(character.isascii() for character in text) / max(1, len(text))
            if len(text) >= FEWEST_CHARACTERS and ascii_share >= ENGLISH:
                yield name, text


class _Words(HTMLParser):
    """What a page says: no scripts, no styles, no navigation; blocks on lines of their own."""

    SKIPPED = frozenset(("script", "style", "nav", "head", "header", "footer"))
    BLOCKS = frozenset(("p", "div", "li", "tr", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "dt", "dd", "br", "table"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.skipped, self.pieces = 0, list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.skipped += tag in self.SKIPPED
        if tag in self.BLOCKS:
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.skipped -= tag in self.SKIPPED and self.skipped > 0
        if tag in self.BLOCKS:
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.pieces.append(data)


def words_of(page: str) -> str:
    """The words of an HTML page, without empty lines."""
    parser = _Words()
    parser.feed(page)
    parser.close()
    return "\n".join(line.rstrip() for line in "".join(parser.pieces).splitlines() if line.strip())


def write(output: Path, files: dict[str, str], vocabulary: int, most: int, packages: int) -> dict[str, object]:
    """Both token streams of `files` in a file that `corpus.load` reads; what is in it."""
    order = sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())
    ends = itertools.accumulate(len(files[name].encode()) for name in order)
    # a token has about four bytes; those beyond `most` are left out below
    kept = [name for name, end in zip(order, ends, strict=True) if end <= 6 * most]
    tokenizer = tokenizer_of([files[name] for name in kept if not is_validation(name)], vocabulary)
    end = tokenizer.token_to_id(END)
    streams: dict[bool, list[int]] = {False: [], True: []}
    digest, taken = hashlib.sha256(), 0
    for name in kept:
        tokens = [*tokenizer.encode(files[name]).ids, end]
        if sum(map(len, streams.values())) + len(tokens) > most:
            break
        streams[is_validation(name)] += tokens
        digest.update(name.encode() + b"\0" + files[name].encode() + b"\0")
        taken += 1
    used = kept[:taken]
    facts = {
        "source": f"the documentation in {packages} packages of Debian",
        "sha256": digest.hexdigest(),
        "files": taken,
        "validation_files": sum(map(is_validation, used)),
        "megabytes": round(sum(len(files[name].encode()) for name in used) / 1e6, 2),
        "train_tokens": len(streams[False]),
        "validation_tokens": len(streams[True]),
        "vocabulary": tokenizer.get_vocab_size(),
    }
    content = {
        "train": torch.tensor(streams[False], dtype=torch.uint16),
        "validation": torch.tensor(streams[True], dtype=torch.uint16),
    }
    torch.save(content | {"facts": json.dumps(facts), "tokenizer": tokenizer.to_str()}, output)
    if output.stat().st_size > MOST_BYTES:
        raise SystemExit(f"{output} has {output.stat().st_size / 2**20:.0f} MiB: take fewer --tokens")
    return facts


if __name__ == "__main__":
    main()
