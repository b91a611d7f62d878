"""What an optimizer step costs, on paper: FLOPs, bytes and messages between workers, memory, seconds.

Shapes come from the adapted model on the meta device (no weights, no download beyond its config.json), everything
else is arithmetic. It holds for decoders of dense layers with adapters in every block, one backward pass a forward
pass; gradient checkpointing is not in it, and neither are norms, activations and the optimizer's own arithmetic.
`tests/benchmarks/cost_model.py` holds it against measurements.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from pipelines.config.pipeline import PipelineConfig
from pipelines.config.sections import micro_batch
from pipelines.distributed.zero_settings import deepspeed_settings, stage_of
from pipelines.models.adapters import attach_adapter
from pipelines.preflight.memory import DTYPE_BYTES, ModelFacts, memory_by_stage
from pipelines.preflight.model import base_on_meta, model_facts

READS_EMBEDDING = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn")
"""Layers that in the first block read nothing but the frozen embedding: no gradient has to reach their input."""


@dataclass(frozen=True)
class Dense:
    """A frozen dense layer of `outputs` × `inputs` weights, with the adapter on it (`none`, `curlora` or `lora`)."""

    name: str
    outputs: int
    inputs: int
    adapter: str
    r: int
    input_gradient: bool

    @property
    def numbers(self) -> int:
        return self.outputs * self.inputs


@dataclass(frozen=True)
class Shape:
    """What costs depend on. Sizes are numbers a tensor; a tied weight is one tensor.

    Attributes:
        dense: all dense layers in the order of the forward pass, LM head included.
        blocks: decoder blocks.
        width: heads × size of a head, what attention works on.
        embedding: numbers of the token embedding.
        frozen, trained: sizes of the parameters.
        facts: what the memory estimate goes by.
    """

    dense: tuple[Dense, ...]
    blocks: int
    width: int
    embedding: int
    frozen: tuple[int, ...]
    trained: tuple[int, ...]
    facts: ModelFacts | None


def shape_of(config: PipelineConfig) -> Shape:
    """The shape of a configuration's base with its adapter.

    Raises:
        ConfigError: the base cannot be described, or the adapter does not fit it.
        ValueError: an adapter that has no cost model.
    """
    base = base_on_meta(config)
    text = base.config.get_text_config()
    adapter_of = {"none": "none", "curlora": "curlora", "lora": "lora"}.get(config.adapter.type)
    if adapter_of is None:
        raise ValueError(f"adapter.type is '{config.adapter.type}'; the cost model knows curlora, lora and none")
    model = attach_adapter(base, config.adapter, config.training.seed)
    parameters = list(model.parameters())
    return Shape(
        dense=tuple(_dense_layers(model, adapter_of, config.adapter.r)),
        blocks=text.num_hidden_layers,
        width=text.num_attention_heads
        * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads),
        embedding=base.get_input_embeddings().weight.numel(),
        frozen=tuple(p.numel() for p in parameters if not p.requires_grad),
        trained=tuple(p.numel() for p in parameters if p.requires_grad),
        facts=model_facts(config),
    )


def _dense_layers(model, adapter: str, r: int) -> Iterator[Dense]:
    adapted = {name for name, module in model.named_modules() if hasattr(module, "base_layer")}
    inside = tuple(f"{name}." for name in adapted)
    for name, module in model.named_modules():
        is_base = name.endswith(".base_layer") and name.removesuffix(".base_layer") in adapted
        if not isinstance(module, nn.Linear | Conv1D) or (name.startswith(inside) and not is_base):
            continue
        plain = name.removesuffix(".base_layer")
        first = ".0." in plain and plain.endswith(READS_EMBEDDING)
        outputs, inputs = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
        yield Dense(plain, outputs, inputs, adapter if is_base else "none", r, not first)


# -- FLOPs: a product of (a, b) and (b, c) matrices is 2 a b c
def forward_flops(shape: Shape, tokens: int, length: int) -> float:
    """FLOPs of one forward pass over `tokens` tokens in sequences of `length`.

    A dense layer takes 2 m n a token. CURLoRA adds 2 r² + 2 m r (z = (W x)[I] is a gather) and 4 r³ a pass for
    M = left · U · right; LoRA adds 2 r (m + n). Attention takes 4 · length · width a token and block, for scores and
    values, all of the square (a causal kernel skips up to half).
    """
    dense = sum(tokens * (2 * layer.numbers + _forward_update(layer)) + _middle(layer) for layer in shape.dense)
    return dense + _attention(shape, tokens, length)


def backward_flops(shape: Shape, tokens: int, length: int, partitioned: bool = False) -> float:
    """FLOPs of one backward pass: the frozen base has no weight gradients.

    A dense layer takes 2 m n a token where a gradient has to reach its input. CURLoRA adds 4 r² (∂M and ∂z), 4 r³ a
    pass, and 2 n r for Rᵀ ∂z; where the base layer runs on its own (`partitioned`) or no gradient reaches its input,
    2 m r for Cᵀ ∂y instead. LoRA adds 4 m r + 2 n r, and 2 n r where a gradient reaches the input. Attention takes
    twice its forward pass (fused kernels recompute the scores: 2 · length · width more).
    """
    dense = sum(
        tokens * (2 * layer.numbers * layer.input_gradient + _backward_update(layer, partitioned)) + _middle(layer)
        for layer in shape.dense
    )
    return dense + 2 * _attention(shape, tokens, length)


def _attention(shape: Shape, tokens: int, length: int) -> float:
    return 4 * tokens * length * shape.width * shape.blocks


def _forward_update(layer: Dense) -> int:
    return {
        "none": 0,
        "curlora": 2 * layer.r**2 + 2 * layer.outputs * layer.r,
        "lora": 2 * layer.r * (layer.outputs + layer.inputs),
    }[layer.adapter]


def _backward_update(layer: Dense, partitioned: bool) -> int:
    apart = partitioned or not layer.input_gradient
    return {
        "none": 0,
        "curlora": 4 * layer.r**2 + 2 * layer.r * (layer.outputs if apart else layer.inputs),
        "lora": 4 * layer.outputs * layer.r + 2 * layer.inputs * layer.r * (1 + layer.input_gradient),
    }[layer.adapter]


def _middle(layer: Dense) -> int:
    """FLOPs a pass of CURLoRA's M = left · U · right, forward or backward."""
    return 4 * layer.r**3 if layer.adapter == "curlora" else 0


