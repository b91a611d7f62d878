"""Rows from wherever they lie: files, folders, hub ids and any fsspec URI, as memory-mapped `datasets`.

| `data:`             | rows of split `train` |
|---------------------|-----------------------|
| folder (or URI)     | `train.<format>`, else all `train-*.<format>` or `train/*.<format>`, by name |
| one file (or URI)   | nine rows in ten, drawn by a fixed seed; the tenth is the split `test` |
| hub id              | the hub's own split of that name, at `revision` |

Formats: `.jsonl`, `.json`, `.csv`, `.tsv` (UTF-8, a header; every column is text), `.parquet`, `.txt` (a file
`train.txt` has a document a paragraph, in a folder `train/` every file is a document). What is remote is copied once
a node into `$CURLORA_CACHE` (default `~/.cache/curlora`). A row is the same on every machine and in every process.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import pickle
import posixpath
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.config import Problem, Source, TaskSource, is_uri, looks_local

if TYPE_CHECKING:
    import datasets

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}
CARVED = 0.1  # share of a single file that becomes its test split
AT_MOST = 5  # broken lines named for each file
BATCH = 1000  # rows read at a time
REOPEN_ROWS = 20_000  # rows after which a memory map is opened anew, which gives back the pages it has touched
MOST_SPLITS = 512  # kept open, memory-mapped; were they fewer than a sequence has, every pass would open all anew


HELD_OUT = {"kept": "train", "held-out": "test"}  # name of a part of a split → side of the cut


class DataError(ValueError):
    """Data that cannot be used; carries the problems found."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = list(problems)
        super().__init__("\n".join(map(str, self.problems)))


# -- rows of a split


def load_split(source: Source, split: str) -> datasets.Dataset:
    """The rows of one split. `train@kept` and `train@held-out` are 90 % and 10 % of `train`, drawn once and for all.

    Raises:
        DataError: nothing there, not readable, or no rows; names the file and, for broken text, the line.
    """
    expression, _, part = _expression(source, split).partition("@")
    split = "train" if part else split
    rows = _load(source.data, source.subset, source.revision, expression, split, _stamp(source.data))
    return _carved(rows, HELD_OUT[part]) if part else rows


def validation_view(task: TaskSource) -> TaskSource:
    """The task as those see it who choose: scored on `validation`, or on a part of `train` that it then lacks."""
    if "validation" not in task.splits:
        try:
            load_split(task, "validation")
        except DataError:
            train = task.splits.get("train", "train")
            return task.model_copy(update={"splits": {"train": f"{train}@kept", "test": f"{train}@held-out"}})
    return task.model_copy(update={"splits": {**task.splits, "test": task.splits.get("validation", "validation")}})


def _stamp(data: str) -> tuple:
    """What changes when local files change: a process that lives long sees new rows."""
    if not looks_local(data) or not os.path.exists(data):
        return ()
    folders = [entry.path for entry in os.scandir(data) if entry.is_dir()] if os.path.isdir(data) else []
    files = [entry for folder in (data, *folders) for entry in os.scandir(folder)] if os.path.isdir(data) else []
    stats = [(entry.path, entry.stat()) for entry in files] or [(data, os.stat(data))]
    return tuple(sorted((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats))


def _expression(source: Source, split: str) -> str:
    return getattr(source, "splits", {}).get(split, split)


@lru_cache(maxsize=MOST_SPLITS)
def _load(
    data: str, subset: str | None, revision: str | None, expression: str, split: str, stamp: tuple
) -> datasets.Dataset:
    # datasets takes a second to import: only commands that read data pay for it
    import datasets

    datasets.disable_progress_bars()
    if not (is_uri(data) or looks_local(data)):
        rows = _load_hub(data, subset, revision, expression)
    elif _format(data):
        rows = _carve(_read({"rows": (data,)}, "rows", data), data, split)
    else:
        rows = _read(_folder_files(data, expression), expression, data)
    if len(rows) == 0:
        raise DataError([Problem(f"{data}:{split}", "the split is empty; give it at least one row")])
    return rows


def _load_hub(data: str, subset: str | None, revision: str | None, expression: str) -> datasets.Dataset:
    import datasets

    try:
        with node_lock(f"hub-{data}-{subset}-{revision}"):  # the workers of a node: one downloads, the others wait
            return datasets.load_dataset(data, subset, revision=revision, split=expression)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            [Problem(data, f"neither a local path nor a readable hub dataset ({reason}); check the spelling")]
        ) from error


