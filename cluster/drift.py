"""Drift: whether the champion has become worse on recent text, measured by `curlora tick`.

The reference of a champion is its perplexity on the sample as the first tick after its promotion found it. Every later
version of the sample is scored once and compared with that; another champion has a reference of its own. Files, in the
folder of the schedule:

    drift/<time>.<version>.<stamp>.json   one measurement; the first one of a version is its reference
    recent/<domain>/                      with `retrain`: the sample above the limit, split, for the next tick to train
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence

import fsspec

from cluster.inbox import TAGS, TIMES
from pipelines.config.domains import DriftConfig
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.tasks import LanguageModelingTask
from pipelines.errors import ConfigError, DataError, Problem
from pipelines.notify.outbox import post
from pipelines.runs.directory import RunDirectory

RECENT = "recent"  # inbox of the samples that are to be trained
TEST_EVERY = 10  # of the rows that are trained on, every tenth is kept for the test split


def measure(config: PipelineConfig, folder: RunDirectory, champion) -> list[str]:
    """Score the champion on the sample if either is new; what was found, in sentences.

    Above the limit it posts a message and, with `retrain`, leaves the sample for the inbox of `RECENT`.

    Raises:
        ConfigError: the champion's run is gone.
    """
    drift = config.domains.drift
    if champion is None:
        return ["drift: there is no champion yet"]
    try:
        stamp = stamp_of(drift.sample)
        names = [name.split(".") for name in folder.list("drift")]
        mine = [name for name in names if name[1] == str(champion.version)]
        if any(name[2] == stamp for name in mine):
            return []
        texts = _texts(drift)
        if stamp_of(drift.sample) != stamp:
            return ["drift: the sample is still being written"]
    except (DataError, OSError, ValueError) as error:
        return [f"drift: domains.drift.sample '{drift.sample}' cannot be read ({error}); correct it"]
    reference = folder.read_json(f"drift/{'.'.join(mine[0])}")["perplexity"] if mine else None
    nll, tokens = _score(config, champion, texts)
    record = _record(drift, champion.version, nll, tokens, len(texts), reference)
    if record["exceeds"]:
        _act(config, folder, stamp, texts, record)
    folder.write_json(f"drift/{int(time.time() * 1e6):017d}.{champion.version}.{stamp}.json", record)  # last
    return [f"drift: {record['text']}"]


def stamp_of(sample: str) -> str:
    """Version of a file, from its listing alone: changes when the file changes.

    Raises:
        OSError: there is no such file.
    """
    fs, path = fsspec.core.url_to_fs(sample)
    fs.invalidate_cache()
    facts = fs.info(path)
    if facts["type"] != "file":
        raise OSError("is no file")
    version = [str(facts[key]) for key in (*TAGS, *TIMES) if facts.get(key)]
    return hashlib.sha256(json.dumps([sample, facts["size"], version]).encode()).hexdigest()[:16]


def _texts(drift: DriftConfig) -> list[str]:
    """The last `max_rows` texts of the sample: the most recent ones where rows are appended."""
    from pipelines.data.sources import load_split  # slow; a sample that did not change is not read

    source = _task(drift)
    rows = [row for split in ("train", "test") for row in load_split(source, split)]
    if drift.text not in rows[0]:
        raise ValueError(f"it has no field '{drift.text}'; set domains.drift.text to one of: {', '.join(rows[0])}")
    texts = [row[drift.text] for row in rows]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"field '{drift.text}' holds other things than text")
    if not any(text.strip() for text in texts):
        raise ValueError(f"field '{drift.text}' is empty in all rows")
    return [text for text in texts if text.strip()][-drift.max_rows :]


def _task(drift: DriftConfig) -> LanguageModelingTask:
    return LanguageModelingTask(name="drift", kind="language-modeling", data=drift.sample, text=drift.text)


def _score(config: PipelineConfig, champion, texts: Sequence[str]) -> tuple[float, int]:
    """(nats per token, tokens) of texts under the champion, as an evaluation scores documents."""
    from pipelines.inference.predict import nll_of_texts  # imports torch

    run = RunDirectory(champion.run_uri)
    if run.metrics(champion.step_directory) is None:
        message = f"version {champion.version} is the champion, but its run {champion.run_uri} is gone"
        raise ConfigError([Problem("tracking.register_as", f"{message}; promote another version")])
    return nll_of_texts(run, champion.step_directory, _task(config.domains.drift), texts)


def _record(drift: DriftConfig, version: int, nll: float, tokens: int, rows: int, reference: float | None) -> dict:
    from pipelines.metrics.score_matrix import perplexity

    found = perplexity(nll)
    ratio = found / reference if reference else None
    exceeds = ratio is not None and ratio > drift.max_perplexity_ratio
    text = f"version {version} has perplexity {found:.4g} on {rows} recent texts"
    if ratio is None:
        text += ", its reference from now on"
    else:
        relation = "above" if exceeds else "within"
        text += (
            f", {ratio:.3g} times its reference {reference:.4g}, {relation} the limit {drift.max_perplexity_ratio:g}"
        )
    record = {"time": time.time(), "version": version, "nll": nll, "perplexity": found, "tokens": tokens, "rows": rows}
    return record | {"reference": reference, "ratio": ratio, "exceeds": exceeds, "text": text}


def _act(config: PipelineConfig, folder: RunDirectory, stamp: str, texts: Sequence[str], record: dict) -> None:
    """Tell of the drift and, with `retrain`, leave the texts where the tick finds new domains."""
    drift = config.domains.drift
    facts = {name: value for name, value in record.items() if name not in ("time", "text", "exceeds")}
    text = f"{config.name}: {record['text']}"
    post(folder, config.notify, "drift", [record["version"], stamp], text, schedule=config.name, **facts)
    if not drift.retrain:
        return
    if len(texts) < TEST_EVERY:
        record["text"] += f"; not trained, as it takes at least {TEST_EVERY} texts"
        return
    record["text"] += f"; it is trained as domain '{drift.domain}'"
    target = f"{RECENT}/{drift.domain}"
    folder.remove(target)
    held_out = [text for number, text in enumerate(texts) if number % TEST_EVERY == 0]
    kept = [text for number, text in enumerate(texts) if number % TEST_EVERY]
    for split, rows in (("train", kept), ("test", held_out)):
        lines = (json.dumps({drift.text: text}) + "\n" for text in rows)
        folder.write_bytes(f"{target}/{split}.jsonl", "".join(lines).encode())
    folder.write_bytes(f"{target}/{config.domains.marker}", b"")
