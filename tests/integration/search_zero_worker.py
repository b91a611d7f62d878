"""One rank of test_search_zero.py: the same step with and without being scored at rungs, under a ZeRO stage.

Run by torchrun as ``search_zero_worker.py STAGES BASE OUT``.
"""

import sys
import tempfile
from pathlib import Path

import torch
from strategies_zero_worker import TRAINING, adapt, examples, report_of, total

from curlora.continual import TaskContext, make_strategy
from curlora.continual.parameters import adapter_parameters, read, swapped
from pipelines.distributed import engine
from pipelines.training.arguments import training_arguments
from pipelines.training.example_losses import losses_alone
from pipelines.training.trainer import ContinualTrainer

RUNGS = (0.25, 0.75)


def train(model, config: dict, world, rungs: tuple[float, ...]) -> tuple[dict, list[float]]:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    strategy = make_strategy("ilora", share=0.4, consistency=50.0, decay=0.8)  # it is judged by other weights
    task = TaskContext("t", 1, 0, examples("t", 1), rank=world.rank, size=world.size, total=total)
    scores: list[float] = []

    def score(rung: float, take) -> None:
        take()
        parameters = adapter_parameters(model)
        model.eval()
        with torch.no_grad(), swapped(parameters, strategy.evaluation_weights(model)):
            scores.append(float(losses_alone(model, task.examples[:5], world.device).sum()))

    strategy.before_task(model, task)
    with tempfile.TemporaryDirectory() as scratch, engine.hooks_restored(model):
        arguments = training_arguments(TRAINING, 4, config, scratch, cpu=True, bf16=False, world_size=world.size)
        options = {"rungs": rungs, "on_rung": score}
        trainer = ContinualTrainer(model, arguments, task.examples, strategy, TRAINING, world, 4, print, **options)
        trainer.train()
        trainer.end_task(task)
        trained = read(adapter_parameters(model))
        trainer.model_wrapped.destroy()
        trainer.accelerator.free_memory()
    return {name: tensor.flatten().tolist() for name, tensor in trained.items()}, scores


def with_and_without_rungs(base, config: dict, world) -> dict:
    report = {}
    for name, rungs in (("plain", ()), ("scored", RUNGS)):
        model = adapt(base, "curlora")
        report[name] = train(model, config, world, rungs)
        model.zero_grad(set_to_none=True)
        base = model.unload()
    return report


if __name__ == "__main__":
    report_of(sys.argv[1], sys.argv[2], Path(sys.argv[3]), with_and_without_rungs)
