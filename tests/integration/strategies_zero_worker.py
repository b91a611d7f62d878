"""One rank of the ZeRO test of the strategies: a few tasks by ContinualTrainer; see test_strategies_zero.py.

Run by torchrun as ``strategies_zero_worker.py STAGES BASE OUT``; stages such as 2,3 run one after another in the same
processes. One process is the reference. Parameters are never persistent, so that nothing of the adapter is whole by
luck.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers

from curlora import CurloraConfig
from curlora.continual import Example, TaskContext, make_strategy
from curlora.continual.parameters import adapter_parameters, read, write
from pipelines.config.sections import TrainingConfig
from pipelines.distributed import engine
from pipelines.distributed.world import World
from pipelines.evaluation.sampling import sample_text
from pipelines.models import heads
from pipelines.training.arguments import training_arguments
from pipelines.training.example_losses import losses_alone
from pipelines.training.trainer import ContinualTrainer

CASES = {
    "ilora": ("curlora", {"share": 0.4, "consistency": 50.0, "decay": 0.8}),
    "coma": ("curlora", {"weight": 0.3, "share": 0.25}),
    "ewc": ("curlora", {"strength": 1e6, "examples": 5}),
    "clora": ("lora", {"k": 6, "strength": 0.3}),
    "olora": ("lora", {"strength": 0.05}),
    "curvature": ("curlora", {"base_rows": 20, "base_length": 6, "examples": 20, "strength": 1e5}),
    "curvature of classes": ("curlora", {"base_rows": 20, "base_length": 6, "strength": 1e5, "share": 0.2}),
    "replay": ("curlora", {"size": 3}),
    "replay of classes": ("curlora", {"size": 3}),  # through the first task's head, which does not train
    "sequential of classes": ("curlora", {}),
    "lwf of classes": ("curlora", {"weight": 20.0}),
    "rehearsal of classes": ("curlora", {"share": 0.2, "base_share": 0.3, "base_length": 6, "lwf": 20.0}),
    "rehearsal": ("curlora", {"share": 0.2, "base_share": 0.3, "base_rows": 70, "base_length": 6, "distill": 1.0}),
}
# packed into other rows on every number of ranks
TRAINING = TrainingConfig(
    max_steps=4, batch_size=8, gradient_accumulation=2, learning_rate=1e-2, max_grad_norm=1.0, packing=True
)


HEADS = {"first": 3, "second": 2}  # classes of each task's head


def examples(task: str, seed: int, classes: bool = False) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in (6, 9, 7, 5, 8, 4, 9, 7) * 3]
    if classes:
        return [Example(task, tuple(row), target=row[0] % HEADS[task]) for row in rows]
    return [Example(task, tuple(row), tuple(row)) for row in rows]


def start() -> World:
    engine.prepare_environment()
    import deepspeed

    deepspeed.init_distributed("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return World(rank, size, torch.device("cpu"), group=torch.distributed.group.WORLD)


def report_of(stages: str, base_directory: str, out: Path, measure: Callable) -> None:
    """Write `measure(base, DeepSpeed settings, world)` of each stage, with the base as that stage loads it."""
    world, report = start(), {}
    for stage in map(int, stages.split(",")):
        config, placed = settings(stage, world), dataclasses.replace(world, lockstep=stage == 3)
        keep = transformers.integrations.HfDeepSpeedConfig(config) if stage == 3 else None
        base = transformers.AutoModelForCausalLM.from_pretrained(base_directory)
        base.requires_grad_(False)
        report[f"zero{stage}"] = measure(base, config, placed)
        del keep
    (out / f"rank{world.rank}.json").write_text(json.dumps(report))
    torch.distributed.barrier()


def settings(stage: int, world: World) -> dict:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "overlap_comm": False}
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": 4 // world.size,
        "gradient_accumulation_steps": 2,
        "train_batch_size": 8,
        "gradient_clipping": 1.0,
        "steps_per_print": 2**31,
    }


def adapt(base, kind: str):
    torch.manual_seed(0)
    if kind == "curlora":
        return peft.get_peft_model(base, CurloraConfig(r=4, task_type="CAUSAL_LM"))
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    model.add_adapter("frozen", config)
    model.base_model.set_adapter(["default", "frozen"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".default." in name)
    return model


def total(tensor: torch.Tensor) -> torch.Tensor:
    torch.distributed.all_reduce(tensor)
    return tensor


def train(model, strategy, task: TaskContext, config: dict, world: World) -> dict[str, torch.Tensor]:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    strategy.before_task(model, task)
    with tempfile.TemporaryDirectory() as scratch, engine.hooks_restored(model):
        arguments = training_arguments(TRAINING, 4, config, scratch, cpu=True, bf16=False, world_size=world.size)
        trainer = ContinualTrainer(model, arguments, task.examples, strategy, TRAINING, world, 4, lambda points: None)
        trainer.train()
        parameters = adapter_parameters(model)
        if config["zero_optimization"]["stage"] == 3:
            assert any(p.numel() == 0 for p in parameters.values()), "the adapter is partitioned"
        trainer.end_task(task)
        trained = read(parameters | dict(head_parameters(model)))
        trainer.model_wrapped.destroy()
        trainer.accelerator.free_memory()
    model.zero_grad(set_to_none=True)
    return trained


def head_parameters(model):
    return [(name, p) for name, p in model.named_parameters() if ".task_heads." in name]


def strategies(base, config: dict, world: World) -> dict:
    """Case → what two tasks under it have trained, and the strategy's state."""
    report = {}
    for name, (kind, options) in CASES.items():
        classes = name.endswith("of classes")
        strategy, published = make_strategy(name.partition(" ")[0], **options), {}
        first_head: dict[str, torch.Tensor] = {}
        for position, task in enumerate(("first", "second"), 1):
            model = adapt(base, kind)
            if classes:
                heads.attach_heads(model, HEADS, seed=0)
            if published:
                write(adapter_parameters(model) | dict(head_parameters(model)), published)
            heads.train_heads(model, (task,))

            def write_rows(model, rows, length):
                with engine.ready_for_inference(model, config, world):
                    return sample_text(model, rows, length, 1, 0, world)

            def ready(model):
                return engine.ready_for_inference(model, config, world)

            def losses(model, rows):
                return losses_alone(model, rows, world.device)

            places = {"rank": world.rank, "size": world.size, "total": total, "write": write_rows}
            places |= {"ready": ready, "losses": losses}
            context = TaskContext(task, position, 0, examples(task, position, classes), **places)
            trained = train(model, strategy, context, config, world)
            published = trained | (strategy.evaluation_weights(model) or {})
            first_head = first_head or {key: tensor for key, tensor in trained.items() if "task_first" in key}
            assert all(torch.equal(tensor, trained[key]) for key, tensor in first_head.items()), "it has its own task"
            heads.detach_heads(model)
            base = model.unload()
        tensors, _ = strategy.state()
        state = {key: tensor.double().flatten().tolist() for key, tensor in tensors.items()}
        report[name] = {"trained": {k: t.flatten().tolist() for k, t in trained.items()}, "state": state}
    return report


if __name__ == "__main__":
    report_of(sys.argv[1], sys.argv[2], Path(sys.argv[3]), strategies)
