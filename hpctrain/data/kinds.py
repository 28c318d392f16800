"""Which reader a source is for, by its name, and the options of all readers in one place.

    array      .npy, .npz, idx-ubyte          text       .txt .md .rst .py ..., or a folder of them
    table      .csv, .tsv                     sequences  .fa .fasta .fna, BLAST .nin; all but the
    images     a folder per class; a table    volumes    .nii            last also with .gz

Layer: data. Knows nothing of shards.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpctrain.data.sources import SourceData, read_source
from hpctrain.errors import DataError, UsageError

__all__ = ["KINDS", "ReadOptions", "files_of", "kind_of", "read_kind"]

KINDS = ("array", "table", "text", "images", "sequences", "volumes")
ALONE = ("array", "table")  # one file is one source; files of the other kinds are put together
BLAST = (".nin", ".nhr", ".nsq")
BY_SUFFIX = {
    ".csv": "table", ".tsv": "table", ".nii": "volumes",
    ".fa": "sequences", ".fasta": "sequences", ".fna": "sequences", ".ffn": "sequences",
    ".nin": "sequences", ".nhr": "sequences", ".nsq": "sequences",
    ".txt": "text", ".md": "text", ".rst": "text", ".py": "text", ".html": "text",
    ".tex": "text", ".json": "text",
}  # fmt: skip


@dataclass(frozen=True)
class ReadOptions:
    """How sources are read. `apart`, `drop`, `require`: of tables, see `read_table`."""

    apart: Collection[str] = ()
    drop: Collection[str] = ()
    require: Collection[str] = ()
    pattern: str | None = None  # its first group is the label: in headers, or paths
    least: int = 1  # samples that a label needs to be kept
    lines: bool = False  # text: every line is a document
    pairs: int | None = None  # text: size of a byte-pair vocabulary
    size: tuple[int, int] | None = None  # images: (height, width)
    channels: int | None = None  # images
    kmers: int | None = None  # sequences: counts of words of this length
    slab: int | None = None  # volumes: planes of a sample


def kind_of(path: Path, wanted: str | None = None) -> str:
    """The kind of a source: `wanted`, or what its name says. Raises `UsageError`."""
    if wanted is not None and wanted not in KINDS:
        raise UsageError(f"sources are read as {', '.join(KINDS)}, not as {wanted!r}")
    if wanted is None and path.is_dir():
        return "images"
    return wanted or BY_SUFFIX.get(Path(path.name.removesuffix(".gz")).suffix.lower(), "array")


def files_of(path: Path) -> list[Path]:
    """The files that a source names: three for a BLAST database, else itself."""
    if path.suffix not in BLAST:
        return [path]
    return [path.with_suffix(suffix) for suffix in BLAST]


def read_kind(
    kind: str, paths: Sequence[Path], name: str | None, options: ReadOptions
) -> SourceData:
    """Read the sources of one kind that make up one field, called `name` or by the kind.

    Raises `DataError` for what cannot be read, `UsageError` for options that break a rule.
    """
    for path in paths:
        if not path.exists():
            raise DataError(f"there is no file {path}")
    if kind in ALONE:
        return read_source(paths[0], name, options.apart, options.drop, options.require)
    if kind == "text":
        return _text(paths, name or "text", options)
    if kind == "images":
        return _images(paths, name or "image", options)
    if kind == "volumes":
        from hpctrain.data.volumes import read_volumes

        return SourceData(read_volumes(paths, name or "volume", options.slab))
    from hpctrain.data.sequences import LETTERS, read_sequences

    name = name or "sequence"
    fields = read_sequences(paths, name, options.pattern, options.kmers, options.least)
    return SourceData(fields, vocabularies={name: LETTERS} if name in fields else {})


def _text(paths: Sequence[Path], name: str, options: ReadOptions) -> SourceData:
    from hpctrain.data.texts import read_texts, text_files

    files = [file for path in paths for file in (text_files(path) if path.is_dir() else [path])]
    found = read_texts(files, options.lines, options.pairs, options.pattern)
    kept = {} if found.vocabulary is None else {f"{name}.tokenizer.json": found.vocabulary}
    fields = {name: found.documents}
    labels = {} if found.labels is None else {"label": found.labels}
    return SourceData(fields | labels, tokens={name: found.tokens}, files=kept)


def _images(paths: Sequence[Path], name: str, options: ReadOptions) -> SourceData:
    from hpctrain.data.images import listed_images, read_images, sorted_images

    files, labels = [], []
    for path in paths:
        found = sorted_images(path) if path.is_dir() else listed_images(path)
        files += found[0]
        labels += found[1]
    return SourceData(read_images(files, labels, name, options.size, options.channels))
