"""Estimates memory per worker and ZeRO stage before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.config.pipeline import PipelineConfig
from pipelines.models.base import QUANTISED_BYTES

ADAM_BYTES = 12  # fp32 master copy and two moments of a trained number

LIVE_NUMBERS = 10**9  # that DeepSpeed keeps gathered under ZeRO-3 (stage3_max_live_parameters)

LOGIT_BYTES = 8  # fp32 logits and their gradient or log-softmax

LOGITS_AT_A_TIME = 1 << 26  # that a GPU holds where no weight is partitioned (`likelihood.CHUNK_NUMBERS`)

ACTIVATION_BYTES = (
    34  # a token, a layer and a hidden unit, bf16 without recomputation (Korthikanti et al. 2022, eq. 2)
)

ARITHMETIC = """\
weights    base numbers × dtype bytes (quantised: 1 or 0.52 bytes in dense layers); zero3: ÷ workers, + at most 1e9
           numbers that are gathered at a time; zero3-offload: these alone, the shard lies in host memory; + what the
           adapter keeps beside what it trains
optimizer  trained numbers × (weight and gradient in the base's dtype + 12 bytes: fp32 copy, two Adam moments);
           ÷ workers: zero1 the 12 bytes, zero2 the gradient too, zero3 all of it
passes     the larger of training, tokens a micro-batch × layers × hidden × 34 bytes, with gradient checkpointing
           (layers × 2 + 34) × hidden, and evaluation, batch_tokens × hidden × 34; 34 and 2 are bytes at two bytes a
           number; + tokens × vocabulary × 8 for logits, of which zero1 and zero2 hold at most 67 million at a time
not in it  CUDA and NCCL themselves (1 to 2 GiB), fragmentation"""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelFacts:
    """Shapes of base and adapter, counted on the meta device."""

    base_parameters: int
    trainable_parameters: int
    adapter_bytes: int
    layers: int
    hidden: int
    vocabulary: int
    context: int
    buffer_bytes: int = 0  # of what the adapter keeps, whole on every worker, beside its parameters
    linear_parameters: int = 0  # of the base's, those that `base_model.quantization` would take in


def memory_by_stage(facts: ModelFacts, config: PipelineConfig) -> dict[str, dict[str, float]]:
    """GiB a worker, by ZeRO stage: weights, optimizer, passes, total. Estimates with the formulas of `ARITHMETIC`."""
    workers, size = config.resources.workers, DTYPE_BYTES[config.base_model.dtype]
    base, trained = facts.base_parameters, facts.trainable_parameters
    gathered = min(base, LIVE_NUMBERS) * size
    table = {}
    shards = () if config.base_model.quantization else ("zero3", "zero3-offload")
    for stage in ("zero1", "zero2", *shards):
        sharded = stage.startswith("zero3")
        passes = max(_training_pass(facts, config, sharded), _evaluation_pass(facts, config, sharded))
        weights = weight_bytes(facts, config)
        if sharded:
            weights = gathered + (0 if stage == "zero3-offload" else weights / workers)
        whole = size * (not sharded) + size * (stage == "zero1")  # weight, and under ZeRO-1 gradient, of each number
        parts = {
            "weights": weights + facts.buffer_bytes,
            "optimizer": trained * (whole + (ADAM_BYTES + 2 * size - whole) / workers),
            "passes": passes,
        }
        table[stage] = {name: value / 2**30 for name, value in (parts | {"total": sum(parts.values())}).items()}
    return table


def weight_bytes(facts: ModelFacts, config: PipelineConfig) -> float:
    """Bytes of the whole base."""
    size = DTYPE_BYTES[config.base_model.dtype]
    taken_in = facts.linear_parameters if config.base_model.quantization else 0
    each = QUANTISED_BYTES.get(config.base_model.quantization or "", 0.0)
    return (facts.base_parameters - taken_in) * size + taken_in * each


def _training_pass(facts: ModelFacts, config: PipelineConfig, sharded: bool) -> float:
    """Bytes of the activations and logits of one micro-batch."""
    training, workers = config.training, config.resources.workers
    tokens = -(-training.batch_size // training.gradient_accumulation // workers) * training.max_length
    layer = facts.hidden * ACTIVATION_BYTES
    kept = facts.layers * facts.hidden * 2 + layer if training.gradient_checkpointing else facts.layers * layer
    return tokens * kept * DTYPE_BYTES[config.base_model.dtype] / 2 + _logits(facts, tokens, sharded)


def _evaluation_pass(facts: ModelFacts, config: PipelineConfig, sharded: bool) -> float:
    """Bytes of one forward pass of an evaluation: the activations of one layer, and logits."""
    layer = facts.hidden * ACTIVATION_BYTES * DTYPE_BYTES[config.base_model.dtype] / 2
    tokens = config.evaluation.batch_tokens
    return tokens * layer + _logits(facts, tokens, sharded)


def _logits(facts: ModelFacts, tokens: int, sharded: bool) -> float:
    numbers = tokens * facts.vocabulary
    return LOGIT_BYTES * (numbers if sharded else min(numbers, LOGITS_AT_A_TIME))


def host_bytes(facts: ModelFacts, config: PipelineConfig) -> float:
    """Host memory a worker takes under zero3-offload for its shard of the weights."""
    return facts.base_parameters * DTYPE_BYTES[config.base_model.dtype] / config.resources.workers
