"""A finished step leaves this system: as a PEFT LoRA adapter that any server loads, or merged into a full model."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pipelines.config import ConfigError, Problem
from pipelines.runs import RunDirectory


def choose_step(run: RunDirectory, step: str | None) -> str:
    """Directory of a finished step by task name, position or fingerprint prefix; None: the last one.

    Raises:
        ConfigError: no such step, or it is not finished.
    """
    steps = (run.results() or {"steps": []})["steps"]
    finished = [entry for entry in steps if run.metrics(entry["directory"]) is not None]
    if step is None and finished:
        return finished[-1]["directory"]
    for entry in finished:
        position = entry["directory"].split("/")[-1].split("-")[0]
        if step in (entry["task"], position) or (len(step or "") >= 6 and entry["fingerprint"].startswith(step)):
            return entry["directory"]
    known = ", ".join(entry["task"] for entry in finished) or "none"
    raise ConfigError([Problem(run.name, f"has no finished step '{step or 'at all'}'; finished: {known}")])


def export_step(run: RunDirectory, step: str | None, form: str, target: Path) -> Path:
    """Write a step's adapter to `target` and return it. Classifier heads go along as `heads.safetensors`.

    Args:
        form: `lora` (a PEFT LoRA directory, exact) or `merged` (the full model with its tokenizer).

    Raises:
        ConfigError: no such step, nothing to export, or `target` holds files already.
    """
    directory = choose_step(run, step)
    config = run.config()
    if config.adapter.type == "none":
        raise ConfigError(
            [Problem("adapter.type", "is none: this run trained heads only, there is no adapter to export")]
        )
    if target.exists() and any(target.iterdir()):
        raise ConfigError([Problem("--to", f"{target} is not empty; name a new folder")])
    import transformers

    from pipelines.base import load_base, load_tokenizer

    transformers.utils.logging.disable_progress_bar()
    base = load_base(config.base_model)
    if form == "merged" and config.base_model.quantization:
        base = base.dequantize()  # the weights that the adapter was trained on, in full precision
    with tempfile.TemporaryDirectory() as scratch:
        local = run.download(directory, Path(scratch))
        _write(config.adapter.type, form, base, local / "adapter", target)
        if (local / "heads.safetensors").exists():
            (target / "heads.safetensors").write_bytes((local / "heads.safetensors").read_bytes())
    if form == "merged":
        load_tokenizer(config.base_model).save_pretrained(target)
    return target


def _write(adapter_type: str, form: str, base, adapter: Path, target: Path) -> None:
    import peft

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
