"""The memory estimate, against numbers worked by hand."""

from dataclasses import replace

import pytest

from pipelines.config.loading import parse_config
from pipelines.preflight.memory import ModelFacts, host_bytes, memory_by_stage
from tests.conftest import minimal

GIB = 2**30


def facts(base: int) -> ModelFacts:
    return ModelFacts(base, 1_000_000, 4_000_000, layers=10, hidden=100, vocabulary=1000, context=2048)


@pytest.fixture
def config(tmp_path, reviews):
    training = {"batch_size": 16, "gradient_accumulation": 2, "max_length": 64}
    raw = minimal(tmp_path, reviews, training=training, resources={"workers": 4}, evaluation={"batch_tokens": 32})
    return parse_config(raw | {"base_model": {"path": str(tmp_path), "dtype": "bfloat16"}})


def test_hand_worked_numbers(config):
    table = memory_by_stage(facts(8 * 10**9), config)
    weights = [table[stage]["weights"] * GIB for stage in ("zero1", "zero2", "zero3", "zero3-offload")]
    assert weights == pytest.approx([16e9, 16e9, 4e9 + 2e9, 2e9])
    optimizer = [table[stage]["optimizer"] * GIB for stage in ("zero1", "zero2", "zero3")]
    assert optimizer == pytest.approx([4e6 + 3e6, 2e6 + 3.5e6, 4e6])
    tokens = 2 * 64
    assert table["zero3"]["passes"] * GIB == pytest.approx(tokens * (10 * 100 * 34 + 1000 * 8))
    assert table["zero3"]["total"] == pytest.approx(sum(table["zero3"][k] for k in ("weights", "optimizer", "passes")))
    assert host_bytes(facts(8 * 10**9), config) == pytest.approx(4e9)


def test_no_sequence_is_longer_than_the_context(config):
    training = config.training.model_copy(update={"max_length": 4096})
    passes = [
        memory_by_stage(replace(facts(10**9), context=context), config.model_copy(update={"training": training}))
        for context in (64, 0)
    ]
    assert passes[0]["zero3"] == memory_by_stage(facts(10**9), config)["zero3"]
    assert passes[1]["zero3"]["passes"] == pytest.approx(64 * passes[0]["zero3"]["passes"])


def test_checkpointing_keeps_one_layer_and_the_borders_of_the_others(config):
    training = config.training.model_copy(update={"gradient_checkpointing": True})
    table = memory_by_stage(facts(10**9), config.model_copy(update={"training": training}))
    assert table["zero2"]["passes"] * GIB == pytest.approx(128 * (100 * (10 * 2 + 34) + 1000 * 8))


def test_a_large_evaluation_pass_binds(config):
    evaluation = config.evaluation.model_copy(update={"batch_tokens": 100_000})
    table = memory_by_stage(facts(10**9), config.model_copy(update={"evaluation": evaluation}))
    assert table["zero3"]["passes"] * GIB == pytest.approx(100_000 * (100 * 34 + 1000 * 8))
    assert table["zero2"]["passes"] * GIB == pytest.approx(100_000 * 100 * 34 + 2**26 * 8)  # logits in parts


def test_what_an_adapter_keeps_is_whole_on_every_worker(config):
    plain = facts(8 * 10**9)
    kept = replace(plain, buffer_bytes=10**9)
    for stage, parts in memory_by_stage(kept, config).items():
        more = parts["weights"] - memory_by_stage(plain, config)[stage]["weights"]
        assert more * GIB == pytest.approx(10**9), stage


def test_a_quantised_base_weighs_what_its_dense_layers_weigh_and_is_never_sharded(config):
    some = replace(facts(8 * 10**9), linear_parameters=7 * 10**9)
    for bits, each in (("8bit", 1.0), ("4bit", 0.5 + 1 / 64)):
        base = config.base_model.model_copy(update={"quantization": bits})
        table = memory_by_stage(some, config.model_copy(update={"base_model": base}))
        assert list(table) == ["zero1", "zero2"]
        assert table["zero2"]["weights"] * GIB == pytest.approx(10**9 * 2 + 7 * 10**9 * each)
