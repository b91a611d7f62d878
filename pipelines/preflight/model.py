"""Checks whether adapter, strategy and DeepSpeed settings fit the model, and counts its parameters.

Models are built on the meta device: shapes without weights, and no download beyond config.json.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers

from curlora.continual import Strategy, make_strategy
from curlora.sizes import adapter_file_bytes
from pipelines.config.paths import is_gguf, looks_local
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.sections import BaseModelConfig
from pipelines.config.tasks import LanguageModelingTask
from pipelines.data.kinds import kind_of
from pipelines.distributed.zero_settings import deepspeed_settings, stage_of
from pipelines.errors import ConfigError, Problem
from pipelines.models import frozen_lora
from pipelines.models.adapters import adapter_parameters, attach_adapter, attach_final_form
from pipelines.models.base import quantised_numbers
from pipelines.models.experts import fused_experts, unadapted
from pipelines.models.gguf import described
from pipelines.models.packing import separates_documents
from pipelines.preflight.memory import ModelFacts


def check_fits(
    config: PipelineConfig, depth: int | None = None, warn: Callable[[str], None] = lambda text: None
) -> None:
    """Raise ConfigError with every problem that `check_model` finds."""
    problems = check_model(config, depth, warn)
    if problems:
        raise ConfigError(problems)


def check_quantisation(config: PipelineConfig, zero_stage: int) -> None:
    """Raise ConfigError if a quantised base is impossible here or with the rest of the configuration."""
    found = config.base_model.quantization
    if not found:
        return
    reasons = []
    if zero_stage == 3:
        reasons.append("ZeRO-3 cannot partition bitsandbytes weights; use deepspeed: zero2")
    if frozen_lora.changes_base(config.adapter):
        start = config.adapter.options["init_lora_weights"]
        reasons.append(f"'{start}' takes its factors from the weights, which quantisation has changed")
    if importlib.util.find_spec("bitsandbytes") is None:
        reasons.append("bitsandbytes is not installed; pip install 'bitsandbytes>=0.48' on every node")
    problems = [
        Problem("base_model.quantization", f"is {found}, but {why}, or set quantization: null") for why in reasons
    ]
    if problems:
        raise ConfigError(problems)


def base_on_meta(config: PipelineConfig):
    """The base model on the meta device.

    Raises:
        ConfigError: there is no such model, or its config.json cannot be read.
    """
    return _on_meta(config.base_model)


def _on_meta(base: BaseModelConfig):
    try:
        if looks_local(base.path) and not is_gguf(base.path) and not Path(base.path).is_dir():
            raise OSError("no such folder")
        description = _description(described(base))
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(
                description, trust_remote_code=base.trust_remote_code, dtype=getattr(torch, base.dtype)
            )
    except ConfigError:
        raise  # of a GGUF file, and in words
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        remedy = "check the path or hub id" if looks_local(base.path) else "check the id, the network and HF_TOKEN"
        raise ConfigError([Problem("base_model.path", f"'{base.path}': {reason}; {remedy}")]) from error


def _description(base: BaseModelConfig):
    """The model's config, from its folder, the hub or `base_model.architecture`."""
    try:
        return transformers.AutoConfig.from_pretrained(
            base.path, revision=base.revision, trust_remote_code=base.trust_remote_code
        )
    except OSError:
        if base.architecture is None:
            raise
        values = dict(base.architecture)
        return transformers.AutoConfig.for_model(values.pop("model_type"), **values)


def check_model(
    config: PipelineConfig, depth: int | None = None, warn: Callable[[str], None] = lambda text: None
) -> list[Problem]:
    """Every problem of base, adapter, strategy and DeepSpeed settings.

    Args:
        depth: steps from the base to the last one of the chain, which `start_from` adds to; default: one per task.
        warn: called with every finding that does not prevent a run.
    """

    def check_adapter(config: PipelineConfig) -> None:
        for text in model_facts(config, depth).warnings:
            warn(text)

    problems: list[Problem] = []
    for check in (check_adapter, _check_documents, with_packing, _check_deepspeed, _check_strategy):
        try:
            check(config)
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    return problems


