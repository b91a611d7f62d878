"""Methods by name: an adapter and a strategy, merged into the configuration of a sequence."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines.config.loading import read_yaml
from pipelines.errors import ConfigError, Problem, did_you_mean

CATALOGUE = Path(__file__).parent / "methods.yaml"
EXAMPLES_MARK = "@"  # between the name of a method and its number of training examples
RATE_MARK = ":"  # between the name of a method and its learning rate
NO_STRATEGY = {"strategy": {"name": "sequential"}}  # replaces the strategy of the sequence itself


@dataclass(frozen=True)
class Method:
    """A name and its changes to a configuration; `tuned`: whether its learning rate is chosen from the grid."""

    name: str
    changes: dict
    tuned: bool = True

    @property
    def safe_name(self) -> str:
        name = self.name.replace("+", "_").replace(EXAMPLES_MARK, "-n")
        return name.replace(RATE_MARK, "-lr").replace(".", "_")

    def on(self, examples: int) -> Method:
        """This method with at most that many training examples per task, called `name@examples`."""
        changes = merged(self.changes, {"training": {"max_train_examples": examples}})
        return replace(self, name=f"{self.name}{EXAMPLES_MARK}{examples}", changes=changes)

    def at(self, rates: Sequence[float]) -> list[Method]:
        """This method at each of the rates, called `name:rate`; itself if its rate is fixed."""
        if not self.tuned:
            return [self]
        return [
            Method(
                f"{self.name}{RATE_MARK}{rate:g}", merged(self.changes, {"training": {"learning_rate": rate}}), False
            )
            for rate in rates
        ]


@dataclass
class Comparison:
    """The methods, seeds and learning rates of a comparison.

    Attributes:
        raw: configuration of the sequence as a plain mapping, without a method.
        learning_rates: the grid; empty: every method uses the learning rate of the configuration.
        reference: baseline of the paired intervals; compared at the same number of training examples.
    """

    raw: dict
    methods: list[Method]
    seeds: list[int]
    learning_rates: list[float] = field(default_factory=list)
    reference: str | None = None

    @property
    def name(self) -> str:
        return f"compare-{self.raw['name']}"

    def configuration(self, method: Method, **training: Any) -> dict:
        """The raw configuration of a method; `training` overrides that section."""
        raw = merged(self.raw, method.changes)
        raw = merged(raw, {"training": training, "tracking": None, "search": None})
        return raw | {"storage": f"{self.raw.get('storage', './runs')}/{self.name}"}


def merged(base: Any, changes: Any) -> Any:
    """`base` updated by the nested mapping `changes`; a section of another `type` or `name` starts empty."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    for key in ("type", "name"):
        if key in changes and key in base and "tasks" not in base and base[key] != changes[key]:
            return changes
    return base | {key: merged(base.get(key), value) for key, value in changes.items()}


def read_methods(names: Sequence[str], catalogue: Path = CATALOGUE) -> list[Method]:
    """The methods with these names; `a/b+c/d` stands for a+c, a+d, b+c and b+d.

    Raises:
        ConfigError: unknown names.
    """
    names = dict.fromkeys(name for pattern in names for name in _expand(pattern))
    known = read_yaml(catalogue)
    adapters, strategies = known.get("adapters", {}), known.get("strategies", {})
    methods, problems = [], []
    for name in names:
        adapter, plus, strategy = name.partition("+")
        if adapter not in adapters:
            problems.append(Problem("--methods", f"unknown adapter '{adapter}', {did_you_mean(adapter, adapters)}"))
        elif plus and strategy not in strategies:
            problems.append(
                Problem("--methods", f"unknown strategy '{strategy}', {did_you_mean(strategy, strategies)}")
            )
        else:
            changes = merged(strategies[strategy] if plus else NO_STRATEGY, adapters[adapter])
            tuned = changes.get("tuned", True)
            methods.append(Method(name, {k: v for k, v in changes.items() if k != "tuned"}, tuned))
    if problems:
        raise ConfigError(problems)
    return methods


def _expand(pattern: str) -> list[str]:
    adapters, plus, strategies = pattern.partition("+")
    return [a + plus + s for a, s in itertools.product(adapters.split("/"), strategies.split("/"))]
