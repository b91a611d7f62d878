"""The search space: which settings are tried, how a setting changes a configuration, and which spaces are valid.

A setting maps field paths to values, e.g. `{"adapter.r": 8, "training.learning_rate": 3e-3}`. Random and grid settings
are drawn from the seed beforehand, so that a resumed search tries the same ones.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from pipelines.config.explaining import describe_error
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.search import CARRIED, SEARCHED, Range, SearchConfig
from pipelines.errors import ConfigError, Problem, did_you_mean

if TYPE_CHECKING:
    import numpy as np

TRIALS = 16
DIGITS = 4  # significant digits of drawn real numbers
ATTEMPTS = 100  # repeated draws after which a space counts as exhausted

Values = dict[str, Any]


def with_values(config: PipelineConfig, values: Mapping[str, Any]) -> PipelineConfig:
    """The configuration with a setting applied, and without its search.

    Raises:
        pydantic.ValidationError: the setting is invalid.
    """
    raw = config.model_dump() | {"search": None}
    for path, value in values.items():
        *parents, last = path.split(".")
        node = raw
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return PipelineConfig.model_validate(raw)


# -- settings
def size(search: SearchConfig) -> float:
    """Number of settings in the space; infinite if a range has real numbers."""
    return math.prod(_choices(space) for space in search.space.values())


def _choices(space: Range | list) -> float:
    if isinstance(space, list):
        return len(space)
    return space.high - space.low + 1 if space.whole else math.inf


def trials(search: SearchConfig) -> int:
    """Number of trials of a search, including those of `start_with`."""
    if search.trials is not None:
        return search.trials
    more = size(search) if search.algorithm == "grid" else min(TRIALS, size(search))
    return len(search.start_with) + int(more)


def settings(search: SearchConfig) -> list[Values]:
    """All settings known beforehand, each once: `start_with`, then those of the grid or drawn at random."""
    known = list(search.start_with)
    source = {"grid": _grid, "random": _random, "optuna": lambda search: iter(())}[search.algorithm]
    for values in source(search):
        if len(known) >= trials(search):
            break
        if values not in known:
            known.append(values)
    return known


def _grid(search: SearchConfig) -> Iterator[Values]:
    for combination in itertools.product(*search.space.values()):
        yield dict(zip(search.space, combination, strict=True))


def _random(search: SearchConfig) -> Iterator[Values]:
    import numpy as np  # only a configuration with a random search needs it

    generator = np.random.default_rng(search.seed)
    seen: list[Values] = []
    misses = 0
    while misses < ATTEMPTS:
        values = {path: _draw(space, generator) for path, space in search.space.items()}
        misses = misses + 1 if values in seen else 0
        if not misses:
            seen.append(values)
            yield values


def _draw(space: Range | list, generator: np.random.Generator) -> Any:
    if isinstance(space, list):
        return space[int(generator.integers(len(space)))]
    low, high = (math.log(space.low), math.log(space.high)) if space.log else (space.low, space.high)
    if space.whole and not space.log:
        return int(generator.integers(low, high + 1))
    value = generator.uniform(low, high)
    value = math.exp(value) if space.log else float(value)
    return min(max(round(value), space.low), space.high) if space.whole else float(f"{value:.{DIGITS}g}")


# -- rules
def check_space(config: PipelineConfig) -> None:
    """Raise ConfigError with every problem of a configuration's search."""
    search = config.search
    found = [problem for path in search.paths for problem in _check_path(config, path)]
    if search.algorithm == "optuna" and importlib.util.find_spec("optuna") is None:
        found.append("search.algorithm: optuna is not installed; pip install 'curlora[search]', or use random")
    found += [
        f"search.trial_training.{key}: is also in search.space; remove one of them" for key in _searched_twice(search)
    ]
    if not found:
        found += list(_check_values(config))
    if found:
        raise ConfigError(Problem(*problem.split(": ", 1)) for problem in found)


def _check_path(config: PipelineConfig, path: str) -> Iterator[str]:
    """Why a field cannot be searched."""
    section, _, field = path.partition(".")
    if section not in SEARCHED or not field:
        hint = "" if section in PipelineConfig.model_fields else f", {did_you_mean(section, SEARCHED)}"
        yield (
            f"search.space.{path}: only fields of {', '.join(SEARCHED)} change what is trained "
            f"(e.g. training.learning_rate){hint}"
        )
        return
    if config.search.when != "every":
        return
    carried = any(path == name or path.startswith(f"{name}.") for name in CARRIED)
    if carried and not (section == "adapter" and config.adapter.carry == "fresh"):
        yield (
            f"search.space.{path}: with when 'every' an adapter and its strategy continue from task to task, and this "
            "cannot change between them; search it with when: first"
            + (", or set adapter.carry: fresh" if section == "adapter" else "")
        )
    if path == "training.max_length":
        yield f"search.space.{path}: with when 'every' tasks would be scored at different lengths; use when: first"


def _searched_twice(search: SearchConfig) -> list[str]:
    return [key for key in search.trial_training if f"training.{key}" in search.paths]


def _check_values(config: PipelineConfig) -> Iterator[str]:
    """Problems of each value alone; if there are none, of every setting known beforehand."""
    search = config.search
    shortened = {f"training.{key}": value for key, value in search.trial_training.items()}
    found = list(_impossible(config, shortened, "search.trial_training"))
    for path, space in search.space.items():
        problems = [p for v in _samples(space) for p in _impossible(config, {path: v}, f"search.space.{path} = {v!r}")]
        found += problems[:1]
    yield from found
    for values in search.start_with if found else settings(search):
        label = ", ".join(f"{path} = {value!r}" for path, value in values.items())
        yield from _impossible(config, values, f"search: {label}")


def _samples(space: Range | list) -> list:
    """All values of a list; both ends of a range, and a number between them if it is real."""
    if isinstance(space, list):
        return space
    return [space.low, space.high] + ([] if space.whole else [space.low + 0.317 * (space.high - space.low)])


def _impossible(config: PipelineConfig, values: Values, label: str) -> Iterator[str]:
    try:
        with_values(config, values)
    except ValidationError as error:
        for item in error.errors():
            yield f"{label}: {describe_error(item, PipelineConfig)}"


def describe(values: Mapping[str, Any]) -> str:
    """A setting as text, e.g. `adapter.r=8, training.learning_rate=0.003`."""
    return (
        ", ".join(f"{path}={value_text(value)}" for path, value in values.items()) or "the configuration's own setting"
    )


def value_text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