def _check_documents(config: PipelineConfig) -> None:
    """Raise ConfigError for tasks whose documents the base would not keep apart."""
    fields = [
        f"tasks.{number}.documents"
        for number, task in enumerate(config.tasks)
        if isinstance(task, LanguageModelingTask) and task.documents == "separate"
    ]
    if not fields:
        return
    base = base_on_meta(config)
    if separates_documents(base) is False:
        reason = f"a base of type '{base.config.model_type}' lets every document of a block see those before it"
        raise ConfigError([Problem(field, f"is separate, but {reason}; set documents: joined") for field in fields])


def with_packing(config: PipelineConfig) -> PipelineConfig:
    """The configuration with `training.packing` decided: auto packs if the base keeps examples apart.

    Raises:
        ConfigError: it is true, but the base lets packed examples see each other.
    """
    wanted = config.training.packing
    if wanted is False:
        return config
    apart, family = _keeps_apart(config.base_model.model_dump_json())
    if wanted is True and apart is False:
        reason = f"a base of type '{family}' lets every example of a row see those before it"
        remedy = "set packing: auto or false, and group_by_length: true to save padding"
        raise ConfigError([Problem("training.packing", f"is true, but {reason}; {remedy}")])
    packing = wanted is True or apart is True
    return config.model_copy(update={"training": config.training.model_copy(update={"packing": packing})})


@functools.lru_cache(maxsize=8)
def _keeps_apart(base: str) -> tuple[bool | None, str]:
    """Whether a base (as JSON) keeps packed examples apart, and its type."""
    model = _on_meta(BaseModelConfig.model_validate_json(base))
    return separates_documents(model), model.config.model_type


def _check_deepspeed(config: PipelineConfig) -> None:
    stage = stage_of(deepspeed_settings(config.deepspeed))
    check_quantisation(config, stage)
    if stage == 3 and config.training.validate_every and config.resources.workers > 1:
        # seen on two ranks after an interruption: part of the best state was not put back
        message = "does not work under ZeRO-3 with several workers; use deepspeed: zero2, or remove it"
        raise ConfigError([Problem("training.validate_every", message)])


def _check_strategy(config: PipelineConfig) -> None:
    try:
        strategy = make_strategy(config.strategy.name, **config.strategy.options)
    except ValueError as error:
        raise ConfigError([Problem("strategy", str(error))]) from error
    problems = list(_unmet(config, strategy))
    if problems:
        raise ConfigError(problems)


def _unmet(config: PipelineConfig, strategy) -> Iterator[Problem]:
    """Requirements of the strategy that the configuration or the adapted model does not meet."""
    name = config.strategy.name
    for field, (values, reason) in strategy.requirements.items():
        found = functools.reduce(getattr, field.split("."), config)
        if found not in values:
            yield Problem(field, f"is {found}, but strategy '{name}' needs {' or '.join(values)}: {reason}")
    if strategy.needs_heads and all(kind_of(task).scorer != "head" for task in config.tasks):
        message = f"'{name}' preserves the outputs of classifier heads, but no task has one; use e.g. rehearsal"
        yield Problem("strategy.name", message)
    if type(strategy).check is Strategy.check:
        return  # works with any model
    try:
        strategy.check(attach_adapter(base_on_meta(config), config.adapter, config.training.seed))
    except ConfigError:
        return  # reported by `model_facts`
    except ValueError as error:
        yield Problem("strategy", f"'{name}' does not work with adapter '{config.adapter.type}': {error}")


def model_facts(config: PipelineConfig, depth: int | None = None) -> ModelFacts:
    """Count parameters and adapter bytes; of the last step, if the adapter grows with every task (see `check_model`).

    Raises:
        ConfigError: the base cannot be described, or the adapter does not fit it.
    """
    base = base_on_meta(config)
    base_parameters, linear_parameters = sum(p.numel() for p in base.parameters()), quantised_numbers(base)
    text, fused = base.config.get_text_config(), fused_experts(base)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        model = attach_adapter(base, config.adapter, config.training.seed)
    steps = depth or (1 if config.is_joint else len(config.tasks))
    with warnings.catch_warnings(action="ignore"):  # the same again
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
        unadapted_experts=unadapted(fused, model) if adapted else {},
        said=tuple(dict.fromkeys(str(entry.message) for entry in said if entry.category is UserWarning)),
    )


def adapter_buffer_bytes(model, adapter: str) -> int:
    """Bytes of an adapter's buffers (CURLoRA: C, whitening, indices)."""
    buffers = model.named_buffers(remove_duplicate=False)
    return sum(buffer.numel() * buffer.element_size() for name, buffer in buffers if f"{adapter}_" in name)
