"""What can be known of a run before it starts: whether the adapter fits the model, and what it will cost.

Models are built on the meta device: shapes only, no weights, no download beyond the hub's config.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

from pipelines.config import ConfigError, PipelineConfig, Problem, looks_local
from pipelines.kinds import kind_of

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


def base_on_meta(config: PipelineConfig):
    """The base model without weights.

    Raises:
        ConfigError: no such model, or its description cannot be read.
    """
    # slow imports: only commands that look at the model pay for them
    import torch
    import transformers

    base = config.base_model
    try:
        if looks_local(base.path) and not Path(base.path).is_dir():
            raise OSError("no such folder")
        description = _description(config)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(
                description, trust_remote_code=base.trust_remote_code, dtype=getattr(torch, base.dtype)
            )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        remedy = "check the path or hub id" if looks_local(base.path) else "check the id, the network and HF_TOKEN"
        raise ConfigError([Problem("base_model.path", f"'{base.path}': {reason}; {remedy}")]) from error


def _description(config: PipelineConfig):
    """The model's config: from its folder or the hub, else `base_model.architecture`."""
    import transformers

    base = config.base_model
    try:
        return transformers.AutoConfig.from_pretrained(
            base.path, revision=base.revision, trust_remote_code=base.trust_remote_code
        )
    except OSError:
        if base.architecture is None:
            raise
        values = dict(base.architecture)
        return transformers.AutoConfig.for_model(values.pop("model_type"), **values)


def check_model(config: PipelineConfig) -> list[Problem]:
    """Every problem of base, adapter and DeepSpeed settings."""
    problems: list[Problem] = []
    for check in (model_facts, _check_deepspeed, _check_strategy):
        try:
            check(config)
        except ConfigError as error:
            problems += error.problems
    return problems


def _check_deepspeed(config: PipelineConfig) -> None:
    from pipelines.base import check_quantisation
    from pipelines.engine import deepspeed_settings, stage_of

    check_quantisation(config, stage_of(deepspeed_settings(config.deepspeed)))


def _check_strategy(config: PipelineConfig) -> None:
    from curlora.continual import make_strategy

    try:
        strategy = make_strategy(config.strategy.name, **config.strategy.options)
    except ValueError as error:
        raise ConfigError([Problem("strategy", str(error))]) from error
    problems = list(_unmet(config, strategy))
    if problems:
        raise ConfigError(problems)


def _unmet(config: PipelineConfig, strategy) -> Iterator[Problem]:
    """What the strategy needs of the configuration and of the adapted model, and does not find."""
    name = config.strategy.name
    for field, (values, reason) in strategy.requirements.items():
        found = reduce(getattr, field.split("."), config)
        if found not in values:
            yield Problem(field, f"is {found}, but strategy '{name}' needs {' or '.join(values)}: {reason}")
    if strategy.needs_heads and all(kind_of(task).scorer != "head" for task in config.tasks):
        message = f"'{name}' holds what classifier heads say, and no task has one; choose another, e.g. rehearsal"
        yield Problem("strategy.name", message)
    from curlora.continual import Strategy
    from pipelines.adapters import attach_adapter

    if type(strategy).check is Strategy.check:
        return  # it works on any model: no need to build one
    try:
        strategy.check(attach_adapter(base_on_meta(config), config.adapter, config.training.seed))
    except ConfigError:
        return  # base or adapter are at fault, which `model_facts` reports
    except ValueError as error:
        yield Problem("strategy", f"'{name}' does not work with adapter '{config.adapter.type}': {error}")


def model_facts(config: PipelineConfig) -> ModelFacts:
    """Count parameters and adapter bytes (of the last step, where the adapter grows from task to task).

    Raises:
        ConfigError: the base cannot be described, or the adapter does not fit it.
    """
    from curlora.sizes import adapter_file_bytes
    from pipelines.adapters import adapter_parameters, attach_adapter, attach_final_form
    from pipelines.base import quantised_numbers

    base = base_on_meta(config)
    base_parameters, linear_parameters = sum(p.numel() for p in base.parameters()), quantised_numbers(base)
    text = base.config.get_text_config()
    model = attach_adapter(base, config.adapter, config.training.seed)
    steps = 1 if config.is_joint else len(config.tasks)
    final = attach_final_form(base_on_meta(config), config.adapter, config.training.seed, steps)
    adapted = config.adapter.type != "none"
    return ModelFacts(
        base_parameters=base_parameters,
        trainable_parameters=adapter_parameters(model),
        adapter_bytes=adapter_file_bytes(final) if adapted else 0,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        context=getattr(text, "max_position_embeddings", 0) or 0,
        buffer_bytes=adapter_buffer_bytes(model, config.adapter.type) if adapted else 0,
        linear_parameters=linear_parameters,
    )


def adapter_buffer_bytes(model, adapter: str) -> int:
    """Bytes of an adapter's buffers (CURLoRA: C, the whitening, indices)."""
    buffers = model.named_buffers(remove_duplicate=False)
    return sum(buffer.numel() * buffer.element_size() for name, buffer in buffers if f"{adapter}_" in name)


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
    from pipelines.base import QUANTISED_BYTES

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
