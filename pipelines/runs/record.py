"""Base class of the records of a run directory: frozen dataclasses with a JSON form.

Reading and writing a record loses nothing: fields unknown to this version are kept in `other`. Fields that
earlier versions did not write have a default.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from typing import Self

OPTIONAL = {"optional": True}  # metadata of fields that are omitted when None; other fields are written as null


@dataclass(frozen=True)
class Record:
    """A JSON object with named fields; nested records in tuples and mappings are converted, too.

    Attributes:
        other: unknown fields, as they were read.
    """

    other: dict[str, Any] = field(default_factory=dict, kw_only=True, repr=False)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """The record of a parsed JSON object.

        Raises:
            TypeError: a field without a default is missing.
        """
        readers, named, other = _readers(cls), {}, {}
        for name, value in raw.items():
            read = readers.get(name, _unnamed)
            if read is _unnamed:
                other[name] = value
            else:
                named[name] = value if read is None or value is None else read(value)
        return cls(**named, other=other)

    def to_json(self) -> dict[str, Any]:
        """A JSON object; equal to the one that `from_json` was given."""
        found = {}
        for name, is_optional in _written(type(self)):
            value = getattr(self, name)
            if value is not None or not is_optional:
                found[name] = _plain(value)
        return found | {name: _plain(value) for name, value in self.other.items()}


def _unnamed(value: Any) -> Any:
    return value


@functools.cache
def _written(record: type[Record]) -> tuple[tuple[str, bool], ...]:
    return tuple((f.name, f.metadata == OPTIONAL) for f in fields(record) if f.name != "other")


@functools.cache
def _readers(record: type[Record]) -> dict[str, Callable[[Any], Any] | None]:
    """Field → function that converts its JSON value; None if no conversion is needed."""
    hints = get_type_hints(record)
    return {name: _reader(hints[name]) for name, _ in _written(record)}


def _reader(hint: Any) -> Callable[[Any], Any] | None:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is None:
        return hint.from_json if isinstance(hint, type) and issubclass(hint, Record) else None
    if origin in (Union, UnionType):
        return next(filter(None, map(_reader, inner)), None)
    if origin is tuple:
        read = _reader(inner[0])
        return tuple if read is None else lambda values: tuple(map(read, values))
    if origin is dict and (read := _reader(inner[1])):
        return lambda values: {name: read(value) for name, value in values.items()}
    return None


def _plain(value: Any) -> Any:
    """Converts records and tuples. Lists are returned as they are: they hold plain JSON, and curves are long."""
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value