# -- between workers
@dataclass(frozen=True)
class Sharding:
    """Where ZeRO-3 draws its lines, in numbers; the defaults of `of` are DeepSpeed's.

    Attributes:
        stage: of ZeRO, 2 or 3.
        persistence: tensors up to this size stay whole, and are gathered once, after the optimizer's step.
        reuse: a weight stays whole from its forward to its backward pass if less than this passes by in between, so
            the last reuse / 2 of a model are gathered once. DeepSpeed can keep more, by what its fetching ahead has
            skipped: `tests/benchmarks/cost_model.py` shows one such case ("part kept").
        bucket: of gradients that travel together.
    """

    stage: int
    persistence: int
    reuse: int
    bucket: int

    @classmethod
    def of(cls, settings: dict) -> Sharding:
        zero = settings.get("zero_optimization", {})
        return cls(
            stage=stage_of(settings),
            persistence=int(zero.get("stage3_param_persistence_threshold", 1e5)),
            reuse=int(zero.get("stage3_max_reuse_distance", 1e9)),
            bucket=int(zero.get("reduce_bucket_size", 5e8)),
        )


@dataclass(frozen=True)
class Traffic:
    """What a rank sends an optimizer step: bytes at ring cost (see `ring`), and messages, calls of a collective.

    Attributes:
        gradients: reduction of the trained tensors' gradients.
        updates: stepped weights, gathered on every rank.
        weights: ZeRO-3's gathering of partitioned weights for forward and backward.
        needed: the least for `gradients` and `updates`: one ring all-reduce of the trained numbers.
    """

    gradients: float
    updates: float
    weights: float
    messages: int
    needed: float

    @property
    def total(self) -> float:
        return self.gradients + self.updates + self.weights


def ring(size: float, ranks: int) -> float:
    """Bytes a rank sends in a ring all-gather or reduce-scatter of `size` bytes in all; an all-reduce is both.

    Source: Patarasu and Yuan 2009, Bandwidth optimal all-reduce algorithms.
    """
    return size * (ranks - 1) / ranks


