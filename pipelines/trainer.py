"""`ContinualTrainer`: a `transformers.Trainer` that trains adapter and heads under a strategy's hooks.

Batches are global: every rank walks the same seeded order and takes its slice, so the same examples meet in the same
optimizer step on any number of workers. The loss is the mean over the global batch of each example's mean token (or
class) loss, whatever the slices are.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import transformers
from torch import nn

from curlora.continual import Example, StepOutput, Strategy, TaskContext
from pipelines import engine
from pipelines.checkpoint import Checkpoint
from pipelines.config import TrainingConfig
from pipelines.data import IGNORE
from pipelines.evaluation import World, last_token_features, pad
from pipelines.heads import heads_of, trainable_heads
from pipelines.likelihood import next_token_losses, place

LOOK_SECONDS = 1.0  # about so long between two looks at the loss: each look waits for the device and for all ranks
MOST_STEPS_BETWEEN_LOOKS = 50


class DivergedError(RuntimeError):
    """The loss or a weight is no longer a number."""


class Stopped(RuntimeError):
    """Training ended early because the driver asked for it; a checkpoint was written."""


@dataclass(frozen=True)
class Wishes:
    """What a rank wants at a look; what one rank wants, all ranks do together."""

    checkpoint: bool = False
    stop: bool = False


class GlobalBatches:
    """An endless stream of a task's micro-batches: the same global order on every rank, this rank's part of each.

    Args:
        examples: the training set.
        batch_size: examples a micro-batch over all ranks; the last one of an epoch may be smaller.
        transform: the strategy's `batch` hook, applied to the global micro-batch.
        position: micro-batches that were seen before (a resumed step goes on with the next one).
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        seed: int,
        world: World,
        transform: Callable,
        position: int = 0,
    ):
        self.dataset = examples
        self.batch_size = batch_size
        self.seed = seed
        self.world = world
        self.transform = transform
        self.position = position

    @property
    def per_epoch(self) -> int:
        return math.ceil(len(self.dataset) / self.batch_size)

    def __iter__(self) -> Iterator[dict]:
        while True:
            epoch, index = divmod(self.position, self.per_epoch)
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
            for start in range(index * self.batch_size, len(order), self.batch_size):
                batch = self.transform([self.dataset[i] for i in order[start : start + self.batch_size]])
                self.position += 1
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
        "replayed": sum(example.replayed for example in batch),
    }


