"""`ContinualTrainer`: a `transformers.Trainer` that trains adapter and heads under a strategy's hooks.

Batches are global: every rank follows the same seeded order and takes its slice, so an optimizer step sees the same
examples on any number of workers. The loss is the mean over the global batch of each example's mean token (or class)
loss, however the batch is sliced.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import transformers
from torch import nn

from curlora.continual import Example, Strategy, TaskContext
from pipelines.config.sections import TrainingConfig
from pipelines.distributed import optimizer_state, sparse
from pipelines.distributed.world import World
from pipelines.errors import DivergedError, Stopped
from pipelines.models.base import context_length
from pipelines.models.heads import causal_lm, trainable_heads
from pipelines.training.arguments import taken_for_adapted
from pipelines.training.batches import GlobalBatches, MicroBatch
from pipelines.training.checkpoint import Checkpoint
from pipelines.training.example_losses import drawn_targets, example_losses, losses_alone
from pipelines.training.validation import Validation

SYNCHRONISE_SECONDS = 1.0  # about the time between synchronisation points: each waits for the device and all ranks
EXAMPLES_PER_ROW = 4  # of full length, at most: room to fill rows whatever the lengths are
MOST_STEPS_BETWEEN = 50  # at most so many optimizer steps between two synchronisation points


@dataclass(frozen=True)
class ControlRequests:
    """Requests of one rank at a synchronisation point; all ranks act on their union."""

    checkpoint: bool = False
    stop: bool = False


class ContinualTrainer(transformers.Trainer):
    """Trains one step of the chain, from the beginning or from a checkpoint.

    Args:
        model: PeftModel (or bare model with heads); parameters that require gradients are trained. When resuming, it
            must hold the checkpoint's weights.
        examples: the step's training set.
        strategy: its hooks are called as documented in `Strategy`; when resuming, its state must be loaded.
        steps: optimizer steps of the whole step.
        on_points: called on every rank at each synchronisation point with [(step, loss, learning rate, Unix time), …].
        requests: called on every rank at each synchronisation point.
        on_checkpoint: called on every rank when a checkpoint is due, with the function that takes it.
        validation: measures the state after some optimizer steps, and may end the training before the last one.
        on_validation: called on every rank to measure the state after an optimizer step.
        rungs: fractions of the step after which `on_rung` is called on every rank, with the fraction and the
            function that takes a checkpoint; it may raise `Stopped`.
        resume: the checkpoint to resume from.

    Raises:
        DivergedError: the loss or a weight became NaN or infinite; names the optimizer step and the batch.
        Stopped: some rank asked to stop; `on_checkpoint` was called before.
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
        requests: Callable[[], ControlRequests] = ControlRequests,
        on_checkpoint: Callable[[Callable[[], Checkpoint]], None] = lambda take: None,
        validation: Validation | None = None,
        on_validation: Callable[[int], None] = lambda step: None,
        rungs: Sequence[float] = (),
        on_rung: Callable[[float, Callable[[], Checkpoint]], None] = lambda rung, take: None,
        resume: Checkpoint | None = None,
    ):
        with taken_for_adapted(model):
            super().__init__(model=model, args=arguments, train_dataset=None)
        self.loss_is_scaled_for_ga = True  # `compute_loss` scales by the whole global batch
        self.strategy = strategy
        self.training = training
        self.world = world
        self.examples = examples
        self.total_steps = steps
        self.on_points, self.requests, self.on_checkpoint = on_points, requests, on_checkpoint
        self.validation, self.on_validation = validation, on_validation
        self.rungs = {math.ceil(rung * steps): rung for rung in rungs}
        self.on_rung = on_rung
        self.resume = resume
        self.first_step = resume.step if resume else 0
        self.tokens = 0  # of this rank, since this process started
        self._losses: list[torch.Tensor] = []  # one per micro-batch of this optimizer step
        self._step_losses: list[torch.Tensor] = []  # one per optimizer step since the last synchronisation
        self._pending: list[tuple[int, float, float]] = []
        self._next_synchronisation = self.first_step + 1
        self._last_synchronisation = time.monotonic()
        self.add_callback(_StrategyCallback(self))

    def train(self, *args, **kwargs):
        # ZeRO-3 sees to it by itself
        together = contextlib.nullcontext() if self.world.lockstep else sparse.experts_ready_together(self.model)
        with together:
            return super().train(*args, **kwargs)

    @property
    def step(self) -> int:
        """Optimizer steps done, including those before an interruption."""
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
            packing=self._packed_length(),
            grouped=self.training.group_by_length,
        )
        return self.batches

    def _packed_length(self) -> int:
        """Tokens per row of packed examples; 0: no packing. What auto means is decided before workers start."""
        if self.training.packing is not True:
            return 0
        context = context_length(causal_lm(self.model).config.get_text_config())
        return min(context, EXAMPLES_PER_ROW * self.training.max_length)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with a separate learning rate for the heads."""
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
        """The schedule of the whole step, advanced to the checkpoint when resuming."""
        if self.lr_scheduler is None:
            scheduler = super().create_scheduler(self.total_steps, optimizer)
            if self.resume:
                scheduler.last_epoch = self.resume.values["scheduler_step"]
                for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_lr(), strict=True):
                    group["lr"] = rate
                scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
        return self.lr_scheduler

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The next micro-batches. Trainer would also count their tokens, which `compute_loss` does not need."""
        return list(itertools.islice(epoch_iterator, num_batches)), None

    def _prepare_inputs(self, inputs: MicroBatch) -> MicroBatch:
        return inputs.to(self.args.device)

    def compute_loss(self, model, inputs: MicroBatch, return_outputs=False, num_items_in_batch=None):
        losses, output = example_losses(model, inputs, self.strategy.held_heads())
        share = losses.sum() * inputs.scale / self.training.gradient_accumulation
        self._losses.append(share.detach())
        self.tokens += sum(len(example.input_ids) for example in inputs.examples) if inputs.scale else 0
        # DeepSpeed averages gradients over ranks: multiplied by the world size, that is the mean over the global batch
        output.loss = share * self.world.size
        output.weight = 1 / self.training.gradient_accumulation
        output.replayed, output.present = inputs.replayed, inputs.scale > 0
        output.ranks = self.world.size
        loss = self.strategy.loss(self.model, inputs.examples, output)
        return (loss, output) if return_outputs else loss

    def end_task(self, task: TaskContext) -> None:
        """The strategy's `after_task`, while the model can still run under the engine that trained it."""
        self.strategy.after_task(self.model, replace(task, losses=self._losses_alone, draw=self._drawn_targets))
        self._release_leftovers()

    def _losses_alone(self, model: nn.Module, examples: Sequence[Example]) -> torch.Tensor:
        self._release_leftovers()
        return losses_alone(model, examples, self.world.device)

    def _drawn_targets(self, model: nn.Module, examples: Sequence[Example], seed: Sequence[int]) -> list[Example]:
        self._release_leftovers()
        return drawn_targets(model, examples, self.world.device, seed)

    def _release_leftovers(self) -> None:
        """Under ZeRO-3: re-partition parameters that a backward pass outside the engine has left gathered."""
        if self.world.lockstep:
            self.model_wrapped.optimizer.empty_partition_cache()

    def floating_point_ops(self, inputs) -> int:
        return 0  # Trainer would count the parameters again at every step

    # -- around an optimizer step

    def begin_training(self) -> None:
        """Load the checkpoint's optimizer state into the engine."""
        if self.resume is None:
            return
        state = self.resume.tensors
        optimizer_state.restore_training_state(
            self.model_wrapped, self._trainables(), state, self.resume.values["adam_step"]
        )
        optimizer_state.restore_loss_scale(self.model_wrapped, self.resume.values["loss_scale"])
        if self.resume.values["world_size"] == self.world.size:
            _set_rng(self.resume.part("rng")[str(self.world.rank)])

    def begin_step(self) -> None:
        self._learning_rate = float(self.lr_scheduler.get_last_lr()[0])  # Trainer advances it before the step ends

    def end_step(self) -> None:
        """Book-keeping after an optimizer step; reads the loss only about once per second."""
        self.strategy.after_step(self.model, self.step)
        self._pending.append((self.step, self._learning_rate, time.time()))
        self._step_losses.append(torch.stack(self._losses).sum())
        self._losses.clear()
        rung, validated = self.rungs.get(self.step), self._is_validated()
        if self.step >= self._next_synchronisation or self.step == self.total_steps or rung or validated:
            self._synchronise()
        if rung and (not self.is_over or self.step == self.total_steps):
            self.on_rung(rung, self.checkpoint)
            self._last_synchronisation = time.monotonic()

    def _synchronise(self) -> None:
        """Share the losses so far, and decide on all ranks alike whether to write a checkpoint or to stop."""
        requests = self.requests()
        # rank 0 decides by its own clock how many steps to go to the next one
        seconds = max(time.monotonic() - self._last_synchronisation, 1e-6) / len(self._step_losses)
        distance = min(max(round(SYNCHRONISE_SECONDS / seconds), 1), MOST_STEPS_BETWEEN) if self.world.rank == 0 else 0
        losses = torch.stack(self._step_losses)
        shared = torch.cat([losses, losses.new_tensor([requests.checkpoint, requests.stop, distance])])
        if self.world.size > 1:
            torch.distributed.all_reduce(shared)
        *values, checkpoint, stop, distance = shared.tolist()
        points = [(s, v, lr, t) for (s, lr, t), v in zip(self._pending, values, strict=True)]
        self._pending, self._step_losses = [], []
        self._next_synchronisation, self._last_synchronisation = self.step + int(distance), time.monotonic()
        bad = next((step for step, loss, _, _ in points if not math.isfinite(loss)), None)
        if bad is not None:
            raise DivergedError(f"the loss is not finite at {self._where(bad)}; {_REMEDY}")
        self.on_points(points)
        if self._is_validated():
            self.on_validation(self.step)
            self._last_synchronisation = time.monotonic()
        if self.is_over:
            return  # the adapter is about to be saved
        if checkpoint or stop:
            self.on_checkpoint(self.checkpoint)
        if stop:
            raise Stopped(f"stopped after optimizer step {self.step} of {self.total_steps}")

    @property
    def is_over(self) -> bool:
        """Whether this was the last optimizer step."""
        return self.step == self.total_steps or (self.validation is not None and self.validation.is_over)

    def _is_validated(self) -> bool:
        return self.validation is not None and self.validation.is_due(self.step, self.total_steps)

    def _where(self, step: int) -> str:
        """Describes an optimizer step so that a user can find its rows."""
        first = (step - 1) * self.training.gradient_accumulation
        epoch, batch = divmod(first, self.batches.per_epoch)
        return f"optimizer step {step} of {self.total_steps} (epoch {epoch + 1}, batch {batch + 1})"

    # -- checkpoints

    def checkpoint(self) -> Checkpoint:
        """The state after the current optimizer step. Every rank must call it; all get the same result."""
        state = optimizer_state.training_state(self.model_wrapped, self._trainables())
        broken = next((name for name, tensor in state.items() if not torch.isfinite(tensor).all()), None)
        if broken:
            raise DivergedError(f"{broken} is not finite after {self._where(self.step)}; {_REMEDY}")
        strategy_tensors, strategy_values = self.strategy.state()
        state |= {f"strategy/{name}": tensor for name, tensor in strategy_tensors.items()}
        state |= {f"rng/{rank}": rng for rank, rng in enumerate(self._gather(_rng()))}
        values = {
            "micro_batches": self.step * self.training.gradient_accumulation,
            "adam_step": optimizer_state.adam_step(self.model_wrapped),
            "scheduler_step": self.lr_scheduler.last_epoch,
            "loss_scale": optimizer_state.loss_scale(self.model_wrapped),
            "world_size": self.world.size,
            "tokens": sum(self._gather(self.tokens)) + (self.resume.values["tokens"] if self.resume else 0),
            "strategy": strategy_values,
        }
        if self.validation:
            tensors, values["validation"] = self.validation.state()
            state |= tensors
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
    """States of this process's torch generators as bytes: the CPU's, then the GPU's."""
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
        control.should_training_stop |= self.trainer.is_over
