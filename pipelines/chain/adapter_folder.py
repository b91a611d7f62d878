"""A plain PEFT adapter as the start of a chain: found, checked against base and `adapter:`, and imported.

`start_from` may name a folder, a URI or a hub id with `adapter_config.json` and `adapter_model.safetensors`, such as
`save_pretrained` of PEFT or of `curlora` writes. Importing copies it into the run as the only step of a run of its
own, `origins/<name>/`; whatever follows a lineage (workers, ancestry, MLflow, a resume after the folder is gone) finds
a step like any other.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.config.paths import is_hub_adapter
from pipelines.config.pipeline import PipelineConfig
from pipelines.errors import ConfigError, Problem
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import base_fingerprint, fingerprint
from pipelines.runs.results import Results, StepSummary
from pipelines.runs.start import Start
from pipelines.runs.step_record import PublishedFile, Seconds, Setting, StepRecord

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
COMPARED = ("r", "alpha", "selection", "whiten", "scale")  # fields of `adapter:` that a PEFT config states
NEUTRAL = {  # fields of a PEFT config that say nothing about what its weights mean
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
    ),
    *(
        "corda_config",
        "eva_config",
        "init_lora_weights",
        "init_weights",
        "loftq_config",
        "lora_dropout",
        "runtime_config",
    ),
    *("blocks", "carry", "load_only", "megatron_config", "megatron_core", "seed", "target_modules", "track_u_svd"),
    *("r", "lora_alpha", "alpha", "selection", "whiten", "scale"),  # compared by themselves
}


# -- found
def find_folder(named: str) -> RunDirectory | None:
    """The folder of a plain adapter; None if `named` is none.

    Raises:
        ConfigError: a hub id that cannot be read, or a folder with weights that are not safetensors.
    """
    if named.startswith("models:/"):
        return None
    folder = RunDirectory(_downloaded(named) if is_hub_adapter(named) else named)
    if not folder.exists(CONFIG):
        return None
    if not folder.exists(WEIGHTS):
        what = f"has {PICKLE}, a pickle, which is never loaded" if folder.exists(PICKLE) else f"has no {WEIGHTS}"
        raise _fault(f"'{named}' {what}; save the adapter again with save_pretrained of a current PEFT")
    return folder


def _downloaded(named: str) -> str:
    """Folder of a hub id in the local cache."""
    from huggingface_hub import snapshot_download  # slow

    name, _, revision = named.partition("@")
    try:
        return snapshot_download(name, revision=revision or None, allow_patterns=[CONFIG, WEIGHTS])
    except (OSError, ValueError) as error:  # of the hub's client: no such repository, no network
        reason = str(error).strip().splitlines()[0]
        raise _fault(
            f"'{named}' is no path, and cannot be read from the hub ({reason}); write <run>/<step>, a folder, or a "
            "hub id"
        ) from error


def _fault(message: str) -> ConfigError:
    return ConfigError([Problem("start_from", message)])


def start_of_folder(config: PipelineConfig, folder: RunDirectory) -> Start:
    """The start that a plain adapter becomes once it is imported."""
    stated, base = _stated(config.start_from, folder), config.base_model
    kind = str(stated["peft_type"]).lower()
    adapter = {"type": kind, **{field: stated[field] for field in COMPARED if stated.get(field) is not None}}
    if "lora_alpha" in stated:
        adapter["alpha"] = stated["lora_alpha"]
    meaning = {key: value for key, value in stated.items() if key not in NEUTRAL}
    bottom = base_fingerprint(base)
    digest = hashlib.sha256(folder.read_bytes(WEIGHTS)).hexdigest()
    own = fingerprint({"base": bottom, "weights": digest, "adapter": adapter, "config": meaning})
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", config.start_from.partition("@")[0].rstrip("/").rpartition("/")[2])
    name = name.strip("-_")[:40] or "adapter"
    return Start(
        named=config.start_from,
        run_uri=f"{config.run_uri}/origins/{name}",
        directory=f"steps/1-{name}-{own[:8]}",
        fingerprint=own,
        base_fingerprint=bottom,
        depth=1,
        digests={},
        base={"path": str(stated.get("base_model_name_or_path") or base.path), "dtype": base.dtype}
        | {"quantization": base.quantization},
        adapter=adapter,
        strategy=None,
        source=folder.uri,
    )


def _stated(named: str, folder: RunDirectory) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    try:
        stated = folder.read_json(CONFIG)
    except ValueError as error:
        raise _fault(f"'{named}': {CONFIG} is not valid JSON ({error})") from error
    if not isinstance(stated, dict) or not stated.get("peft_type"):
        raise _fault(f"'{named}': {CONFIG} names no peft_type; it is no adapter of PEFT")
    return stated


# -- checked
def doubt(config: PipelineConfig, start: Start | None) -> str | None:
    """A warning if the adapter says that it was trained on a base of another name."""
    if start is None or start.source is None:
        return None
    theirs, ours = (path.rstrip("/").rpartition("/")[2] for path in (start.base["path"], config.base_model.path))
    if theirs.lower() == ours.lower():
        return None
    return f"start_from: {start.named} says that its base is '{start.base['path']}', this one is '{ours}'"


def misfits(config: PipelineConfig, start: Start) -> Iterator[Problem]:
    """What of the adapter does not fit the base or `adapter:`, by its tensors and its own configuration."""
    import peft  # slow

    from pipelines.models.adapters import attach_adapter
    from pipelines.preflight.model import base_on_meta

    folder = _present(start)
    stated, named = _stated(start.named, folder), start.named
    section = config.adapter.model_copy(update={"carry": "continue"})
    try:
        model = attach_adapter(base_on_meta(config), section, config.training.seed)
    except ConfigError:
        return  # reported by the checks of the model
    if not hasattr(model, "peft_config"):
        return  # adapter.type none, which `start.adapter` contradicts
    ours = json.loads(json.dumps(model.peft_config["default"].to_dict(), default=_listed))
    for key in sorted(stated.keys() & ours.keys() - NEUTRAL):
        if stated[key] != ours[key]:
            message = f"is {ours[key]}, but the adapter of {named} has {stated[key]}; set it to that"
            yield Problem(f"adapter.options.{key}", message)
    known = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    yield from _tensor_problems(config, start, {**dict(model.state_dict()), **known}, set(known), stated, folder)


def _listed(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _tensor_problems(
    config: PipelineConfig,
    start: Start,
    places: Mapping[str, Any],
    needed: set[str],
    stated: Mapping[str, Any],
    folder: RunDirectory,
) -> Iterator[Problem]:
    saved = _shapes(folder)
    surplus, missing = sorted(saved.keys() - places.keys()), sorted(needed - saved.keys())
    if surplus or missing:
        first = f"has {surplus[0]}" if surplus else f"lacks {missing[0]}"
        modules = stated.get("target_modules")  # PEFT keeps a set
        wanted = json.dumps(sorted(modules) if isinstance(modules, list) else modules)
        message = f"adapts other modules than {start.named}, which {first}; set adapter.target_modules: {wanted}"
        yield Problem("adapter.target_modules", message)
        return
    for name, shape in saved.items():
        if tuple(places[name].shape) != shape:
            found = f"{name} of {start.named} is {shape}, on '{config.base_model.path}' it is"
            remedy = f"name the base that it was trained on ({start.base['path']})"
            yield Problem("base_model.path", f"{found} {tuple(places[name].shape)}; {remedy}")
            return


def _shapes(folder: RunDirectory) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor, from the header of the safetensors file alone."""
    path = folder.path(WEIGHTS)
    size = int.from_bytes(folder.fs.cat_file(path, start=0, end=8), "little")
    header = json.loads(folder.fs.cat_file(path, start=8, end=8 + size))
    return {name: tuple(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"}


def _present(start: Start) -> RunDirectory:
    """Where the adapter's files are now: imported, or still in the folder that they come from."""
    imported = RunDirectory(f"{start.run_uri}/{start.directory}/adapter")
    return imported if imported.exists(WEIGHTS) else RunDirectory(start.source)


# -- imported
def import_folder(config: PipelineConfig, start: Start | None) -> None:
    """Copy a plain adapter into the run, unless it is there already; any other start is left as it is."""
    if start is None or start.source is None or start.run.metrics(start.directory) is not None:
        return
    folder, origin, moment = RunDirectory(start.source), start.run, time.time()
    parent, _, name = start.run_uri.rpartition("/")
    tracking = config.tracking and config.tracking.model_copy(update={"register_as": None})
    plain = {"start_from": None, "search": None, "gate": None, "domains": None, "tracking": tracking}
    origin.open_for_writing(config.model_copy(update={"name": name, "storage": parent, **plain}))
    files = {}
    for file in (CONFIG, WEIGHTS):
        content = folder.read_bytes(file)
        origin.write_bytes(f"{start.directory}/adapter/{file}", content)
        files[f"adapter/{file}"] = PublishedFile(len(content), hashlib.sha256(content).hexdigest())
    record = StepRecord(
        fingerprint=start.fingerprint,
        position=1,
        tasks=(name,),
        parent=start.base_fingerprint,
        depth=1,
        setting=Setting(adapter=start.adapter, strategy={}, training={}),
        data={},
        classes={},
        finished=moment,
        adapter_bytes=files[f"adapter/{WEIGHTS}"].bytes,
        files=files,
        started=moment,
        cells=(),
        seconds=Seconds(train=0.0, evaluate=0.0, overhead=0.0, total=0.0),
        environment={},
        origin=start.named,
    )
    step = StepSummary(name, start.fingerprint, start.directory)
    base = {"base_model": config.base_model.path, "base_fingerprint": start.base_fingerprint}
    origin.write_json("results.json", Results(name, "finished", **base, adapter=start.adapter, steps=(step,)))
    origin.write_json(f"{start.directory}/metrics.json", record)