def example_losses(model: nn.Module, batch: dict, held: Iterable[str] = ()) -> tuple[torch.Tensor, StepOutput]:
    """(batch,) loss of each example: mean cross-entropy of its target tokens, or that of its class under its head.

    Args:
        held: tasks whose heads do not train and whose examples may come nevertheless, the same on every rank.
    """
    labels, mask, examples = batch["labels"], batch["attention_mask"], batch["examples"]
    if batch["position_ids"] is None:
        seen = {"attention_mask": mask}
    else:
        # without a mask Transformers takes positions that start anew for documents apart; what pads a row stands
        # behind it, where no real token looks
        seen = place(model, batch["position_ids"])
    found = next_token_losses(model, labels, input_ids=batch["input_ids"], **seen)
    hidden = found.hidden
    losses = found.losses.sum(1) / (labels[:, 1:] != IGNORE).sum(1).clamp(min=1)
    features = last_token_features(hidden, mask)
    used = heads_of(model, held) | trainable_heads(model)
    headless = {e.task for e in examples if e.labels is None} - used.keys()
    if headless:
        raise ValueError(f"examples of {', '.join(sorted(headless))} have neither labels nor a head that is used")
    for task, head in used.items():
        # they all run on every rank: under ZeRO a parameter that one rank lacks, or its gradient, is a deadlock
        scores = head(features.to(head.weight.dtype)).float()
        classes = [e.target if e.task == task and e.labels is None else IGNORE for e in examples]
        targets = torch.tensor(classes, device=hidden.device)
        losses = losses + nn.functional.cross_entropy(scores, targets, ignore_index=IGNORE, reduction="none")

    def held_scores(hidden: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        features = last_token_features(hidden, mask)
        return {task: head(features.to(head.weight.dtype)).float() for task, head in heads_of(model, held).items()}

    return losses, StepOutput(losses.sum(), hidden, mask, logits=found.logits, held_scores=held_scores)


def losses_alone(model: nn.Module, examples: Sequence[Example], device: torch.device) -> torch.Tensor:
    """(batch,) differentiable losses of examples that this process alone has drawn: what a strategy may ask for."""
    batch = collate(list(examples), World(0, 1, device))
    return example_losses(model, {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()})[0]


class ContinualTrainer(transformers.Trainer):
    """Trains one step of the chain, from its beginning or from a checkpoint.

    Args:
        model: PeftModel (or bare model with heads); what requires gradients trains. When resuming it must hold the
            checkpoint's weights.
        examples: the step's training set.
        strategy: its hooks are called as `Strategy` documents; when resuming its state must be loaded.
        steps: optimizer steps of the whole step.
        on_points: called on every rank with [(step, loss, learning rate, unix time), …] now and then.
        wishes: asked on every rank at each look.
        on_checkpoint: called on every rank where a checkpoint is to be kept, with the function that takes it.
        rungs: fractions of the step after which `on_rung` is called on every rank, with the fraction and the
            function that takes a checkpoint; it may raise `Stopped`.
        resume: the checkpoint to go on from.

    Raises:
        DivergedError: the loss or a weight became NaN or infinite; names the optimizer step and the batch.
        Stopped: some rank wished to stop; a checkpoint was handed out before.
    """

    def __init__(
        self,
        model: nn.Module,
        arguments: transformers.TrainingArguments,
        examples: Sequence[Example],
        strategy: Strategy,
        training: TrainingConfig,
        world: World,
        steps: int,
        on_points: Callable[[list[tuple[int, float, float, float]]], None],
        wishes: Callable[[], Wishes] = Wishes,
        on_checkpoint: Callable[[Callable[[], Checkpoint]], None] = lambda take: None,
        rungs: Sequence[float] = (),
        on_rung: Callable[[float, Callable[[], Checkpoint]], None] = lambda rung, take: None,
        resume: Checkpoint | None = None,
    ):
        with _taken_for_adapted(model):
            super().__init__(model=model, args=arguments, train_dataset=None)
        self.loss_is_scaled_for_ga = True  # `scale` below is over the whole global batch
        self.strategy = strategy
        self.training = training
        self.world = world
        self.examples = examples
        self.total_steps = steps
        self.on_points, self.wishes, self.on_checkpoint = on_points, wishes, on_checkpoint
        self.rungs = {math.ceil(rung * steps): rung for rung in rungs}
        self.on_rung = on_rung
        self.resume = resume
        self.first_step = resume.step if resume else 0
        self.tokens = 0  # of this rank, since this process began
        self._losses: list[torch.Tensor] = []  # of this step's micro-batches
        self._step_losses: list[torch.Tensor] = []  # of the steps since the last look
        self._pending: list[tuple[int, float, float]] = []
        self._next_look = self.first_step + 1
        self._last_look = time.monotonic()
        self.add_callback(_StrategyCallback(self))

    @property
    def step(self) -> int:
        """Optimizer steps done, those before an interruption included."""
        return self.first_step + self.state.global_step

    def get_train_dataloader(self) -> GlobalBatches:
        micro = self.training.batch_size // self.training.gradient_accumulation
        self.batches = GlobalBatches(
            self.examples,
            micro,
            self.training.seed,
            self.world,
            self.strategy.batch,
            self.resume.values["micro_batches"] if self.resume else 0,
        )
        return self.batches

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

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """The schedule of the whole step, moved on to where a checkpoint was made."""
        if self.lr_scheduler is None:
            scheduler = super().create_scheduler(self.total_steps, optimizer)
            if self.resume:
                scheduler.last_epoch = self.resume.values["scheduler_step"]
                for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_lr(), strict=True):
                    group["lr"] = rate
                scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses, output = example_losses(model, inputs, self.strategy.held_heads())
        share = losses.sum() * inputs["scale"] / self.training.gradient_accumulation
        self._losses.append(share.detach())
        self.tokens += int(inputs["attention_mask"].sum()) if inputs["scale"] else 0
        # DeepSpeed averages gradients over ranks; times the world size, the average is the global batch's mean
        output.loss = share * self.world.size
        output.weight = 1 / self.training.gradient_accumulation
        output.replayed, output.present = inputs["replayed"], inputs["scale"] > 0
        output.ranks = self.world.size
        loss = self.strategy.loss(self.model, inputs["examples"], output)
        return (loss, output) if return_outputs else loss

    def end_task(self, task: TaskContext) -> None:
        """The strategy's `after_task`, while the model can still run under the engine that trained it."""
        self.strategy.after_task(self.model, replace(task, losses=self._losses_alone))
        self._release_leftovers()

    def _losses_alone(self, model: nn.Module, examples: Sequence[Example]) -> torch.Tensor:
        self._release_leftovers()
        return losses_alone(model, examples, self.world.device)

    def _release_leftovers(self) -> None:
        """Under ZeRO-3: shard again what a backward pass outside the engine has left whole."""
        if self.world.lockstep:
            self.model_wrapped.optimizer.empty_partition_cache()

    def floating_point_ops(self, inputs) -> int:
        return 0  # Trainer would count the parameters anew at every step

    # -- around an optimizer step

    def begin_training(self) -> None:
        """The engine stands: give it what the checkpoint holds."""
        if self.resume is None:
            return
        state = self.resume.tensors
        engine.restore_training_state(self.model_wrapped, self._trainables(), state, self.resume.values["adam_step"])
        engine.restore_loss_scale(self.model_wrapped, self.resume.values["loss_scale"])
        if self.resume.values["world_size"] == self.world.size:
            _set_rng(self.resume.part("rng")[str(self.world.rank)])

    def begin_step(self) -> None:
        self._learning_rate = float(self.lr_scheduler.get_last_lr()[0])  # Trainer moves it on before the step ends

    def end_step(self) -> None:
        """Book-keeping after an optimizer step; looks at the loss only about once a second."""
        self.strategy.after_step(self.model, self.step)
        self._pending.append((self.step, self._learning_rate, time.time()))
        self._step_losses.append(torch.stack(self._losses).sum())
        self._losses.clear()
        rung = self.rungs.get(self.step)
        if self.step >= self._next_look or self.step == self.total_steps or rung:
            self._look()
        if rung:
            self.on_rung(rung, self.checkpoint)
            self._last_look = time.monotonic()

    def _look(self) -> None:
        """All ranks together: the losses so far, and whether to keep a checkpoint or to stop."""
        wishes = self.wishes()
        # rank 0 chooses the distance to the next look, by its own clock
        seconds = max(time.monotonic() - self._last_look, 1e-6) / len(self._step_losses)
        distance = min(max(round(LOOK_SECONDS / seconds), 1), MOST_STEPS_BETWEEN_LOOKS) if self.world.rank == 0 else 0
        losses = torch.stack(self._step_losses)
        told = torch.cat([losses, losses.new_tensor([wishes.checkpoint, wishes.stop, distance])])
        if self.world.size > 1:
            torch.distributed.all_reduce(told)
        *values, checkpoint, stop, distance = told.tolist()
        points = [(s, v, lr, t) for (s, lr, t), v in zip(self._pending, values, strict=True)]
        self._pending, self._step_losses = [], []
        self._next_look, self._last_look = self.step + int(distance), time.monotonic()
        bad = next((step for step, loss, _, _ in points if not math.isfinite(loss)), None)
        if bad is not None:
            raise DivergedError(f"the loss is not finite at {self._where(bad)}; {_REMEDY}")
        self.on_points(points)
        if self.step == self.total_steps:
            return  # the adapter is about to be saved
        if checkpoint or stop:
            self.on_checkpoint(self.checkpoint)
        if stop:
            raise Stopped(f"stopped after optimizer step {self.step} of {self.total_steps}")

    def _where(self, step: int) -> str:
        """An optimizer step in the words of a user who looks for its rows."""
        first = (step - 1) * self.training.gradient_accumulation
        epoch, batch = divmod(first, self.batches.per_epoch)
        return f"optimizer step {step} of {self.total_steps} (epoch {epoch + 1}, batch {batch + 1})"

    # -- checkpoints

    def checkpoint(self) -> Checkpoint:
        """The state after the current optimizer step. Every rank must call it; all get the same."""
        state = engine.training_state(self.model_wrapped, self._trainables())
        broken = next((name for name, tensor in state.items() if not torch.isfinite(tensor).all()), None)
        if broken:
            raise DivergedError(f"{broken} is not finite after {self._where(self.step)}; {_REMEDY}")
        strategy_tensors, strategy_values = self.strategy.state()
        state |= {f"strategy/{name}": tensor for name, tensor in strategy_tensors.items()}
        state |= {f"rng/{rank}": rng for rank, rng in enumerate(self._gather(_rng()))}
        values = {
            "micro_batches": self.step * self.training.gradient_accumulation,
            "adam_step": engine.adam_step(self.model_wrapped),
            "scheduler_step": self.lr_scheduler.last_epoch,
            "loss_scale": engine.loss_scale(self.model_wrapped),
            "world_size": self.world.size,
            "tokens": sum(self._gather(self.tokens)) + (self.resume.values["tokens"] if self.resume else 0),
            "strategy": strategy_values,
        }
        return Checkpoint(self.step, state, values)

    def _trainables(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _gather(self, value) -> list:
        if self.world.size == 1:
            return [value]
        values: list = [None] * self.world.size
        torch.distributed.all_gather_object(values, value, group=self.world.group)
        return values


_REMEDY = "lower training.learning_rate or training.max_grad_norm"


def _rng() -> torch.Tensor:
    """Bytes: this process's torch generators, the CPU's and then its GPU's."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])
    return torch.cat(states)


def _set_rng(state: torch.Tensor) -> None:
    here = torch.get_rng_state().numel()
    torch.set_rng_state(state[:here])
    if torch.cuda.is_available() and state.numel() > here:
        torch.cuda.set_rng_state(state[here:])


class _StrategyCallback(transformers.TrainerCallback):
    """Tells the trainer when training and each optimizer step begin and end."""

    def __init__(self, trainer: ContinualTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin_training()

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.begin_step()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.end_step()


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
    """What Trainer needs to know; saving, logging and evaluation are ours. `done` steps of `steps` lie behind."""
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
        average_tokens_across_devices=False,  # a message a step, for a number that `compute_loss` has no use for
    )


def micro_batch(training: TrainingConfig, world_size: int) -> int:
    """Examples a rank and pass, rounded up."""
    return math.ceil(training.batch_size / training.gradient_accumulation / world_size)


@contextlib.contextmanager
def _taken_for_adapted(model: nn.Module) -> Iterator[None]:
    """Inside, a quantised base whose heads are all that trains passes Transformers' check for an adapter."""
    if not getattr(model, "is_quantized", False) or hasattr(model, "peft_config"):
        yield
        return
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        del model._hf_peft_config_loaded  # the class says False


def optimizer_steps(training: TrainingConfig, examples: int, tasks: int = 1) -> int:
    """Optimizer steps of a step of the chain: `max_steps` a task, or `epochs` over so many examples."""
    if training.max_steps:
        return training.max_steps * tasks
    micro_batches = math.ceil(examples / (training.batch_size // training.gradient_accumulation))
    return max(1, math.ceil(training.epochs * micro_batches / training.gradient_accumulation))
