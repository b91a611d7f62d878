"""Cost model of an optimizer step: FLOPs, bytes and messages between workers, memory, seconds.

Shapes come from the adapted model on the meta device (no weights, no download beyond config.json); the rest is
arithmetic. It covers decoders of dense layers with adapters in every block, and one backward pass per forward pass. It
leaves out gradient checkpointing, norms, activation functions and the optimizer's arithmetic.
`tests/benchmarks/cost_model.py` compares it with measurements.
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
"""Layers whose input in the first block is the frozen embedding, so that it needs no gradient."""


@dataclass(frozen=True)
class Dense:
    """A frozen dense layer of `outputs` × `inputs` weights and its adapter (`none`, `curlora` or `lora`)."""

    name: str
    outputs: int
    inputs: int
    adapter: str
    r: int
    input_gradient: bool

    @property
    def weights(self) -> int:
        return self.outputs * self.inputs


@dataclass(frozen=True)
class Shape:
    """The shape of an adapted model. Sizes are elements per tensor; a tied weight is one tensor.

    Attributes:
        dense: all dense layers in the order of the forward pass, LM head included.
        blocks: number of decoder blocks.
        width: attention heads × head size.
        embedding: size of the token embedding.
        frozen, trained: sizes of the parameters.
        facts: input of the memory estimate.
    """

    dense: tuple[Dense, ...]
    blocks: int
    width: int
    embedding: int
    frozen: tuple[int, ...]
    trained: tuple[int, ...]
    facts: ModelFacts | None


def shape_of(config: PipelineConfig) -> Shape:
    """The shape of a configuration's base model with its adapter.

    Raises:
        ConfigError: the base cannot be described, or the adapter does not fit it.
        ValueError: the adapter has no cost model.
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


# -- FLOPs: the product of (a, b) and (b, c) matrices takes 2 a b c
def forward_flops(shape: Shape, tokens: int, length: int) -> float:
    """FLOPs of one forward pass over `tokens` tokens in sequences of `length`.

    Per token, an m × n layer takes 2 m n. CURLoRA adds 2 r² + 2 m r (z = (W x)[I] is a gather), and 4 r³ per pass for
    M = left · U · right; LoRA adds 2 r (m + n). Attention takes 4 · length · width per token and block for scores and
    values, without the up to half that a causal kernel skips.
    """
    dense = sum(tokens * (2 * layer.weights + _forward_update(layer)) + _middle(layer) for layer in shape.dense)
    return dense + _attention(shape, tokens, length)


