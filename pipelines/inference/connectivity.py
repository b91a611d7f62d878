"""Loss along the straight line from one step's weights to the next one's (mode connectivity).

I-LoRA (arXiv 2402.18865) is motivated by such lines: if the loss of earlier tasks stays low between θ_t and θ_{t+1},
then a point in between, such as a moving average, retains earlier tasks and learns the new one. One process, no Ray.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from pipelines.config.pipeline import PipelineConfig
from pipelines.data.sets import evaluation_set
from pipelines.distributed.world import World
from pipelines.errors import ConfigError, Problem
from pipelines.evaluation.evaluate import evaluate
from pipelines.inference.predict import load_trained
from pipelines.models.adapters import adapter_prefix
from pipelines.reporting.drawing import new_figure, render, series_style
from pipelines.runs.directory import RunDirectory
from pipelines.runs.results import StepSummary


def lines(run: RunDirectory, points: int = 5, max_examples: int | None = None) -> list[dict]:
    """For each pair of consecutive steps `{"from", "to", "at": [0 … 1], "loss": {name: [one per point]}}`.

    The loss is the NLL in nats per token for text and 1 − score otherwise, for the tasks trained up to `to` and
    for retained text.

    Args:
        points: number of points per line, including both ends.
        max_examples: test rows per task; None: as many as the run scored.

    Raises:
        ConfigError: fewer than two finished steps, or steps with different parameters (`carry: stack`, no adapter).
    """
    config = run.config()
    if max_examples:
        evaluation = config.evaluation.model_copy(update={"max_examples": max_examples})
        config = config.model_copy(update={"evaluation": evaluation})
    results = run.results()
    steps = [step for step in (results.steps if results else ()) if run.metrics(step.directory)]
    if len(steps) < 2:
        raise ConfigError([Problem(run.name, "has fewer than two finished steps; a line needs two")])
    if config.adapter.carry == "stack" or config.adapter.type == "none":
        reason = f"type {config.adapter.type} with carry: {config.adapter.carry} has no parameters common to all steps"
        raise ConfigError([Problem("adapter", f"{reason}; use an adapter with carry: continue or fresh")])
    at = [i / (points - 1) for i in range(points)]
    return [_line(run, config, first, second, at) for first, second in itertools.pairwise(steps)]


def _line(
    run: RunDirectory, config: PipelineConfig, first: StepSummary, second: StepSummary, at: Sequence[float]
) -> dict:
    begin = _weights(load_trained(run, first.fingerprint).model)
    trained = load_trained(run, second.fingerprint)
    end = _weights(trained.model)
    sources = [task for task in config.tasks if task.name in trained.tasks] + config.corpora
    sets = [evaluation_set(s, trained.tokenizer, config, trained.context) for s in sources]
    world = World(0, 1, next(trained.model.parameters()).device)
    parameters = dict(trained.model.named_parameters())
    loss: dict[str, list[float]] = {source.name: [] for source in sources}
    for share in at:
        for name in end:
            parameters[name].data.copy_(torch.lerp(begin[name], end[name], share))
        for encoded in sets:
            cell, _ = evaluate(trained.model, encoded, world, config.evaluation.batch_tokens, role="line", key="")
            loss[encoded.name].append(cell.value if cell.metric == "nll" else 1 - cell.value)
    return {"from": first.task, "to": second.task, "at": list(at), "loss": loss}


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the adapter's parameters in fp32; heads are not interpolated but kept from the line's end."""
    prefix = adapter_prefix(model)
    return {name: p.detach().float().clone() for name, p in model.named_parameters() if prefix in name}


def figure(found: Sequence[dict]) -> bytes:
    """PNG: one panel per line with the loss of every task relative to the start of the line."""
    drawing, axes = new_figure(4.5 * len(found), 4, columns=len(found), share_y=True)
    for axis, line in zip(axes, found, strict=True):
        for index, (name, values) in enumerate(line["loss"].items()):
            change = [value - values[0] for value in values]
            axis.plot(line["at"], change, markersize=4, label=name, **series_style(index))
        axis.set_xlabel(f"{line['from']} → {line['to']}")
        axis.legend(fontsize=8, frameon=False)
    axes[0].set_ylabel("change in loss (nats per token; error rate)")
    return render(drawing)


def write(run: RunDirectory, points: int = 5, max_examples: int | None = None) -> list[dict]:
    """Compute `lines` and save them as `connectivity.json` and `figures/connectivity.png` of the run."""
    found = lines(run, points, max_examples)
    run.write_json("connectivity.json", found)
    run.write_bytes("figures/connectivity.png", figure(found))
    return found