def _carve(rows: datasets.Dataset, data: str, split: str) -> datasets.Dataset:
    """This split's part of a single file, in the order of the file."""
    if split not in ("train", "test"):
        raise DataError([Problem(data, f"one file has no '{split}' split; use a folder with {split}.jsonl")])
    return _carved(rows, split)


def _carved(rows: datasets.Dataset, side: str) -> datasets.Dataset:
    """Nine tenths ("train") or one ("test") of some rows, in their order."""
    if len(rows) < 2:
        return rows
    part = rows.train_test_split(test_size=CARVED, seed=0, shuffle=True)[side]
    return rows.select(sorted(part._indices.column(0).to_pylist()))


def _read(files: dict[str, tuple[str, ...]], expression: str, data: str) -> datasets.Dataset:
    """The rows of an expression such as `train` or `validation[:500]` over named lists of files."""
    import datasets

    local = {stem: [local_copy(path) for path in paths] for stem, paths in files.items()}
    paths = [path for group in local.values() for path in group]
    if all(os.path.getsize(path) == 0 for path in paths):
        return datasets.Dataset.from_dict({})
    suffix = _format(paths[0])
    try:
        inside = all(_folder_name(path) == stem for stem, group in files.items() for path in group)
        builder, options = _builder(suffix, paths, file_is_document=inside)
        return datasets.load_dataset(builder, data_files=local, split=expression, **options)
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        problems = [problem for path in paths for problem in broken_places(path)]
        raise DataError(problems or [Problem(data, f"not readable ({_reason(error)}); mend the file")]) from error


def _folder_name(path: str) -> str:
    return posixpath.basename(posixpath.dirname(path))


def _builder(suffix: str, paths: Sequence[str], file_is_document: bool) -> tuple[str, dict]:
    """Name and options of the `datasets` builder of a format."""
    import datasets

    if suffix in (".csv", ".tsv"):
        separator = "\t" if suffix == ".tsv" else ","
        header = _header(paths[0], separator)
        features = datasets.Features({name: datasets.Value("string") for name in header})
        # "NA" and "null" are words; without features a column of digits would lose its leading zeros
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


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: `datasets` wraps it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# -- files


def _format(path: str) -> str | None:
    suffix = posixpath.splitext(path)[1].lower()
    return suffix if suffix in FORMATS else None


def _folder_files(data: str, expression: str) -> dict[str, tuple[str, ...]]:
    """Name → files of every part that a split expression speaks of."""
    stems = re.findall(r"(?:^|\+)\s*([^\s\[+@]+)", expression)
    return {stem: tuple(_files_of_part(data, stem)) for stem in dict.fromkeys(stems)}


def _files_of_part(data: str, stem: str) -> list[str]:
    fs, root = _filesystem(data)
    names = _names(fs, root, data)
    found = [name for name in names if posixpath.splitext(name)[0] == stem and _format(name)]
    found = found or [name for name in names if name.startswith(f"{stem}-") and _format(name)]
    if not found and stem in names:
        inner = _names(fs, posixpath.join(root, stem), data)
        found = [posixpath.join(stem, name) for name in inner if _format(name)]
    if not found:
        there = f"the folder holds: {', '.join(names[:20])}" if names else "check the path"
        raise DataError([Problem(f"{data.rstrip('/')}/{stem}.jsonl", f"no such file; {there}")])
    # the same rows in two formats are a convenience for people, not two parts: the first of FORMATS counts
    chosen = min((_format(name) for name in found), key=list(FORMATS).index)
    return [f"{data.rstrip('/')}/{name}" for name in found if _format(name) == chosen]


def _filesystem(path: str):
    import fsspec

    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        remedy = "install the package it needs (s3: pip install 's3fs') or correct the protocol"
        raise DataError([Problem(path, f"{_reason(error)}; {remedy}")]) from error


