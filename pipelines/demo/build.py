"""Everything `curlora demo` needs, made from the Python environment itself: no network, no data files.

The installed packages carry megabytes of English documentation in several domains. Their docstrings are read with
`ast` (no package is imported); one part pretrains a small Llama-shaped language model, four libraries that the model
never saw become tasks, and passages held out of the pretraining become the retention text. The result is cached under
a fingerprint, and `demo.json`, written last, marks a folder as complete. This module prepares; it runs no chain.

One record of a classification task (`<task>/train.jsonl`, the label is an index into `labels.json`):

    {"text": "Minimize a scalar function of one or more variables ...\nModule:", "label": 1}

The base model is pretrained on passages that end with the module they come from ("...\nModule: numpy.linalg"), so its
state at `Module:` sums a passage up, and a classifier that reads the last token of a task's text has a fair start.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.demo.corpus import installed_version, read_corpus
from pipelines.demo.presets import PRESETS, Preset, Progress, no_progress
from pipelines.demo.pretraining import pretrain
from pipelines.demo.tasks import by_hash, take_characters, with_origin, write_jsonl, write_tasks

MANIFEST = "demo.json"


@dataclass(frozen=True)
class DemoAssets:
    """What a prepared demo consists of; every path exists."""

    root: Path
    base_model: Path
    tasks: dict[str, Path]
    """Task name to its folder of `{train,validation,test}.jsonl`; classification has `labels.json` as well."""
    retention: Path
    manifest: dict[str, Any]


def prepare_demo(
    cache_dir: Path | None = None, *, preset: str = "full", progress: Progress | None = None
) -> DemoAssets:
    """Return the demo's model, tasks and retention text, building them on first use.

    `cache_dir` defaults to `$CURLORA_CACHE`, then `~/.cache/curlora/demo`. Raises `DemoError` when a task's library
    is missing, has too little text, or the pretrained model is not good enough.
    """
    settings = PRESETS[preset]
    cache = cache_dir or Path(os.environ.get("CURLORA_CACHE") or Path.home() / ".cache" / "curlora" / "demo")
    root = Path(cache).expanduser().resolve() / f"{preset}-{fingerprint(settings)[:12]}"
    if not (root / MANIFEST).is_file():
        _build_and_publish(root, settings, progress or no_progress)
    return _assets(root)


def fingerprint(preset: Preset) -> str:
    """Identity of the demo: this code, the preset, and the versions of what is read or makes the model.

    Versions stand for the corpus, so that a warm start parses nothing.
    """
    libraries = [*preset.pretraining, *preset.classification, preset.language_modeling]
    names = sorted({library.distribution for library in libraries} | {"torch", "transformers", "tokenizers"})
    parts = {
        "code": _digest(file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parent.glob("*.py"))),
        "preset": asdict(preset),
        "versions": {name: installed_version(name) for name in names},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _assets(root: Path) -> DemoAssets:
    manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    tasks = {name: root / "tasks" / name for name in manifest["tasks"]}
    return DemoAssets(root, root / "model", tasks, root / "retention", manifest)


def _build_and_publish(root: Path, preset: Preset, progress: Progress) -> None:
    """Build in a private folder and rename it into place, so that two processes at once cannot mix their files."""
    root.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        build_demo(building, preset, progress)
        if root.exists() and not (root / MANIFEST).is_file():
            shutil.rmtree(root)
        try:
            building.rename(root)
        except OSError:
            # Another process was first: its folder has the same fingerprint, so either will do.
            if not (root / MANIFEST).is_file():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def build_demo(folder: Path, preset: Preset, progress: Progress) -> None:
    """Write model, tasks, retention text and, last, the manifest into the empty `folder`."""
    corpus = read_corpus(preset, progress)
    # Tasks first: where two libraries share a text, the task keeps it and the pretraining never sees it.
    tasks = write_tasks(folder / "tasks", corpus, preset)
    pretraining = [passage for library in preset.pretraining for passage in corpus.get(library.package, [])]
    held_out, train = take_characters(by_hash(pretraining), preset.retention_characters)
    write_jsonl(folder / "retention" / "test.jsonl", [{"text": with_origin(passage)} for passage in held_out])
    texts = [with_origin(passage) for passage in train], [with_origin(passage) for passage in held_out]
    model = pretrain(folder / "model", *texts, preset, progress)
    manifest = {
        "preset": preset.name,
        "fingerprint": fingerprint(preset),
        "corpus_digest": _digest(passage.text for passages in corpus.values() for passage in passages),
        "libraries": {name: len(passages) for name, passages in corpus.items()},
        "model": model,
        "tasks": tasks,
        "retention": {"examples": len(held_out), "characters": sum(len(text) for text in texts[1])},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()
