"""What the cost model predicts for the passes that part `model7b` has measured."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType

from measure import DTYPE, Plan
from models import CURLORA, FROZEN, LINEAR, MISTRAL_7B, QKV, SMALL, R
from results import Result, SkipPart, read

COLUMNS = [
    *("adapted", "variant", "TFLOP a pass", "TFLOP/s reached", "/ frozen base, predicted", "measured"),
    *("memory, GiB, predicted", "measured peak"),
]


def cost_model() -> ModuleType:
    """The module with `shape_of` and `cost`."""
    from pipelines.preflight import cost  # needs pydantic, which the other parts do without

    return cost


def run(plan: Plan, result: Result) -> None:
    measured = read(plan.out, "model7b")
    if not measured or not measured["tables"] or not measured["tables"][0]["rows"]:
        raise SkipPart("part model7b has measured nothing in this folder")
    try:
        cost = cost_model()
    except ModuleNotFoundError as error:
        raise SkipPart(f"pipelines cannot be imported: {error}") from error
    note = "FLOP/s: of all predicted FLOPs, the adapter's included. Memory: predicted for training under ZeRO-2."
    table = result.table("Predicted and measured", COLUMNS, note)
    columns, rows = measured["tables"][0]["columns"], measured["tables"][0]["rows"]
    length = 32 if plan.tiny else 2048
    frozen = None
    for row in (dict(zip(columns, cells, strict=True)) for cells in rows):
        config = configuration(plan, row, length)
        if config is None:
            continue
        predicted = predict(cost, config, plan)
        flops = predicted.forward + predicted.backward
        frozen = frozen or flops
        result.row(
            table,
            *(row["adapted"], row["variant"], flops / 1e12, flops / row["ms a pass"] / 1e9),
            *(round(flops / frozen, 4), row["/ frozen base"]),
            *(round(predicted.memory["total"] / 2**30, 2), row["peak GiB"]),
        )


def configuration(plan: Plan, row: dict, length: int) -> dict | None:
    """The measured case as a configuration; None for a LoRA that the pipelines do not make (fp32 factors)."""
    targets = {"q/k/v": QKV, "all linear": LINEAR}.get(row["adapted"])
    if row["variant"] == FROZEN.name:
        adapter = {"type": "none"}
    elif row["variant"] == CURLORA.name:
        adapter = {"type": "curlora", "r": R, "target_modules": targets}
    elif "PEFT default" in row["variant"]:
        return None
    else:
        adapter = {"type": "lora", "r": R, "alpha": R, "target_modules": targets}
    return {
        "name": "cost",
        "base_model": {"path": ".", "dtype": str(DTYPE).removeprefix("torch.")},
        "adapter": adapter,
        "tasks": [{"name": "task", "kind": "language-modeling", "data": "."}],
        "training": {"batch_size": row["batch"], "max_length": length},
        "evaluation": {"batch_tokens": length},
        "resources": {"workers": 1},
        "deepspeed": "zero2",
    }


def predict(cost: ModuleType, raw: dict, plan: Plan):
    """The cost of a configuration whose base has the measured shape: its config.json, no weights."""
    import transformers

    from pipelines.config.pipeline import PipelineConfig

    with tempfile.TemporaryDirectory() as folder:
        transformers.MistralConfig(**SMALL if plan.tiny else MISTRAL_7B).save_pretrained(folder)
        config = PipelineConfig.model_validate(raw | {"base_model": raw["base_model"] | {"path": str(Path(folder))}})
        return cost.cost(config, cost.shape_of(config))
