"""The Transformers `TrainingArguments` of a step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import transformers
from torch import nn

from pipelines.config.sections import TrainingConfig, micro_batch


def training_arguments(
    training: TrainingConfig,
    steps: int,
    deepspeed: dict,
    output_dir: str,
    cpu: bool,
    bf16: bool,
    world_size: int,
    done: int = 0,
) -> transformers.TrainingArguments:
    """Arguments for Trainer, which neither saves, logs nor evaluates; `done` of the `steps` precede a resume."""
    return transformers.TrainingArguments(
        output_dir=output_dir,
        deepspeed=deepspeed,
        max_steps=steps - done,
        per_device_train_batch_size=micro_batch(training, world_size),
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.scheduler,
        warmup_steps=math.ceil(training.warmup_ratio * steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        gradient_checkpointing=training.gradient_checkpointing,
        bf16=bf16,
        use_cpu=cpu,
        ddp_backend="gloo" if cpu else None,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        average_tokens_across_devices=False,  # one message per step, for a count that `compute_loss` ignores
    )


@contextlib.contextmanager
def taken_for_adapted(model: nn.Module) -> Iterator[None]:
    """Lets a quantised base of which only the heads train pass Transformers' check for an adapter."""
    if not getattr(model, "is_quantized", False) or hasattr(model, "peft_config"):
        yield
        return
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        del model._hf_peft_config_loaded  # the class attribute is False


def optimizer_steps(training: TrainingConfig, examples: int, tasks: int = 1) -> int:
    """Optimizer steps per step of the chain: `max_steps` per task, or `epochs` over that many examples."""
    if training.max_steps:
        return training.max_steps * tasks
    micro_batches = math.ceil(examples / (training.batch_size // training.gradient_accumulation))
    return max(1, math.ceil(training.epochs * micro_batches / training.gradient_accumulation))
