"""Every number of a configuration has a range, is finite, and is not true or false."""

import types
import typing

import pytest
from annotated_types import Ge, Gt, Le, Lt

from pipelines.config.loading import load_config, parse_config
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.sections import Section
from pipelines.config.tasks import TASKS
from pipelines.errors import ConfigError
from tests.conftest import minimal

FREE = {"Range.low", "Range.high"}  # the ends of a range of any field's values
CHECKED = {"ResourcesConfig.gpus_per_worker"}  # by a validator


def sections(annotation) -> set[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        below = (sections(field.annotation) for field in annotation.model_fields.values())
        return {annotation}.union(*below)
    return set().union(*(sections(part) for part in typing.get_args(annotation)))


def numbers() -> dict[str, object]:
    """Name of every field that is a number → the field."""
    found = {}
    for section in sections(PipelineConfig) | set(TASKS.values()):
        for name, field in section.model_fields.items():
            parts = typing.get_args(field.annotation) if is_union(field.annotation) else [field.annotation]
            if {int, float} & set(parts):
                found[f"{section.__name__}.{name}"] = field
    return found


def is_union(annotation) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def test_the_fields_are_found():
    assert {"TrainingConfig.learning_rate", "AdapterConfig.r", "GateConfig.max_forgetting"} <= numbers().keys()
    assert len(numbers()) > 40


@pytest.mark.parametrize("name", sorted(numbers().keys() - FREE - CHECKED))
def test_every_number_has_both_ends(name):
    rules = numbers()[name].metadata
    assert any(isinstance(rule, Gt | Ge) for rule in rules)
    assert any(isinstance(rule, Lt | Le) for rule in rules)


SECTION = {"TrainingConfig": "training", "EvaluationConfig": "evaluation", "ResourcesConfig": "resources"}
SECTION |= {"AdapterConfig": "adapter", "DurabilityConfig": "durability", "GateConfig": "gate"}
PLACES = [f"{SECTION[s]}.{field}" for s, field in (name.split(".") for name in sorted(numbers())) if s in SECTION]


def problems(tmp_path, place: str, value) -> str:
    section, field = place.split(".")
    with pytest.raises(ConfigError) as error:
        parse_config(minimal(tmp_path, "data", **{section: {field: value}}))
    found = [problem.message for problem in error.value.problems if problem.field == place]
    assert found
    return found[0]


@pytest.mark.parametrize("value", [float("inf"), float("nan"), float("-inf"), 10**30, -(10**30), True, False])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_number_of_its_range_is_refused_by_name(tmp_path, place, value):
    message = problems(tmp_path, place, value)
    assert "\n" not in message and len(message) < 200


@pytest.mark.parametrize("seed", [2**32, 2**64, 2**70])
def test_seeds_are_those_that_all_libraries_take(tmp_path, seed):
    assert "less than or equal to 4294967295" in problems(tmp_path, "training.seed", seed)


def test_infinity_in_a_file_is_refused_with_its_field(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        f"name: x\nbase_model: {{path: {tmp_path}}}\ntasks: [{{name: a, kind: language-modeling, data: x}}]\n"
    )
    with pytest.raises(ConfigError, match=r"training\.learning_rate: found inf: input should be a finite number"):
        load_config(file, ["training.learning_rate=.inf"])