def traffic(shape: Shape, sharding: Sharding, ranks: int, element: int, passes: int = 1) -> Traffic:
    """What DeepSpeed 0.19 sends; `element` bytes a number, `passes` micro-batches an optimizer step.

    ZeRO-2 reduces gradients by an all-reduce of the whole bucket and gathers the stepped weights, 3 ring(b) where
    arXiv 1910.02054 (section 7) needs 2. ZeRO-3 reduces by reduce-scatter, gathers tensors that persist (frozen ones
    too) one by one after the step, and every other weight for each forward and backward pass that uses it. Scalars
    (the gradient norm, the trainer's looks at the loss) are not counted, nor are their two to four messages. A message
    a gathered weight is the most: DeepSpeed fetches ahead several in one.
    """
    if ranks == 1:
        return Traffic(0, 0, 0, 0, 0)
    if sharding.stage not in (2, 3):
        raise ValueError(f"ZeRO stage {sharding.stage} has no model of its traffic; use 2 or 3")
    trained = sum(shape.trained) * element
    buckets = passes * -(-sum(shape.trained) // sharding.bucket)
    needed = 2 * ring(trained, ranks)
    if sharding.stage == 2:
        gradients, updates = 2 * ring(trained, ranks) * passes, ring(trained, ranks)
        return Traffic(gradients, updates, 0, buckets + 1, needed)
    persistent = [size for size in (*shape.frozen, *shape.trained) if size <= sharding.persistence]
    gathered, messages = _gathered(shape, sharding, ranks)
    return Traffic(
        gradients=ring(padded(shape.trained, ranks) * element, ranks) * passes,
        updates=ring(padded(persistent, ranks) * element, ranks),
        weights=ring(gathered * element, ranks) * passes,
        messages=buckets + len(persistent) + messages * passes,
        needed=needed,
    )


def _gathered(shape: Shape, sharding: Sharding, ranks: int) -> tuple[int, int]:
    """(numbers, messages) of the gathers of one forward and backward pass under ZeRO-3."""
    large = [layer for layer in shape.dense if layer.numbers > sharding.persistence]
    forward = [layer.numbers for layer in large]
    if shape.embedding > sharding.persistence:
        forward.append(shape.embedding)
    backward = [layer.numbers for layer in large if layer.input_gradient]
    updates = [size for size in shape.trained if size > sharding.persistence]
    forward, backward = forward + updates, backward + updates
    kept, count = _kept([*updates, *backward], sharding.reuse // 2)
    if kept == sum(backward):  # nothing is let go: a tied embedding is gathered once as well
        whole = [size for size in (*shape.frozen, *shape.trained) if size > sharding.persistence]
        return padded(whole, ranks), len(whole)
    return padded([*forward, *backward], ranks) - kept, len(forward) + len(backward) - count


def _kept(sizes: list[int], limit: int) -> tuple[int, int]:
    """(numbers, tensors) at the end of the list that fit into `limit`."""
    kept = count = 0
    for size in reversed(sizes):
        if kept + size > limit:
            break
        kept, count = kept + size, count + 1
    return kept, count


def padded(sizes: Iterable[int], ranks: int) -> int:
    """Numbers of tensors that are each filled up to a multiple of the ranks."""
    return sum(-(-size // ranks) * ranks for size in sizes)


# -- all of it
@dataclass(frozen=True)
class Hardware:
    """One worker's: FLOP/s that dense layers reach, bytes/s it sends, seconds before a message's first byte."""

    flops: float
    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Cost:
    """An optimizer step of one worker.

    Attributes:
        forward, backward: FLOPs.
        memory: bytes, by `preflight.memory_by_stage`.
    """

    forward: float
    backward: float
    traffic: Traffic
    memory: dict[str, float]

    def seconds(self, hardware: Hardware) -> tuple[float, float]:
        """(all communication hidden behind computation, nothing hidden).

        Computing takes FLOPs ÷ FLOP/s, communicating bytes ÷ bytes/s + messages × latency.
        """
        computing = (self.forward + self.backward) / hardware.flops
        talking = self.traffic.total / hardware.bandwidth + self.traffic.messages * hardware.latency
        return max(computing, talking), computing + talking


def cost(config: PipelineConfig, shape: Shape) -> Cost:
    """The cost of a configuration whose base and adapter have this shape (`shape_of`), by arithmetic alone."""
    training, ranks = config.training, config.resources.workers
    settings = deepspeed_settings(config.deepspeed)
    sharding = Sharding.of(settings)
    passes = training.gradient_accumulation
    tokens = micro_batch(training, ranks) * training.max_length
    element = DTYPE_BYTES[config.base_model.dtype]
    sent = traffic(shape, sharding, ranks, element, passes)  # refuses the stages that it has no model of
    gib = memory_by_stage(shape.facts, config)[f"zero{sharding.stage}"]
    partitioned = sharding.stage == 3
    return Cost(
        forward=passes * forward_flops(shape, tokens, training.max_length),
        backward=passes * backward_flops(shape, tokens, training.max_length, partitioned),
        traffic=sent,
        memory={name: value * 2**30 for name, value in gib.items()},
    )
