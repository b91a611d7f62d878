"""Two real processes under ZeRO-2 and ZeRO-3 send what the cost model says, and what it counts is what they write."""

import pytest
from transformers import LlamaConfig

from pipelines.distributed.zero_settings import deepspeed_settings
from pipelines.preflight import cost
from tests.benchmarks import communication
from tests.benchmarks.communication import ADAPTERS, Case
from tests.benchmarks.zero3_loading import save_random

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
STAGES = ("zero2", "zero3", "zero3, nothing kept")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("cost")
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 256}
    save_random(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4), path)
    return path


@pytest.fixture(scope="module")
def measured(model):
    return communication.measure(model, 2, [Case(stage, adapter) for stage in STAGES for adapter in ADAPTERS])


def test_two_ranks_send_what_is_predicted(model, measured):
    for found in measured:
        config = communication.configuration(model, found.case, 2)
        sharding = cost.Sharding.of(deepspeed_settings(config.deepspeed))
        predicted = cost.traffic(cost.shape_of(config), sharding, 2, found.element)
        assert found.asked == pytest.approx(predicted.total, abs=100), found.case  # beyond it: scalars


def test_what_is_counted_is_what_is_written(measured):
    for found in measured:
        if found.written:
            headers = 2000 + 1000 * found.messages
            assert found.asked <= found.written <= 1.1 * found.asked + headers, found.case
