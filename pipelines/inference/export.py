"""Exports a finished step as it was trained, as a standard PEFT LoRA adapter, or merged into a full model, with
tokenizer and card."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from pipelines.config.paths import public_name
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.sections import BaseModelConfig
from pipelines.errors import ConfigError, Problem
from pipelines.lineage.model_card import CARD, ancestry_of, model_card
from pipelines.runs.directory import RunDirectory
from pipelines.runs.records import choose_step


def export_step(
    run: RunDirectory,
    step: str | None,
    form: str,
    target: Path,
    name: str | None = None,
    max_rank: int | None = None,
) -> Path:
    """Write a step's adapter to `target` and return `target`; classifier heads are written as `heads.safetensors`.

    Tokenizer, chat template and a model card go with it, and nothing names a path of this machine.

    Args:
        form: `adapter` (as it was trained), `lora` (a PEFT LoRA directory, exact) or `merged` (the full model).
        name: hub id by which the card loads it; None: the folder.
        max_rank: highest rank that the server takes; None: any.

    Raises:
        ConfigError: no such step, nothing to export, several adapters without a step, a rank above `max_rank`, or
            `target` is not empty.
    """
    directory = choose_step(run, step)
    config = run.config()
    _check_exportable(config, step, target)
    from pipelines.models.base import load_tokenizer  # slow

    with tempfile.TemporaryDirectory() as scratch:
        local = run.download(directory, Path(scratch) / "step")
        adapter = Path(shutil.copytree(local / "adapter", Path(scratch) / "adapter"))
        if form != "merged" and max_rank is not None:
            _check_rank(adapter, max_rank)
        if form == "adapter":
            shutil.copytree(adapter, target, dirs_exist_ok=True)
        else:
            _name_base(adapter, config.base_model.path)  # where PEFT finds the vocabulary without asking the hub
            _write(config.adapter.type, form, _base(config.base_model, form), adapter, target)
        if (local / "heads.safetensors").exists():
            (target / "heads.safetensors").write_bytes((local / "heads.safetensors").read_bytes())
    if not (target / "tokenizer_config.json").exists():  # runs of earlier versions have none beside the adapter
        load_tokenizer(config.base_model).save_pretrained(target)
    _name_base(target, public_name(config.base_model.path)[0])
    card = model_card(form, run.name, config, ancestry_of(run, directory), name)
    (target / CARD).write_text(card, encoding="utf-8")
    return target


def _check_exportable(config: PipelineConfig, step: str | None, target: Path) -> None:
    """Raises ConfigError if a run has no one adapter to export, or `target` is not empty."""
    if config.adapter.type == "none":
        raise ConfigError(
            [Problem("adapter.type", "is none: this run trained heads only, there is no adapter to export")]
        )
    if config.adapter.carry == "bank" and step is None:
        tasks = ", ".join(task.name for task in config.tasks)
        remedy = f"name the task whose adapter leaves, --step with one of: {tasks}"
        raise ConfigError([Problem("adapter.carry", f"is bank: every task has an adapter of its own; {remedy}")])
    if target.exists() and any(target.iterdir()):
        raise ConfigError([Problem("--to", f"{target} is not empty; name a new folder")])


def _check_rank(adapter: Path, limit: int) -> None:
    """Raises ConfigError for an adapter of a higher rank; a stack has that of all its tasks together."""
    raw = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    blocks = raw.get("blocks") or 1
    rank = max([raw.get("r") or 0, *(raw.get("rank_pattern") or {}).values()]) * blocks
    if rank > limit:
        found = f"{rank} ({blocks} stacked blocks of {rank // blocks})" if blocks > 1 else str(rank)
        remedy = "raise the server's limit (vLLM: --max-lora-rank), export it merged (--as merged), or train with " + (
            "carry: continue" if blocks > 1 else "a smaller adapter.r"
        )
        raise ConfigError([Problem("--max-rank", f"the adapter's rank is {found}, above {limit}; {remedy}")])


def _base(model: BaseModelConfig, form: str):
    import transformers  # slow

    from pipelines.models.base import load_base

    transformers.utils.logging.disable_progress_bar()
    base = load_base(model)
    # in full precision, the weights that the adapter was trained on
    return base.dequantize() if form == "merged" and model.quantization else base


def _name_base(folder: Path, name: str) -> None:
    """Name the base in `adapter_config.json`, if there is one."""
    file = folder / "adapter_config.json"
    if file.exists():
        raw = json.loads(file.read_text(encoding="utf-8")) | {"base_model_name_or_path": name}
        file.write_text(json.dumps(raw, indent=2, sort_keys=True), encoding="utf-8")


def _write(adapter_type: str, form: str, base, adapter: Path, target: Path) -> None:
    import peft  # slow

    from curlora.conversion import to_lora, to_merged

    if adapter_type == "curlora":
        (to_lora if form == "lora" else to_merged)(adapter, target, base_model=base)
    elif form == "merged":
        model = peft.PeftModel.from_pretrained(base, str(adapter))
        model.merge_and_unload(safe_merge=True).save_pretrained(target)
    elif adapter_type == "lora":
        target.mkdir(parents=True, exist_ok=True)
        for file in adapter.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
    else:
        message = f"'{adapter_type}' has no exact LoRA form; use --as merged"
        raise ConfigError([Problem("adapter.type", message)])
