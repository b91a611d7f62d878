"""The curves of a step in TensorBoard and W&B, through the callbacks that Transformers' Trainer has for them.

Rank 0 reports whenever the loss is read. A tool that fails is left out for the rest of the step: it must not end a
training.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import transformers
from torch import nn


class Reports:
    """Reports one step to some tools.

    Args:
        tools: names in `tracking.report_to`.
        arguments: of the trainer.
        folder: where TensorBoard's files are written.
        wandb: WANDB_* variables of this step; those of the environment come first.
        warn: called with a sentence if a tool fails.
    """

    def __init__(
        self,
        tools: Sequence[str],
        arguments: transformers.TrainingArguments,
        model: nn.Module,
        folder: str,
        wandb: Mapping[str, str],
        warn: Callable[[str], None],
    ):
        self.arguments, self.model, self.folder, self.wandb, self.warn = arguments, model, folder, wandb, warn
        self.state = transformers.TrainerState(is_world_process_zero=True, is_local_process_zero=True)
        self.control = transformers.TrainerControl()
        self._callbacks: dict[str, transformers.TrainerCallback] = {}
        for tool in tools:
            with self._guarded(tool):
                callback = OPEN[tool](self)
                callback.on_train_begin(arguments, self.state, self.control, model=model)
                self._callbacks[tool] = callback

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Report values after an optimizer step, named as by the Trainer: `loss`, `learning_rate`, `eval_loss`, …"""
        self.state.global_step = step
        for tool, callback in list(self._callbacks.items()):
            with self._guarded(tool):
                callback.on_log(self.arguments, self.state, self.control, model=self.model, logs=dict(values))

    def close(self) -> None:
        for tool, callback in list(self._callbacks.items()):
            with self._guarded(tool):
                callback.on_train_end(self.arguments, self.state, self.control, model=self.model)
                if tool == "wandb":
                    import wandb  # optional, and slow

                    wandb.finish()
        self._callbacks.clear()

    @contextlib.contextmanager
    def _guarded(self, tool: str) -> Iterator[None]:
        """Warn of any error inside and leave the tool out."""
        try:
            yield
        except Exception as error:
            self._callbacks.pop(tool, None)
            reason = str(error).strip().splitlines() or [type(error).__name__]
            self.warn(f"tracking.report_to: {tool} failed ({reason[0]}); this step is not reported to it any more")


def _tensorboard(reports: Reports) -> transformers.TrainerCallback:
    from transformers.integrations import TensorBoardCallback  # slow

    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        from tensorboardX import SummaryWriter
    return TensorBoardCallback(SummaryWriter(log_dir=reports.folder))


def _wandb(reports: Reports) -> transformers.TrainerCallback:
    from transformers.integrations import WandbCallback  # slow

    for name, value in reports.wandb.items():
        if name in PER_STEP:
            os.environ[name] = value
        else:
            os.environ.setdefault(name, value)
    return WandbCallback()


PER_STEP = ("WANDB_RUN_ID", "WANDB_RUN_GROUP", "WANDB_RESUME")
OPEN: dict[str, Callable[[Reports], transformers.TrainerCallback]] = {"tensorboard": _tensorboard, "wandb": _wandb}
