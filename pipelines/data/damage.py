"""Finds the lines at which a data file is damaged, for error messages."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable

from pipelines.data.files import format_of, reason_of
from pipelines.errors import Problem

AT_MOST = 5  # damaged lines named per file
LEVELS = 64  # of nesting in a row
BOM = b"\xef\xbb\xbf"
Fault = Callable[[bytes, bool], str | None]  # (line, whether it is the first) → what is wrong with it
STRUCTURE = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]')  # whole strings, so that brackets in them do not count


def silent_damage(path: str) -> list[Problem]:
    """Damage that `datasets` reads without an error: encodings other than UTF-8, rows with missing fields."""
    if format_of(path) == ".parquet":
        return []
    return broken_places(path) if format_of(path) in (".csv", ".tsv") else _broken_encoding(path, AT_MOST)


def fatal_damage(path: str) -> list[Problem]:
    """Damage that ends the process that reads the file: Arrow's JSON reader survives neither a file of lines that are
    no objects nor values that are nested thousands of levels deep."""
    if format_of(path) not in (".jsonl", ".json"):
        return []
    whole = format_of(path) == ".json" and _is_array(path)
    with open(path, "rb") as file:
        lines = [file.read()] if whole else file
        return _bad_lines(path, lines, lambda line, _: _fatal_line(line.lstrip(BOM).strip(), whole), AT_MOST)


def _bad_lines(path: str, lines: Iterable[bytes], fault: Fault, at_most: int) -> list[Problem]:
    problems = []
    for number, line in enumerate(lines, 1):
        reason = fault(line, number == 1)
        if reason:
            problems.append(Problem(f"{path}:{number}", f"{reason}; correct or delete the line"))
            if len(problems) == at_most:
                break
    return problems


def _fatal_line(line: bytes, whole: bool) -> str | None:
    if line.count(b"[") + line.count(b"{") > LEVELS and _depth(line) > LEVELS:
        return f"nested more than {LEVELS} levels deep"
    if not line or whole or line.startswith(b"{"):
        return None
    return _broken_json_line(line, first=False) or "expected an object"


def _depth(text: bytes) -> int:
    """Levels of nesting of a JSON text, whether it is valid or not."""
    depth = deepest = 0
    for token in STRUCTURE.finditer(text):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token[0], 0)
        deepest = max(deepest, depth)
    return deepest


def broken_places(path: str, at_most: int = AT_MOST) -> list[Problem]:
    """The damaged lines of a file that `datasets` failed to read: its error names no line."""
    suffix = format_of(path)
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
    with open(path, "rb") as file:
        return _bad_lines(path, file, _broken_json_line, at_most)


def _broken_json_line(line: bytes, first: bool) -> str | None:
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
        row = json.loads(text) if text.strip() else {}
    except ValueError as error:
        end = "" if line.endswith(b"\n") else "; the file ends here and may be truncated"
        return f"not valid JSON in UTF-8 ({error}{end})"
    except RecursionError:
        return "nested too deeply"
    if not isinstance(row, dict):
        return f"expected an object, found {type(row).__name__}"
    try:
        text.encode("utf-8")
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return "contains a lone surrogate (\\ud800 … \\udfff), which is no character"
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
            problems.append(Problem(f"{path}:{begin}", f"{error}; a quote is not closed or the file is truncated"))
    return problems


def _broken_parquet(path: str) -> list[Problem]:
    import pyarrow  # slow
    from pyarrow import parquet

    try:
        parquet.ParquetFile(path).metadata  # noqa: B018  reading it validates the file
    except (pyarrow.ArrowInvalid, OSError) as error:
        return [Problem(path, f"not a complete Parquet file ({reason_of(error)}); copy it again")]
    return []
