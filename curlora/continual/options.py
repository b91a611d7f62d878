"""Options of a strategy, declared once as class attributes: checked, listed and documented from that declaration.

class EWC(Strategy):
    strength: float = option(1000.0, "weight λ of the penalty", at_least=0)
"""

from __future__ import annotations

import inspect
import types
import typing
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

TYPES: dict[type, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "text"),
}
"""Annotation → the values it accepts, and what messages call them."""


@dataclass(frozen=True)
class Option:
    """One option of a strategy: what a user may write under `strategy:` in a configuration.

    Attributes:
        type: the annotated type; None always means the default.
        declared_by: name of the strategy in whose file it is declared; others inherit it.
    """

    default: Any
    description: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    name: str = ""
    type: type = float
    declared_by: str = ""

    @property
    def range(self) -> str:
        """The allowed values in mathematical notation, such as "[0, 1)" or "≥ 0"; empty: all of the type."""
        low = self.above if self.at_least is None else self.at_least
        high = self.below if self.at_most is None else self.at_most
        if low is not None and high is not None:
            return f"{'(' if self.at_least is None else '['}{low}, {high}{')' if self.at_most is None else ']'}"
        if low is not None:
            return f"{'>' if self.at_least is None else '≥'} {low}"
        return "" if high is None else f"{'<' if self.at_most is None else '≤'} {high}"

    def checked(self, value: Any) -> Any:
        """`value`, or the default for None; raises ValueError where it is of another type or out of range."""
        if value is None:
            return self.default
        accepted, noun = TYPES[self.type]
        of_type = isinstance(value, accepted) and (self.type is bool or not isinstance(value, bool))
        if not (of_type and self._inside(value)):
            example = "" if self.default is None else f", e.g. {self.default}"
            raise ValueError(f"{self.name} is {value!r}; use {noun}{self._range_in_words()}{example}")
        return value

    def _inside(self, value: Any) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def _range_in_words(self) -> str:
        words = {"≥": "of at least", ">": "above", "≤": "of at most", "<": "below"}
        sign, _, bound = self.range.partition(" ")
        return f" {words[sign]} {bound}" if sign in words else f" in {self.range}" if self.range else ""


def option(
    default: Any,
    description: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """Declare an option in the body of a strategy class; the annotation is its type (bool, int, float or str).

    Returns Any, so that type checkers see the annotated type, as with `dataclasses.field`.
    """
    return Option(default, description, at_least, above, at_most, below)


def options_of(strategy: type) -> dict[str, Option]:
    """All options of a strategy class by name: its own first, then the inherited ones.

    A subclass declares an option again to change its default, and sets the attribute to a plain value to drop it.
    """
    found: dict[str, Option] = {}
    for owner in strategy.__mro__:
        declared = {name: value for name, value in vars(owner).items() if isinstance(value, Option)}
        annotations = inspect.get_annotations(owner, eval_str=True) if declared else {}
        for name, value in declared.items():
            if name not in found and isinstance(getattr(strategy, name), Option):
                type_ = _type(f"{owner.__name__}.{name}", annotations.get(name))
                found[name] = replace(value, name=name, type=type_, declared_by=owner.name)
    return found


def _type(where: str, annotation: Any) -> type:
    """bool, int, float or str from the annotation of an option, which may allow None as well."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = [kind for kind in (typing.get_args(annotation) if is_union else (annotation,)) if kind is not type(None)]
    if len(kinds) != 1 or kinds[0] not in TYPES:
        raise TypeError(f"{where} is annotated as {annotation}; an option is a bool, int, float or str (or None)")
    return kinds[0]
