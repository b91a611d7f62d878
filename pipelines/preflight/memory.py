"""Estimates memory per worker and ZeRO stage from counted parameters, without loading a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipelines.config.pipeline import PipelineConfig
from pipelines.models.base import QUANTISED_BYTES

ADAM_BYTES = 12  # per trained parameter: fp32 master weight and two moments
LIVE_PARAMETERS = 10**9  # that DeepSpeed keeps gathered under ZeRO-3 (stage3_max_live_parameters)
LOGIT_BYTES = 8  # fp32 logit and its gradient or log-softmax
LOGITS_AT_A_TIME = 1 << 26  # on a GPU, without partitioned weights (`models.losses.CHUNK_NUMBERS`)
ACTIVATION_BYTES = 34  # per token, layer and hidden unit, bf16, no recomputation (Korthikanti et al. 2022, eq. 2)

ARITHMETIC = """\
weights    base parameters × dtype bytes (quantised: 1 or 0.52 bytes in dense layers); zero3: ÷ workers, + at most 1e9
           parameters gathered at a time; zero3-offload: only the gathered ones, the shard is in host memory; + buffers
           of the adapter
optimizer  trained parameters × (weight and gradient in the base's dtype + 12 bytes: fp32 copy, two Adam moments);
           ÷ workers: zero1 the 12 bytes, zero2 the gradient too, zero3 all of it
passes     the larger of training, tokens per micro-batch × layers × hidden × 34 bytes, with gradient checkpointing
           (layers × 2 + 34) × hidden, and evaluation, batch_tokens × hidden × 34; 34 and 2 hold for dtypes of two
           bytes; + tokens × vocabulary × 8 for logits, of which zero1 and zero2 hold at most 67 million at a time
excluded   CUDA and NCCL themselves (1 to 2 GiB), fragmentation"""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of base model and adapter, counted on the meta device."""

    base_parameters: int
    trainable_parameters: int
    adapter_bytes: int
    layers: int
    hidden: int
    vocabulary: int
    context: int
    buffer_bytes: int = 0  # of the adapter's buffers, whole on every worker
    linear_parameters: int = 0  # base parameters that `base_model.quantization` covers
    unadapted_experts: Mapping[str, int] = field(default_factory=dict)  # parameters of fused expert tensors, by name
    said: tuple[str, ...] = ()  # warnings of the adapter itself

    def longest(self, max_length: int) -> int:
        """Tokens of the longest training sequence: `training.max_length`, or what the context holds (0: unknown)."""
        return min(max_length, self.context or max_length)

    @property
    def warnings(self) -> list[str]:
        """What of the base the adapter does not reach as configured, though a user may expect it."""
        if not self.unadapted_experts or any(name in text for text in self.said for name in self.unadapted_experts):
            return list(self.said)
        count = sum(self.unadapted_experts.values())
        return [
            *self.said,
            f"the adapter does not reach the experts {', '.join(self.unadapted_experts)}: {count:,} of "
            f"{self.base_parameters:,} parameters of the base ({count / self.base_parameters:.1%}) stay as they are",
        ]


def memory_by_stage(facts: ModelFacts, config: PipelineConfig) -> dict[str, dict[str, float]]:
    """GiB per worker by ZeRO stage: weights, optimizer, passes, total, estimated by the formulas of `ARITHMETIC`."""
    workers, size = config.resources.workers, DTYPE_BYTES[config.base_model.dtype]
    base, trained = facts.base_parameters, facts.trainable_parameters
    gathered = min(base, LIVE_PARAMETERS) * size
    table = {}
    shards = () if config.base_model.quantization else ("zero3", "zero3-offload")
    for stage in ("zero1", "zero2", *shards):
        sharded = stage.startswith("zero3")
        passes = max(_training_pass(facts, config, sharded), _evaluation_pass(facts, config, sharded))
        weights = weight_bytes(facts, config)
        if sharded:
            weights = gathered + (0 if stage == "zero3-offload" else weights / workers)
        whole = size * (not sharded) + size * (
            stage == "zero1"
        )  # weight, and under ZeRO-1 gradient, of each parameter
        parts = {
            "weights": weights + facts.buffer_bytes,
            "optimizer": trained * (whole + (ADAM_BYTES + 2 * size - whole) / workers),
            "passes": passes,
        }
        table[stage] = {name: value / 2**30 for name, value in (parts | {"total": sum(parts.values())}).items()}
    return table


def weight_bytes(facts: ModelFacts, config: PipelineConfig) -> float:
    """Bytes of the whole base model."""
    size = DTYPE_BYTES[config.base_model.dtype]
    quantised = facts.linear_parameters if config.base_model.quantization else 0
    each = QUANTISED_BYTES.get(config.base_model.quantization or "", 0.0)
    return (facts.base_parameters - quantised) * size + quantised * each


def _training_pass(facts: ModelFacts, config: PipelineConfig, sharded: bool) -> float:
    """Bytes of the activations and logits of one micro-batch."""
    training, workers = config.training, config.resources.workers
    length = facts.longest(training.max_length)
    tokens = -(-training.batch_size // training.gradient_accumulation // workers) * length
    layer = facts.hidden * ACTIVATION_BYTES
    kept = facts.layers * facts.hidden * 2 + layer if training.gradient_checkpointing else facts.layers * layer
    return tokens * kept * DTYPE_BYTES[config.base_model.dtype] / 2 + _logits(facts, tokens, sharded)


def _evaluation_pass(facts: ModelFacts, config: PipelineConfig, sharded: bool) -> float:
    """Bytes of one forward pass in evaluation: activations of one layer, and logits."""
    layer = facts.hidden * ACTIVATION_BYTES * DTYPE_BYTES[config.base_model.dtype] / 2
    tokens = config.evaluation.batch_tokens
    return tokens * layer + _logits(facts, tokens, sharded)


def _logits(facts: ModelFacts, tokens: int, sharded: bool) -> float:
    numbers = tokens * facts.vocabulary
    return LOGIT_BYTES * (numbers if sharded else min(numbers, LOGITS_AT_A_TIME))


def host_bytes(facts: ModelFacts, config: PipelineConfig) -> float:
    """Bytes of host memory per worker for its shard of the weights under zero3-offload."""
    return facts.base_parameters * DTYPE_BYTES[config.base_model.dtype] / config.resources.workers
