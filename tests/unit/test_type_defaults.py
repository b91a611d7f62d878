"""Rank, scale and learning rate that a configuration leaves out are those of its type of adapter."""

import dataclasses

import peft
import pytest
import yaml
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import curlora  # noqa: F401  its own type is among them
from pipelines.chain.plan import make_plan
from pipelines.config.loading import parse_config
from pipelines.config.type_defaults import LORA_LIKE, OWN_DEFAULTS, RANK, RANKS, with_type_defaults
from pipelines.models.adapters import peft_config
from pipelines.runs.directory import RunDirectory
from tests.conftest import minimal

OUTSIDE = peft.PromptLearningConfig
NO_RANK = {"oft": "0 there means that the block size decides", "supertuning": "None there"}


def numbers(raw) -> tuple:
    config = parse_config(raw)
    return config.adapter.r, config.adapter.alpha, config.training.learning_rate


@pytest.mark.parametrize(
    ("written", "training", "resolved"),
    [
        ({}, {}, (23, 1.0, 3e-3)),
        ({"type": "curlora", "r": 4}, {}, (4, 1.0, 3e-3)),
        ({"type": "none"}, {}, (23, 1.0, 3e-3)),
        ({"type": "lora"}, {}, (8, 16, 2e-4)),
        ({"type": "LoRA"}, {}, (8, 16, 2e-4)),
        ({"type": "lora", "r": 16}, {}, (16, 32, 2e-4)),
        ({"type": "lora", "r": 16, "alpha": 8}, {"learning_rate": 1e-3}, (16, 8, 1e-3)),
        ({"type": "lora", "alpha": 3}, {"epochs": 1}, (8, 3, 2e-4)),
        ({"type": "gralora"}, {}, (32, 64, 2e-4)),
        ({"type": "vera"}, {}, (256, 1.0, 3e-3)),
        ({"type": "ia3"}, {}, (8, 1.0, 3e-3)),
    ],
)
def test_defaults_are_those_of_the_type(tmp_path, written, training, resolved):
    assert numbers(minimal(tmp_path, tmp_path, adapter=written, training=training)) == resolved


def test_a_lora_without_numbers_is_scaled_by_two(tmp_path):
    config = peft_config(parse_config(minimal(tmp_path, tmp_path, adapter={"type": "lora"})).adapter, seed=0)
    assert (config.r, config.lora_alpha) == (8, 16)


@pytest.mark.parametrize("written", [{"type": "lora", "r": "x"}, {"type": 3}, {"type": None}, "lora", None])
def test_what_is_no_adapter_is_left_to_the_validation(written):
    raw = {"adapter": written, "training": None}
    assert with_type_defaults(raw)["training"] is None


def test_ranks_are_those_of_peft():
    for key, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        name = str(getattr(key, "value", key)).lower()
        ranks = [field.default for field in dataclasses.fields(kind) if field.name == "r"]
        if ranks and name not in (*OWN_DEFAULTS, *NO_RANK) and not issubclass(kind, OUTSIDE):
            assert RANKS.get(name, RANK) == ranks[0], name
    assert set(RANKS) - set(LORA_LIKE) <= {str(getattr(k, "value", k)).lower() for k in PEFT_TYPE_TO_CONFIG_MAPPING}


def test_a_run_records_the_numbers_and_one_without_them_keeps_what_it_was_trained_with(tmp_path, reviews):
    config = parse_config(minimal(tmp_path, reviews, adapter={"type": "lora"}, tracking=None))
    run = RunDirectory(config.run_uri)
    run.open_for_writing(config)
    recorded = yaml.safe_load(run.read_bytes("config.yaml"))
    assert (recorded["adapter"]["r"], recorded["adapter"]["alpha"]) == (8, 16)
    assert recorded["training"]["learning_rate"] == 2e-4
    for section, name in (("adapter", "r"), ("adapter", "alpha"), ("training", "learning_rate")):
        del recorded[section][name]
    run.write_bytes("config.yaml", yaml.safe_dump(recorded).encode())
    old = run.config()
    assert (old.adapter.r, old.adapter.alpha, old.training.learning_rate) == (23, 1.0, 3e-3)


def test_written_numbers_keep_their_fingerprint(tmp_path, reviews):
    """Of the version before there were defaults by type."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    training = {"learning_rate": 3e-3, "max_length": 128}
    written = {"adapter": {"type": "lora", "r": 23, "alpha": 1.0}, "training": training}
    raw = minimal(tmp_path, reviews, base_model={"path": str(base), "dtype": "float32"}, tracking=None, **written)
    (step,) = make_plan(parse_config(raw)).steps
    assert step.fingerprint == "daa18bdaf6f69d648e04872957c7681c"