@contextlib.contextmanager
def _storage_errors(path: str) -> Iterator[None]:
    """Errors of a file system as one that names the place. What botocore raises is no OSError."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError([Problem(path, "no such file; check the path")]) from error
    except Exception as error:
        if not isinstance(error, OSError) and not type(error).__module__.startswith(("botocore", "aiobotocore")):
            raise
        remedy = "check the path, the network and the credentials"
        raise DataError([Problem(path, f"cannot be read ({_reason(error)}); {remedy}")]) from error


def _names(fs, folder: str, data: str) -> list[str]:
    """Sorted names in a folder; empty where there is none."""
    with _storage_errors(data):
        if not fs.isdir(folder):
            return []
        names = [posixpath.basename(p.rstrip("/")) for p in fs.ls(folder, detail=False)]
        return sorted(name for name in names if name)


def local_copy(path: str) -> str:
    """A local path of a file; what is remote is fetched once a node (and again when it has changed there)."""
    fs, plain = _filesystem(path)
    with _storage_errors(path):
        if "file" in (fs.protocol if isinstance(fs.protocol, tuple | list) else (fs.protocol,)):
            if not os.path.isfile(plain):
                raise FileNotFoundError(plain)
            return plain
        identity = hashlib.sha256(f"{path}\n{fs.ukey(plain)}".encode()).hexdigest()[:32]
        target = cache_folder("files") / identity / posixpath.basename(plain)
        with node_lock(f"file-{identity}"):
            if not target.exists():
                with published(target) as temporary:
                    fs.get_file(plain, str(temporary))
        return str(target)


def read_sibling(data: str, name: str) -> bytes | None:
    """The file `name` in a data folder, None where there is none."""
    if _format(data) or not (is_uri(data) or looks_local(data)):
        return None
    fs, root = _filesystem(data)
    with _storage_errors(data):
        path = posixpath.join(root, name)
        return fs.cat_file(path) if fs.isfile(path) else None


# -- the node's cache


def cache_folder(name: str) -> Path:
    """A folder that the processes of a node share."""
    root = Path(os.environ.get("CURLORA_CACHE") or Path.home() / ".cache" / "curlora").expanduser()
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def node_lock(name: str) -> Iterator[None]:
    """One process of this node at a time; released by the system when a process dies."""
    from filelock import FileLock

    file = cache_folder("locks") / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.lock"
    with FileLock(str(file)):
        yield


@contextlib.contextmanager
def published(target: Path) -> Iterator[Path]:
    """A temporary path that becomes `target` when the block ends well, so that nobody sees half a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


# -- reading


def batches(rows: datasets.Dataset, columns: Sequence[str] | None = None) -> Iterator[dict[str, list]]:
    """All rows in order, `BATCH` at a time as columns, in memory that does not grow with the data.

    Pages of a memory map stay resident while it is open: every now and then it is opened anew.
    """
    rows = rows.select_columns(list(columns)) if columns is not None else rows
    for start in range(0, len(rows), REOPEN_ROWS):
        opened = pickle.loads(pickle.dumps(rows))  # our own object: a memory-mapped table travels as its path
        stop = min(start + REOPEN_ROWS, len(rows))
        for first in range(start, stop, BATCH):
            yield opened[first : min(first + BATCH, stop)]


def records(rows: datasets.Dataset, columns: Sequence[str] | None = None) -> Iterator[dict]:
    """The rows as mappings, like `batches`."""
    for batch in batches(rows, columns):
        names = list(batch)
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(names, values, strict=True))


def digest(rows: datasets.Dataset) -> str:
    """SHA-256 of all rows in order, as canonical JSON: the same on every machine. 32 hex digits."""
    sha = hashlib.sha256()
    for row in records(rows):
        sha.update(json.dumps(row, sort_keys=True, ensure_ascii=True, default=str).encode())
        sha.update(b"\n")
    return sha.hexdigest()[:32]


def digest_of(source: Source, split: str) -> str:
    """Digest of a source's split, computed once a node.

    `datasets` gives rows a fingerprint that changes with the file they were read from.
    """
    rows = load_split(source, split)
    memo = cache_folder("digests") / hashlib.sha256(f"{rows._fingerprint}-{len(rows)}".encode()).hexdigest()[:32]
    if not memo.exists():
        with published(memo) as temporary:
            temporary.write_text(digest(rows))
    return memo.read_text()


# -- places, for people


def files_of(source: Source, split: str) -> list[str]:
    """Local copies of the files of a split, in order; none for a hub id."""
    return [local_copy(path) for path in _paths(source, split)]


def _paths(source: Source, split: str) -> list[str]:
    if not (is_uri(source.data) or looks_local(source.data)):
        return []
    if _format(source.data):
        return [source.data]
    groups = _folder_files(source.data, _expression(source, split)).values()
    return [path for group in groups for path in group]


