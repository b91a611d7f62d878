"""A Trainer callback that keeps U within ``max_update_norm``; the only file that imports the Trainer."""

from __future__ import annotations

from transformers import TrainerCallback


class ProjectUpdates(TrainerCallback):
    """Project every U after each optimizer step: ``Trainer(..., callbacks=[ProjectUpdates()])``.

    Without it the forward pass still keeps the bound, but U and Adam's moments may drift beyond it.
    """

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.base_model.project()
