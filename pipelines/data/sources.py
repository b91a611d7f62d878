"""Reads rows from files, folders, hub ids and fsspec URIs, as memory-mapped `datasets`.

| `data:`             | rows of split `train` |
|---------------------|-----------------------|
| folder (or URI)     | `train.<format>`, else all `train-*.<format>` or `train/*.<format>`, by name |
| one file (or URI)   | nine tenths of the rows, drawn with a fixed seed; the rest is the split `test` |
| hub id              | the hub's own split of that name, at `revision` |

Formats: `.jsonl`, `.json`, `.csv`, `.tsv` (UTF-8, a header; every column is text), `.parquet`, `.txt` (a file
`train.txt` has one document per paragraph; in a folder `train/` every file is a document). Remote files are copied
once per node into `$CURLORA_CACHE` (default `~/.cache/curlora`). Rows are the same on all machines and processes.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import pickle
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from pipelines.config.paths import is_uri, looks_local
from pipelines.config.tasks import Source
from pipelines.data.damage import broken_places, fatal_damage
from pipelines.data.files import FORMATS, folder_files, folder_name, format_of, local_copy, reason_of
from pipelines.data.node_cache import cache_folder, node_lock, published
from pipelines.errors import DataError, Problem

if TYPE_CHECKING:
    import datasets

CARVED = 0.1  # share of a single file that becomes its test split
BATCH = 1000  # rows read at a time
REOPEN_ROWS = 20_000  # rows after which a memory map is reopened, which releases the pages it has touched
MOST_SPLITS = 512  # kept open; if a sequence had more, every pass would reopen all of them
HELD_OUT = {"kept": "train", "held-out": "test"}  # name of a part of a split -> side of the cut


def load_split(source: Source, split: str) -> datasets.Dataset:
    """The rows of one split. `train@kept` and `train@held-out` are 90 % and 10 % of `train`, with a fixed seed.

    Raises:
        DataError: missing, unreadable or empty; names the file and, for damaged text, the line.
    """
    expression, _, part = split_expression(source, split).partition("@")
    split = "train" if part else split
    rows = _load(source.data, source.subset, source.revision, expression, split, _stamp(source.data))
    return _carved(rows, HELD_OUT[part]) if part else rows


def _stamp(data: str) -> tuple:
    """Changes when local files change, so that a long-lived process sees new rows."""
    if not looks_local(data) or not os.path.exists(data):
        return ()
    folders = [entry.path for entry in os.scandir(data) if entry.is_dir()] if os.path.isdir(data) else []
    files = [entry for folder in (data, *folders) for entry in os.scandir(folder)] if os.path.isdir(data) else []
    stats = [(entry.path, entry.stat()) for entry in files] or [(data, os.stat(data))]
    return tuple(sorted((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats))


def split_expression(source: Source, split: str) -> str:
    """The expression that `splits:` gives for a split, by default its name."""
    return getattr(source, "splits", {}).get(split, split)


@lru_cache(maxsize=MOST_SPLITS)
def _load(
    data: str, subset: str | None, revision: str | None, expression: str, split: str, stamp: tuple
) -> datasets.Dataset:
    import datasets  # slow: only commands that read data need it

    datasets.disable_progress_bars()
    if not (is_uri(data) or looks_local(data)):
        rows = _load_hub(data, subset, revision, expression)
    elif format_of(data):
        rows = _carve(_read({"rows": (data,)}, "rows", data), data, split)
    else:
        rows = _read(folder_files(data, expression), expression, data)
    if len(rows) == 0:
        raise DataError([Problem(f"{data}:{split}", "the split is empty; give it at least one row")])
    return rows


def _load_hub(data: str, subset: str | None, revision: str | None, expression: str) -> datasets.Dataset:
    import datasets  # slow

    try:
        with node_lock(f"hub-{data}-{subset}-{revision}"):  # one process of the node downloads, the others wait
            return datasets.load_dataset(data, subset, revision=revision, split=expression)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            [Problem(data, f"neither a local path nor a readable hub dataset ({reason}); check the spelling")]
        ) from error


def _carve(rows: datasets.Dataset, data: str, split: str) -> datasets.Dataset:
    """This split's part of a single file, in the order of the file."""
    if split not in ("train", "test"):
        raise DataError([Problem(data, f"a single file has no '{split}' split; use a folder with {split}.jsonl")])
    return _carved(rows, split)


