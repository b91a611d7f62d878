"""The cost model against counted FLOPs, real adapters' sizes, and numbers worked by hand."""

import json

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from pipelines.config.loading import parse_config
from pipelines.distributed.zero_settings import deepspeed_settings
from pipelines.models.adapters import attach_adapter
from pipelines.preflight import cost
from tests.conftest import minimal

QKV = ["q_proj", "k_proj", "v_proj"]
ADAPTERS = {
    "curlora, all linear": {"type": "curlora", "r": 5, "target_modules": "all-linear"},
    "curlora, q/k/v": {"type": "curlora", "r": 5, "target_modules": QKV},
    "lora, all linear": {"type": "lora", "r": 3, "alpha": 3, "target_modules": "all-linear"},
    "lora, q/k/v": {"type": "lora", "r": 3, "alpha": 3, "target_modules": QKV},
}
ROWS, LENGTH = 3, 20


@pytest.fixture(params=ADAPTERS.values(), ids=ADAPTERS.keys())
def config(request, tmp_path, reviews):
    description = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    description.save_pretrained(tmp_path)
    return parse_config(minimal(tmp_path, reviews, adapter=request.param))


@pytest.fixture
def adapted(config):
    torch.manual_seed(0)
    description = transformers.AutoConfig.from_pretrained(config.base_model.path)
    base = transformers.AutoModelForCausalLM.from_config(description, attn_implementation="eager")
    return attach_adapter(base, config.adapter, 0)


def addmm_in_place(total, a, b, *rest, **named) -> int:
    """FLOPs of a product that the counter knows only out of place."""
    return 2 * a[0] * a[1] * b[1]


def counted(call) -> tuple[int, torch.Tensor | None]:
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_in_place}) as counter:
        result = call()
    return counter.get_total_flops(), result


def loss(model) -> torch.Tensor:
    ids = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % 300
    return model(input_ids=ids, use_cache=False).logits.square().mean()


def test_flops_are_those_of_a_real_step(config, adapted):
    shape, tokens = cost.shape_of(config), ROWS * LENGTH
    forward, value = counted(lambda: loss(adapted))
    backward, _ = counted(value.backward)
    # what is left is the rotary embedding's product of positions and frequencies
    assert cost.forward_flops(shape, tokens, LENGTH) == pytest.approx(forward, rel=1e-4)
    assert cost.backward_flops(shape, tokens, LENGTH) == pytest.approx(backward, rel=1e-9)


def test_flops_where_the_base_layers_run_on_their_own(config, adapted):
    """As under ZeRO-3, where DeepSpeed's hooks gather the weights of each layer."""
    for module in adapted.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, arguments: None)
    shape, tokens = cost.shape_of(config), ROWS * LENGTH
    forward, value = counted(lambda: loss(adapted))
    backward, _ = counted(value.backward)
    assert cost.forward_flops(shape, tokens, LENGTH) == pytest.approx(forward, rel=1e-4)
    assert cost.backward_flops(shape, tokens, LENGTH, partitioned=True) == pytest.approx(backward, rel=1e-9)


def test_a_frozen_base_costs_less_than_training_it(config):
    shape, tokens = cost.shape_of(config), ROWS * LENGTH
    ratio = cost.backward_flops(shape, tokens, LENGTH) / cost.forward_flops(shape, tokens, LENGTH)
    assert 0.8 < ratio < 1.5, "2 where weights have gradients"


def test_sizes_are_those_of_the_real_adapter(config, adapted):
    shape = cost.shape_of(config)
    trained, total = adapted.get_nb_trainable_parameters()
    assert sum(shape.trained) == trained
    assert sum(shape.trained) + sum(shape.frozen) == total
    r = config.adapter.r
    by_hand = {"curlora": lambda layer: r * r, "lora": lambda layer: r * (layer.outputs + layer.inputs)}
    layers = [layer for layer in shape.dense if layer.adapter != "none"]
    assert sum(map(by_hand[config.adapter.type], layers)) == trained
    buffers = {name: b for name, b in adapted.named_buffers() if "curlora_" in name}
    assert shape.facts.buffer_bytes == sum(b.numel() * b.element_size() for b in buffers.values())


# -- traffic, by hand: three layers of 100, 100 and 400 numbers, an embedding of 400, norms of 10


def small_shape(trained: tuple[int, ...]) -> cost.Shape:
    layers = [("a", 10, 10, False), ("b", 10, 10, True), ("head", 40, 10, True)]
    dense = tuple(cost.Dense(name, m, n, "none", 0, reached) for name, m, n, reached in layers)
    return cost.Shape(dense, 1, 10, 400, (400, 10, 100, 100, 10, 400), trained, None)


