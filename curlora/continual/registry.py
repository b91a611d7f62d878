"""Strategies by name: every file in `strategies/` is one, named after its file and imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from curlora.continual.options import Option
from curlora.continual.strategy import Strategy
from curlora.names import strategies


class Strategies(Mapping[str, type[Strategy]]):
    """Name → strategy class. Iterating imports nothing; looking a class up imports its file."""

    def __getitem__(self, name: str) -> type[Strategy]:
        if name not in strategies():
            raise KeyError(name)
        module = importlib.import_module(f"curlora.continual.strategies.{name}")
        own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
        found = [c for c in own if isinstance(c, type) and issubclass(c, Strategy) and c.name == name]
        if len(found) != 1:
            raise TypeError(f"{module.__file__} must define one subclass of Strategy with name = {name!r}")
        return found[0]

    def __iter__(self) -> Iterator[str]:
        return iter(strategies())

    def __len__(self) -> int:
        return len(strategies())


STRATEGIES = Strategies()


def make_strategy(name: str, **options: Any) -> Strategy:
    """The strategy called `name`; raises ValueError for an unknown name, an unknown option or an impossible value."""
    if name not in STRATEGIES:
        raise ValueError(f"unknown strategy '{name}', expected one of: {', '.join(STRATEGIES)}")
    return STRATEGIES[name](**options)


def describe_options(name: str) -> list[Option]:
    """The options of a strategy: its own first, then those it inherits."""
    return list(STRATEGIES[name].options.values())


def option_defaults(name: str) -> dict[str, Any]:
    """Option → default of a strategy."""
    return {option.name: option.default for option in describe_options(name)}


def options_table() -> str:
    """All options of all strategies as a Markdown table; what a strategy inherits unchanged is named in one row."""
    lines = ["| strategy | option | type | default | range | meaning |", "|---|---|---|---|---|---|"]
    for name in STRATEGIES:
        inherited: dict[str, list[str]] = {}
        for option in describe_options(name):
            if option.declared_by != name:
                inherited.setdefault(option.declared_by, []).append(f"`{option.name}`")
                continue
            default = "" if option.default is None else option.default
            cells = (f"`{name}`", f"`{option.name}`", option.type.__name__, default, option.range, option.description)
            lines.append(f"| {' | '.join(map(str, cells))} |")
        for other, names in inherited.items():
            lines.append(f"| `{name}` | {', '.join(names)} | | | | as in `{other}` |")
    return "\n".join(lines) + "\n"