def place(source: Source, split: str, row: int) -> str:
    """Where a row (counted from 0) stands: `file:line`, or split and row number where there are no lines."""
    by_number = f"{source.data}, {split} row {row + 1}"
    if re.search(r"[\[+@]", _expression(source, split)):
        return by_number
    if _format(source.data):
        indices = load_split(source, split)._indices
        row = indices.column(0)[row].as_py() if indices is not None else row
    for path in _paths(source, split):
        lines = _row_lines(local_copy(path), row)
        if lines is None:
            return by_number
        line, rows = lines
        if line:
            return f"{path}:{line}"
        row -= rows
    return by_number


def _row_lines(path: str, row: int) -> tuple[int, int] | None:
    """(line of a row in a file, or 0 if it lies beyond; rows in the file); None for formats without lines."""
    suffix, seen = _format(path), 0
    if suffix == ".jsonl":
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    if seen == row:
                        return number, 0
                    seen += 1
        return 0, seen
    if suffix in (".csv", ".tsv"):
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t" if suffix == ".tsv" else ",")
            next(reader, None)
            begin = reader.line_num + 1
            for fields in reader:
                if fields:
                    if seen == row:
                        return begin, 0
                    seen += 1
                begin = reader.line_num + 1
        return 0, seen
    return None


def silent_damage(path: str) -> list[Problem]:
    """Damage that reading does not notice: other encodings than UTF-8, lines of a table that are too short."""
    if _format(path) == ".parquet":
        return []
    return broken_places(path) if _format(path) in (".csv", ".tsv") else _broken_encoding(path, AT_MOST)


def broken_places(path: str, at_most: int = AT_MOST) -> list[Problem]:
    """Where a file is broken, by line: `datasets` only says that it is."""
    suffix = _format(path)
    if suffix == ".parquet":
        return _broken_parquet(path)
    problems = _broken_encoding(path, at_most)
    if suffix == ".jsonl" or (suffix == ".json" and not _is_array(path)):
        problems = _broken_json(path, at_most)
    elif suffix in (".csv", ".tsv") and not problems:
        problems = _broken_table(path, "\t" if suffix == ".tsv" else ",", at_most)
    return problems


def _is_array(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(1024).lstrip().startswith(b"[")


def _broken_encoding(path: str, at_most: int) -> list[Problem]:
    problems = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                what = f"byte {error.object[error.start]:#04x} at column {error.start + 1} is not UTF-8"
                problems.append(Problem(f"{path}:{number}", f"{what}; save the file as UTF-8"))
                if len(problems) == at_most:
                    break
    return problems


def _broken_json(path: str, at_most: int) -> list[Problem]:
    problems = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            reason = _broken_json_line(line, first=number == 1)
            if reason:
                problems.append(Problem(f"{path}:{number}", f"{reason}; mend or delete the line"))
                if len(problems) == at_most:
                    break
    return problems


def _broken_json_line(line: bytes, first: bool) -> str | None:
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
        row = json.loads(text) if text.strip() else {}
    except ValueError as error:
        end = "" if line.endswith(b"\n") else "; the file ends here, it may have been cut off"
        return f"not valid JSON in UTF-8 ({error}{end})"
    except RecursionError:
        return "nested too deeply"
    if not isinstance(row, dict):
        return f"expected an object, found {type(row).__name__}"
    try:
        text.encode("utf-8")
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return "holds half of a surrogate pair (\\ud800 … \\udfff), which is no character"
    return None


def _broken_table(path: str, separator: str, at_most: int) -> list[Problem]:
    problems: list[Problem] = []
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        width, begin = None, 1
        try:
            for fields in reader:
                width = width or len(fields)
                if fields and len(fields) != width:
                    what = f"has {len(fields)} fields, the header {width}; quote the text or complete the line"
                    problems.append(Problem(f"{path}:{begin}", what))
                begin = reader.line_num + 1
                if len(problems) == at_most:
                    break
        except csv.Error as error:
            problems.append(Problem(f"{path}:{begin}", f"{error}; a quote is not closed or the file was cut off"))
    return problems


def _broken_parquet(path: str) -> list[Problem]:
    import pyarrow
    from pyarrow import parquet

    try:
        parquet.ParquetFile(path).metadata  # noqa: B018  reading it is the test
    except (pyarrow.ArrowInvalid, OSError) as error:
        return [Problem(path, f"not a whole Parquet file ({_reason(error)}); copy it again")]
    return []