def _carved(rows: datasets.Dataset, side: str) -> datasets.Dataset:
    """Nine tenths ("train") or one ("test") of some rows, in their order."""
    if len(rows) < 2:
        return rows
    part = rows.train_test_split(test_size=CARVED, seed=0, shuffle=True)[side]
    return rows.select(sorted(part._indices.column(0).to_pylist()))


def _read(files: dict[str, tuple[str, ...]], expression: str, data: str) -> datasets.Dataset:
    """The rows of an expression such as `train` or `validation[:500]` over named lists of files."""
    import datasets  # slow

    local = {stem: [local_copy(path) for path in paths] for stem, paths in files.items()}
    paths = [path for group in local.values() for path in group]
    if all(os.path.getsize(path) == 0 for path in paths):
        return datasets.Dataset.from_dict({})
    if problems := [problem for path in paths for problem in fatal_damage(path)]:
        raise DataError(problems)
    suffix = format_of(paths[0])
    try:
        inside = all(folder_name(path) == stem for stem, group in files.items() for path in group)
        builder, options = _builder(suffix, paths, file_is_document=inside)
        return datasets.load_dataset(builder, data_files=local, split=expression, **options)
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        problems = [problem for path in paths for problem in broken_places(path)]
        raise DataError(problems or [Problem(data, f"not readable ({reason_of(error)}); correct the file")]) from error


def _builder(suffix: str, paths: Sequence[str], file_is_document: bool) -> tuple[str, dict]:
    """Name and options of the `datasets` builder of a format."""
    import datasets  # slow

    if suffix in (".csv", ".tsv"):
        separator = "\t" if suffix == ".tsv" else ","
        header = _header(paths[0], separator)
        features = datasets.Features({name: datasets.Value("string") for name in header})
        # "NA" and "null" are text; as text, numbers keep their leading zeros
        return "csv", {"sep": separator, "features": features, "keep_default_na": False}
    if suffix == ".txt":
        return "text", {"sample_by": "document" if file_is_document else "paragraph"}
    return FORMATS[suffix], {}


def _header(path: str, separator: str) -> list[str]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            names = next(csv.reader(file, delimiter=separator), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(broken_places(path) or [Problem(f"{path}:1", f"no readable header ({error})")]) from error
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        what = f"two columns are called '{twice[0]}'" if twice else "there is no header"
        raise DataError([Problem(f"{path}:1", f"{what}; the first line must name every column once")])
    return names


def batches(rows: datasets.Dataset, columns: Sequence[str] | None = None) -> Iterator[dict[str, list]]:
    """All rows in order, `BATCH` at a time as columns, in bounded memory.

    Pages of a memory map stay resident while it is open, so it is reopened every `REOPEN_ROWS` rows.
    """
    rows = rows.select_columns(list(columns)) if columns is not None else rows
    for start in range(0, len(rows), REOPEN_ROWS):
        opened = pickle.loads(pickle.dumps(rows))  # safe: our own object; a memory-mapped table is pickled as its path
        stop = min(start + REOPEN_ROWS, len(rows))
        for first in range(start, stop, BATCH):
            yield opened[first : min(first + BATCH, stop)]


def records(rows: datasets.Dataset, columns: Sequence[str] | None = None) -> Iterator[dict]:
    """Like `batches`, one row at a time as a mapping."""
    for batch in batches(rows, columns):
        names = list(batch)
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(names, values, strict=True))


def digest(rows: datasets.Dataset) -> str:
    """First 32 hex digits of the SHA-256 of all rows in order as canonical JSON; equal on all machines."""
    sha = hashlib.sha256()
    for row in records(rows):
        sha.update(json.dumps(row, sort_keys=True, ensure_ascii=True, default=str).encode())
        sha.update(b"\n")
    return sha.hexdigest()[:32]


def digest_of(source: Source, split: str) -> str:
    """Digest of a source's split, computed once per node.

    Cached by the fingerprint of `datasets`, which changes with the file that rows were read from.
    """
    rows = load_split(source, split)
    memo = cache_folder("digests") / hashlib.sha256(f"{rows._fingerprint}-{len(rows)}".encode()).hexdigest()[:32]
    if not memo.exists():
        with published(memo) as temporary:
            temporary.write_text(digest(rows))
    return memo.read_text()