def sharding(stage: int, persistence: int = 50, reuse: int = 0) -> cost.Sharding:
    return cost.Sharding(stage, persistence, reuse, bucket=25)


def test_zero2_reduces_whole_buckets_and_gathers_the_stepped_weights():
    found = cost.traffic(small_shape((20, 20)), sharding(2), ranks=4, element=2)
    assert (found.gradients, found.updates, found.weights) == (2 * 60, 60, 0)  # 40 numbers × 2 bytes × 3/4
    assert found.needed == 120
    assert found.messages == 2 + 1


def test_zero3_gathers_weights_for_each_pass_that_uses_them():
    found = cost.traffic(small_shape((20, 22)), sharding(3), ranks=4, element=2)
    assert found.weights == (400 + 100 + 2 * 100 + 2 * 400) * 2 * 3 / 4, "no gradient: the embedding, layer a"
    assert found.gradients == (20 + 24) * 1.5, "22 is filled up to 24"
    assert found.updates == (20 + 24 + 12 + 12) * 1.5, "frozen norms persist, and are gathered too"
    assert found.messages == 2 + 4 + (1 + 1 + 2 + 2)


def test_zero3_gathers_large_trained_tensors_with_the_weights():
    few, more = (cost.traffic(small_shape(trained), sharding(3), 2, 4) for trained in ((20,), (20, 60)))
    assert more.weights - few.weights == 2 * 60 * 4 / 2
    assert more.updates == few.updates


def test_what_is_reused_soon_is_gathered_once():
    apart = cost.traffic(small_shape((20,)), sharding(3), 4, 2)
    near = cost.traffic(small_shape((20,)), sharding(3, reuse=800), 4, 2)
    assert apart.weights - near.weights == 400 * 2 * 3 / 4, "the head's backward pass follows its forward pass"
    whole = cost.traffic(small_shape((20,)), sharding(3, reuse=10**9), 4, 2)
    assert whole.weights == (400 + 100 + 100 + 400) * 1.5


def test_one_worker_sends_nothing_and_other_stages_have_no_model():
    assert cost.traffic(small_shape((20,)), sharding(3), 1, 4).total == 0
    with pytest.raises(ValueError, match="use 2 or 3"):
        cost.traffic(small_shape((20,)), sharding(1), 2, 4)


def test_shipped_settings_are_read():
    assert cost.Sharding.of(deepspeed_settings("zero3")) == cost.Sharding(3, 10_000, 10**9, 5 * 10**8)


def test_micro_batches_gather_weights_again(config):
    training = {"batch_size": 8, "max_length": LENGTH}
    zero = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    update = {"deepspeed": zero, "resources": config.resources.model_copy(update={"workers": 2})}
    shape = cost.shape_of(config)
    once, twice = (
        cost.cost(
            config.model_copy(
                update=update
                | {"training": config.training.model_copy(update=training | {"gradient_accumulation": passes})}
            ),
            shape,
        )
        for passes in (1, 2)
    )
    assert twice.traffic.weights == 2 * once.traffic.weights
    assert twice.traffic.gradients == 2 * once.traffic.gradients
    assert twice.traffic.updates == once.traffic.updates
    r3 = sum(4 * layer.r**3 for layer in shape.dense if layer.adapter == "curlora")
    assert twice.forward == once.forward + r3, "the same tokens, M twice"


def test_seconds_lie_between_all_hidden_and_none():
    step = cost.Cost(6e12, 4e12, cost.Traffic(1e9, 1e9, 2e9, 1000, 0), {})
    assert step.seconds(cost.Hardware(1e13, 1e10, 1e-5)) == pytest.approx((1.0, 1.41))


def test_memory_counts_what_curlora_keeps_on_every_worker(config):
    shape = cost.shape_of(config)
    found = cost.cost(config, shape)
    parts = sum(value for name, value in found.memory.items() if name != "total")
    assert found.memory["total"] == pytest.approx(parts)
    assert (shape.facts.buffer_bytes > 0) == (config.adapter.type == "curlora")


def test_an_adapter_without_a_model_is_an_error(config, tmp_path):
    raw = json.loads(config.adapter.model_dump_json()) | {"type": "ia3"}
    other = config.model_copy(update={"adapter": type(config.adapter).model_validate(raw)})
    with pytest.raises(ValueError, match="knows curlora, lora and none"):
        cost.shape_of(other)
