"""`ContinualTrainer`: a `transformers.Trainer` that trains adapter and heads under a strategy's hooks.

Batches are global: every rank walks the same seeded order and takes its slice, so the same examples meet in the same
optimizer step on any number of workers. The loss is the mean over the global batch of each example's mean token (or
class) loss, whatever the slices are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import transformers
from torch import nn

from curlora.continual import Example, StepOutput, Strategy
from pipelines.config import TrainingConfig
from pipelines.data import IGNORE
from pipelines.evaluation import World, keep_logits, last_token_features, pad, place
from pipelines.heads import trainable_heads

CURVE_EVERY = 10  # optimizer steps between two looks at the loss: each look waits for the device


class DivergedError(RuntimeError):
    """The loss is no longer a number."""


class GlobalBatches:
    """Micro-batches of a task: the same global order on every rank, this rank's part of each.

    Args:
        examples: the training set.
        batch_size: examples a micro-batch over all ranks; the last one of an epoch may be smaller.
        transform: the strategy's `batch` hook, applied to the global micro-batch.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int, world: World, transform: Callable):
        self.dataset = examples  # the name that Trainer.num_examples looks for
        self.batch_size = batch_size
        self.seed = seed
        self.world = world
        self.transform = transform
        self.epoch = 0

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.dataset))
        for start in range(0, len(order), self.batch_size):
            batch = self.transform([self.dataset[i] for i in order[start : start + self.batch_size]])
            yield collate(batch, self.world)


def collate(batch: list[Example], world: World) -> dict:
    """This rank's part of a global micro-batch as tensors.

    A rank without an example (fewer examples than ranks) carries the first one with weight 0: under ZeRO every rank
    takes part in every pass.
    """
    part = batch[world.rank :: world.size]
    weight = 1.0 if part else 0.0
    part = part or batch[:1]
    ids, mask, positions = pad([example.input_ids for example in part], torch.device("cpu"))
    packed = any(example.breaks for example in part)
    for row, example in enumerate(part):
        for position in example.breaks:
            positions[row, position:] = torch.arange(positions.shape[1] - position)
    labels = torch.full_like(ids, IGNORE)
    for row, example in enumerate(part):
        if example.labels is not None:
            labels[row, : len(example.labels)] = torch.tensor(example.labels)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "position_ids": positions if packed else None,
        "examples": part,
        "scale": weight / len(batch),
    }


def example_losses(model: nn.Module, batch: dict) -> tuple[torch.Tensor, StepOutput]:
    """(batch,) loss of each example: mean cross-entropy of its target tokens, or that of its class under its head."""
    labels, mask, examples = batch["labels"], batch["attention_mask"], batch["examples"]
    first = _first_target(labels)
    positions = torch.arange(first - 1, labels.shape[1] - 1, device=labels.device) if first else 1
    keep = keep_logits(model, positions)
    if batch["position_ids"] is None:
        seen = {"attention_mask": mask}
    else:
        # without a mask Transformers takes positions that start anew for documents apart; what pads a row stands
        # behind it, where no real token looks
        seen = place(model, batch["position_ids"])
    output = model(input_ids=batch["input_ids"], output_hidden_states=True, use_cache=False, **seen, **keep)
    hidden = output.hidden_states[-1]
    losses = torch.zeros(len(examples), device=hidden.device)
    if first:
        logits = output.logits if keep else output.logits[:, positions]
        losses = losses + _token_losses(logits, labels[:, first:])
    features = last_token_features(hidden, mask)
    for task, head in trainable_heads(model).items():
        # every trainable head runs on every rank: under ZeRO a parameter without a gradient on one rank is a deadlock
        logits = head(features.to(head.weight.dtype)).float()
        classes = [e.target if e.task == task and e.labels is None else IGNORE for e in examples]
        targets = torch.tensor(classes, device=hidden.device)
        losses = losses + nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    return losses, StepOutput(losses.sum(), hidden, mask)


def _first_target(labels: torch.Tensor) -> int:
    """Smallest position ≥ 1 that any row has a target at; 0 if none has."""
    columns = (labels[:, 1:] != IGNORE).any(0).nonzero()
    return int(columns[0]) + 1 if len(columns) else 0


def _token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(batch,) mean over each row's targets; 0 for a row without any."""
    losses = nn.functional.cross_entropy(
        logits.float().transpose(1, 2), targets, ignore_index=IGNORE, reduction="none"
    )
    return losses.sum(1) / (targets != IGNORE).sum(1).clamp(min=1)


