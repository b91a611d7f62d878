"""Turns validation errors of pydantic into problems that name field, value found and remedy."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from pipelines.config.benchmarks import RETAINED, Benchmark
from pipelines.config.sections import Section
from pipelines.config.tasks import TASKS
from pipelines.errors import Problem, did_you_mean

UNIONS: dict[str, type[Section]] = TASKS | RETAINED  # by the tag of each member


def problem_of(error: dict, root: type[Section]) -> Problem:
    """A validation error of `root` as one line: field, value found, remedy."""
    loc = [part for part in error["loc"] if not _is_union_tag(part)]
    field = ".".join(map(str, loc))
    error_type, value = error["type"], error.get("input")
    if error_type == "extra_forbidden":
        section = _section_at(error["loc"][:-1], root)
        parent = ".".join(map(str, loc[:-1]))
        return Problem(parent, f"unknown key '{loc[-1]}', {did_you_mean(str(loc[-1]), section.model_fields)}")
    if error_type == "missing":
        return Problem(field, "is missing; it has no default")
    if error_type == "value_error":
        return Problem(field, str(error["ctx"]["error"]))
    if error_type in ("union_tag_invalid", "union_tag_not_found"):
        found = value.get("kind") if isinstance(value, dict) else value
        return Problem(f"{field}.kind", f"unknown kind {found!r}, {did_you_mean(str(found), TASKS)}")
    if error_type == "none_required":
        reason = _section_at(error["loc"][:-1], root).model_fields[error["loc"][-1]].description
        return Problem(field, f"found {_short(value)}, but only null is possible ({reason})")
    if error_type == "literal_error":
        valid = re.findall(r"'([^']+)'", error["ctx"]["expected"])
        return Problem(field, f"found {_short(value)}, {did_you_mean(str(value), valid)}")
    return Problem(field, f"found {_short(value)}: {error['msg'][0].lower() + error['msg'][1:]}")


def false_numbers(raw: Any, section: type[Section], place: tuple[str, ...] = ()) -> Iterator[Problem]:
    """Fields of a mapping, as written, that are true or false where a number belongs: pydantic would read 1 or 0."""
    for name, value in raw.items() if isinstance(raw, dict) else ():
        field = section.model_fields.get(name)
        if field is None:
            continue
        here = (*place, str(name))
        kinds = set(_kinds(field.annotation))
        if isinstance(value, bool) and kinds & {int, float} and not kinds & {bool, Any}:
            yield Problem(".".join(here), f"found {str(value).lower()}, expected a number")
        for position, part in enumerate(value) if isinstance(value, list) else ():
            kind = part.get("kind") if isinstance(part, dict) else None
            nested = TASKS.get(kind) if isinstance(kind, str) else None
            if isinstance(part, dict) and "suite" in part:
                nested = Benchmark
            yield from false_numbers(part, nested or _section_of(field.annotation), (*here, str(position)))
        yield from false_numbers(value, _section_of(field.annotation), here)


def _section_of(annotation: Any) -> type[Section]:
    return next(iter(_sections(annotation)), Section)


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of."""
    parts = typing.get_args(annotation)
    if not parts or typing.get_origin(annotation) is typing.Literal:
        yield annotation
        return
    for part in parts:
        yield from _kinds(part)


def describe_error(error: dict, root: type[Section]) -> str:
    """A validation error as text, for code that validates parts of a configuration itself."""
    return str(problem_of(error, root))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_union_tag(part: Any) -> bool:
    return isinstance(part, str) and (
        part in (*UNIONS, "list[str]", "str", "float", "TrackingConfig", "GateConfig", "DomainsConfig", "range")
        or part.startswith(("dict[", "literal[", "list["))
    )


def _section_at(loc: tuple, root: type[Section]) -> type[Section]:
    """The section that the location of a validation error points to."""
    section = root
    for part in loc:
        if isinstance(part, str) and part in section.model_fields:
            nested = list(_sections(section.model_fields[part].annotation))
            section = nested[0] if nested else section
        elif part in UNIONS:
            section = UNIONS[part]
    return section


def _sections(annotation: Any) -> Iterable[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _sections(argument)
