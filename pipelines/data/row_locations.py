"""Finds file and line of a row, for error messages."""

from __future__ import annotations

import csv
import re

from pipelines.config.paths import is_uri, looks_local
from pipelines.config.tasks import Source
from pipelines.data.files import folder_files, format_of, local_copy
from pipelines.data.sources import load_split, split_expression


def files_of(source: Source, split: str) -> list[str]:
    """Local copies of the files of a split, in order; empty for a hub id."""
    return [local_copy(path) for path in _paths(source, split)]


def _paths(source: Source, split: str) -> list[str]:
    if not (is_uri(source.data) or looks_local(source.data)):
        return []
    if format_of(source.data):
        return [source.data]
    groups = folder_files(source.data, split_expression(source, split)).values()
    return [path for group in groups for path in group]


def row_location(source: Source, split: str, row: int) -> str:
    """Location of a row (counted from 0): `file:line`, or split and row number for formats without lines."""
    by_number = f"{source.data}, {split} row {row + 1}"
    if re.search(r"[\[+@]", split_expression(source, split)):
        return by_number
    if format_of(source.data):
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
    """(line of a row in a file, or 0 if it is in a later file; rows seen); None for formats without lines."""
    suffix, seen = format_of(path), 0
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