class ContinualTrainer(transformers.Trainer):
    """Trains one step of the chain.

    Args:
        model: PeftModel (or bare model with heads); what requires gradients trains.
        examples: the step's training set.
        strategy: its hooks are called as `Strategy` documents.
        on_points: called on every rank with [(step, loss, learning rate, unix time), …] now and then.

    Raises:
        DivergedError: the loss became NaN or infinite; names the optimizer step.
    """

    def __init__(
        self,
        model: nn.Module,
        arguments: transformers.TrainingArguments,
        examples: Sequence[Example],
        strategy: Strategy,
        training: TrainingConfig,
        world: World,
        on_points: Callable[[list[tuple[int, float, float, float]]], None],
    ):
        super().__init__(model=model, args=arguments, train_dataset=None)
        self.loss_is_scaled_for_ga = True  # `scale` below is over the whole global batch
        self.strategy = strategy
        self.training = training
        self.world = world
        self.examples = examples
        self.on_points = on_points
        self.tokens = 0
        self._losses: list[torch.Tensor] = []  # of this step's micro-batches
        self._step_losses: list[torch.Tensor] = []  # of the steps since the last look
        self._pending: list[tuple[int, float, float]] = []
        self.add_callback(_StrategyCallback(self))

    def get_train_dataloader(self) -> GlobalBatches:
        micro = self.training.batch_size // self.training.gradient_accumulation
        return GlobalBatches(self.examples, micro, self.training.seed, self.world, self.strategy.batch)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with a learning rate of its own for the heads."""
        heads = [p for head in trainable_heads(self.model).values() for p in head.parameters()]
        head_ids = {id(p) for p in heads}
        adapter = [p for p in self.model.parameters() if p.requires_grad and id(p) not in head_ids]
        groups = [
            {"params": adapter, "lr": self.training.learning_rate, "weight_decay": self.training.weight_decay},
            {"params": heads, "lr": self.training.head_learning_rate, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses, output = example_losses(model, inputs)
        share = losses.sum() * inputs["scale"] / self.training.gradient_accumulation
        self._losses.append(share.detach())
        self.tokens += int(inputs["attention_mask"].sum()) if inputs["scale"] else 0
        # DeepSpeed averages gradients over ranks; times the world size, the average is the global batch's mean
        output.loss = share * self.world.size
        loss = self.strategy.loss(model, inputs["examples"], output)
        return (loss, output) if return_outputs else loss

    def floating_point_ops(self, inputs) -> int:
        return 0  # Trainer would count the parameters anew at every step

    def end_step(self) -> None:
        """Book-keeping after an optimizer step; looks at the loss only every `CURVE_EVERY` steps."""
        step = self.state.global_step
        self.strategy.after_step(self.model, step)
        self._pending.append((step, self._learning_rate, time.time()))
        self._step_losses.append(torch.stack(self._losses).sum())
        self._losses.clear()
        if step % CURVE_EVERY == 0 or step == 1 or step == self.state.max_steps:
            self._flush()

    def _flush(self) -> None:
        losses = torch.stack(self._step_losses)
        if self.world.size > 1:
            torch.distributed.all_reduce(losses)
        points = [(s, v, lr, t) for (s, lr, t), v in zip(self._pending, losses.tolist(), strict=True)]
        self._pending, self._step_losses = [], []
        bad = next((step for step, loss, _, _ in points if not math.isfinite(loss)), None)
        if bad is not None:
            raise DivergedError(
                f"the loss is not finite at optimizer step {bad} of {self.state.max_steps}; "
                "lower training.learning_rate or training.max_grad_norm"
            )
        self.on_points(points)

    def begin_step(self) -> None:
        self._learning_rate = float(self.lr_scheduler.get_last_lr()[0])  # Trainer moves it on before the step ends


class _StrategyCallback(transformers.TrainerCallback):
    """Tells the trainer when an optimizer step begins and ends."""

    def __init__(self, trainer: ContinualTrainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.begin_step()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.end_step()


def training_arguments(
    training: TrainingConfig, steps: int, deepspeed: dict, output_dir: str, cpu: bool, bf16: bool, world_size: int
) -> transformers.TrainingArguments:
    """What Trainer needs to know; saving, logging and evaluation are ours."""
    return transformers.TrainingArguments(
        output_dir=output_dir,
        deepspeed=deepspeed,
        max_steps=steps,
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
    )


def micro_batch(training: TrainingConfig, world_size: int) -> int:
    """Examples a rank and pass, rounded up."""
    return math.ceil(training.batch_size / training.gradient_accumulation / world_size)


def optimizer_steps(training: TrainingConfig, examples: int) -> int:
    """Optimizer steps of a task: `max_steps`, or `epochs` over so many examples."""
    if training.max_steps:
        return training.max_steps
    micro_batches = math.ceil(examples / (training.batch_size // training.gradient_accumulation))
    return max(1, math.ceil(training.epochs * math.ceil(micro_batches / training.gradient_accumulation)))