def backward_flops(shape: Shape, tokens: int, length: int, partitioned: bool = False) -> float:
    """FLOPs of one backward pass; the frozen base has no weight gradients.

    Per token, an m × n layer takes 2 m n if its input needs a gradient. CURLoRA adds 4 r² (∂M and ∂z), 4 r³ per pass,
    and 2 n r for Rᵀ ∂z, or 2 m r for Cᵀ ∂y if the base layer runs separately (`partitioned`) or its input needs no
    gradient. LoRA adds 4 m r + 2 n r, and 2 n r if the input needs a gradient. Attention takes twice its forward pass;
    fused kernels recompute the scores, which takes 2 · length · width more.
    """
    dense = sum(
        tokens * (2 * layer.weights * layer.input_gradient + _backward_update(layer, partitioned)) + _middle(layer)
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
    """FLOPs per pass of CURLoRA's M = left · U · right, forward or backward."""
    return 4 * layer.r**3 if layer.adapter == "curlora" else 0


# -- communication
@dataclass(frozen=True)
class Sharding:
    """Thresholds of ZeRO, in elements; the defaults of `of` are DeepSpeed's.

    Attributes:
        stage: ZeRO stage, 2 or 3.
        persistence: tensors up to this size stay whole and are gathered once, after the optimizer's step.
        reuse: a weight stays whole between its forward and backward pass if fewer elements are used in between, so the
            last reuse / 2 elements of a model are gathered once. DeepSpeed can keep more if its prefetching skipped
            some; `tests/benchmarks/cost_model.py` shows such a case ("part kept").
        bucket: size of a bucket of gradients that are reduced together.
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
    """What a rank sends per optimizer step: bytes at ring cost (see `ring`), and messages (calls of a collective).

    Attributes:
        gradients: reduction of the gradients.
        updates: gathering the updated weights on all ranks.
        weights: gathering partitioned weights for forward and backward passes (ZeRO-3).
        needed: lower bound of `gradients` + `updates`: one ring all-reduce of the trained parameters.
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
    """Bytes that a rank sends in a ring all-gather or reduce-scatter of `size` bytes in total; an all-reduce is both.

    Source: Patarasu and Yuan 2009, Bandwidth optimal all-reduce algorithms.
    """
    return size * (ranks - 1) / ranks


def traffic(shape: Shape, sharding: Sharding, ranks: int, element: int, passes: int = 1) -> Traffic:
    """What DeepSpeed 0.19 sends, with `element` bytes per element and `passes` micro-batches per optimizer step.

    ZeRO-2 reduces gradients by an all-reduce of the whole bucket and gathers the updated weights: 3 ring(b), where
    arXiv 1910.02054 (section 7) needs 2. ZeRO-3 reduces by reduce-scatter, gathers persistent tensors (frozen ones
    too) one by one after the step, and every other weight for each forward and backward pass that uses it. Scalars
    (gradient norm, logged loss) and their two to four messages are not counted. One message per gathered weight is an
    upper bound, as DeepSpeed prefetches several in one.

    Raises:
        ValueError: a stage other than 2 and 3 with several ranks.
    """
    if ranks == 1:
        return Traffic(0, 0, 0, 0, 0)
    if sharding.stage not in (2, 3):
        raise ValueError(f"ZeRO stage {sharding.stage} has no model of its communication; use 2 or 3")
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
    """(elements, messages) gathered in one forward and backward pass under ZeRO-3."""
    large = [layer for layer in shape.dense if layer.weights > sharding.persistence]
    forward = [layer.weights for layer in large]
    if shape.embedding > sharding.persistence:
        forward.append(shape.embedding)
    backward = [layer.weights for layer in large if layer.input_gradient]
    updates = [size for size in shape.trained if size > sharding.persistence]
    forward, backward = forward + updates, backward + updates
    kept, count = _kept([*updates, *backward], sharding.reuse // 2)
    if kept == sum(backward):  # everything is kept, so a tied embedding is gathered once as well
        whole = [size for size in (*shape.frozen, *shape.trained) if size > sharding.persistence]
        return padded(whole, ranks), len(whole)
    return padded([*forward, *backward], ranks) - kept, len(forward) + len(backward) - count


def _kept(sizes: list[int], limit: int) -> tuple[int, int]:
    """(elements, tensors) at the end of the list that fit into `limit`."""
    kept = count = 0
    for size in reversed(sizes):
        if kept + size > limit:
            break
        kept, count = kept + size, count + 1
    return kept, count


def padded(sizes: Iterable[int], ranks: int) -> int:
    """Elements of tensors that are each padded to a multiple of the ranks."""
    return sum(-(-size // ranks) * ranks for size in sizes)


# -- total
@dataclass(frozen=True)
class Hardware:
    """Of one worker: FLOP/s reached by dense layers, bytes/s sent, seconds of latency per message."""

    flops: float
    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Cost:
    """Cost of an optimizer step for one worker.

    Attributes:
        forward, backward: FLOPs.
        memory: bytes, from `memory_by_stage`.
    """

    forward: float
    backward: float
    traffic: Traffic
    memory: dict[str, float]

    def seconds(self, hardware: Hardware) -> tuple[float, float]:
        """(seconds if all communication overlaps with computation, seconds if none does).

        Computation takes FLOPs ÷ FLOP/s; communication, bytes ÷ bytes/s + messages × latency.
        """
        computing = (self.forward + self.backward) / hardware.flops
        talking = self.traffic.total / hardware.bandwidth + self.traffic.messages * hardware.latency
        return max(computing, talking), computing + talking


def cost(config: PipelineConfig, shape: Shape) -> Cost:
    """The cost of a configuration whose adapted model has this shape (`shape_of`).

    Raises:
        ValueError: a ZeRO stage without cost model.
    """
    training, ranks = config.training, config.resources.workers
    settings = deepspeed_settings(config.deepspeed, shape.facts.hidden)
    sharding = Sharding.of(settings)
    passes = training.gradient_accumulation
    length = shape.facts.longest(training.max_length)
    tokens = micro_batch(training, ranks) * length
    element = DTYPE_BYTES[config.base_model.dtype]
    sent = traffic(shape, sharding, ranks, element, passes)  # raises for stages without model
    gib = memory_by_stage(shape.facts, config)[f"zero{sharding.stage}"]
    partitioned = sharding.stage == 3
    return Cost(
        forward=passes * forward_flops(shape, tokens, length),
        backward=passes * backward_flops(shape, tokens, length, partitioned),
        traffic=sent,
        memory={name: value * 2**30 for name, value in gib.items()},
    )
