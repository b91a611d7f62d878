"""From a finished chain to a champion: the gate's verdict, the registered version, promotion and rollback.

A verdict is applied once: sending a run again does not change a version that was judged before, even if it was rolled
back by hand. While MLflow cannot be reached the verdict is "undecided"; `curlora sync` decides later.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.config.pipeline import PipelineConfig
from pipelines.errors import ConfigError, LineageError, NotRegistered, Problem, RunDirectoryError
from pipelines.lineage import registry
from pipelines.lineage.ancestry import from_run
from pipelines.lineage.mlflow_records import identity
from pipelines.lineage.registry import Version
from pipelines.lineage.store import connect, errors, quiet
from pipelines.notify.outbox import post
from pipelines.promotion.gate import Side, judge, judge_against
from pipelines.runs.directory import RunDirectory
from pipelines.runs.records import newest_cells
from pipelines.runs.results import Results
from pipelines.runs.step_record import StepRecord
from pipelines.runs.verdict import Verdict


class Refused(RuntimeError):
    """The gate refuses the promotion."""


@dataclass(frozen=True)
class Promotion:
    """A promotion: the new champion, the previous one, and why the hook failed (None: no hook, or it succeeded)."""

    version: Version
    before: Version | None
    why: str
    hook_failure: str | None

    def to_json(self) -> dict:
        before = self.before.version if self.before else None
        return {
            "name": self.version.name,
            "version": self.version.version,
            "uri": self.version.uri,
            "before": before,
            "why": self.why,
            "hook_failure": self.hook_failure,
        }


# -- the verdict
def decide(run: RunDirectory, config: PipelineConfig, results: Results) -> dict | None:
    """The gate's verdict on a finished run, `{"passed", "reasons", "against", …}`; None without a gate.

    `against` is the champion that the run was compared with; None: there is no champion, absolute limits apply.
    """
    if config.gate is None:
        return None
    tracking = config.tracking
    try:
        champion = registry.champion(tracking.uri, tracking.register_as) if tracking and tracking.register_as else None
        if champion is None:
            return judge(results, config.gate) | {"against": None}
        if _is(champion, run, results):
            return {"passed": True, "reasons": [], "notes": ["this adapter is the champion already"], "against": None}
        sides = champion_side(tracking.uri, champion), run_side(run, results.steps[-1].directory)
        verdict = judge_against(*sides, results, config.gate)
    except LineageError as error:
        return {"passed": None, "reasons": [f"the champion cannot be read: {error}"], "against": None}
    return verdict | {"against": {"name": champion.name, "version": champion.version, "run_uri": champion.run_uri}}


def _is(version: Version, run: RunDirectory, results: Results) -> bool:
    return (version.run_uri, version.step_fingerprint) == (identity(run), results.steps[-1].fingerprint)


def run_side(run: RunDirectory, directory: str, tasks: Sequence[str] = ()) -> Side:
    """A step as a side of the gate's comparison, from its run directory."""
    cells = {cell.name: cell for cell in newest_cells(run.metrics(directory))}
    return Side(cells, lambda name: run.read_jsonl(f"{directory}/predictions/{name}.jsonl"), tasks)


def champion_side(uri: str, version: Version) -> Side:
    """The champion as a side of the gate's comparison: from its run directory, or MLflow's copy if that is gone.

    Raises:
        LineageError: neither can be read.
    """
    with contextlib.suppress(OSError, ImportError):  # ImportError: the driver of its storage is not installed here
        run = RunDirectory(version.run_uri)
        if run.metrics(version.step_directory):
            return run_side(run, version.step_directory, version.tasks)

    def artifact(path: str) -> str:
        remedy = f"the champion's run {version.run_uri} cannot be read either"
        with errors(uri, remedy), quiet(), tempfile.TemporaryDirectory() as scratch:
            return Path(connect(uri).download_artifacts(version.run_id, path, scratch)).read_text()

    record = StepRecord.from_json(json.loads(artifact("metrics.json")))
    cells = {cell.name: cell for cell in newest_cells(record)}

    def outcomes(name: str) -> list[dict]:
        return [json.loads(line) for line in artifact(f"predictions/{name}.jsonl").splitlines() if line]

    return Side(cells, outcomes, version.tasks)


# -- the registered version
def settle(
    run: RunDirectory, config: PipelineConfig, results: Results, run_ids: Mapping[str, str], uri: str
) -> dict | None:
    """Register a finished run's last adapter, record the verdict, and promote it if the gate passed.

    Args:
        run_ids: step fingerprint → MLflow run id in the store `uri`. In a store other than the run's own, the version
            is registered with its verdict but never promoted.

    Returns:
        `{"name", "version", "uri", "promoted", "hook_failure"}`; None if nothing is to be registered.

    Raises:
        LineageError: MLflow cannot be reached or returns an error.
        NotRegistered: the adapter has no model in MLflow, or the run of an ancestor is gone.
    """
    name = config.tracking.register_as if config.tracking else None
    if name is None:
        return None
    step, verdict = results.steps[-1], results.gate
    try:
        ancestry = from_run(run, step.directory)
    except RunDirectoryError as error:
        raise NotRegistered(str(error)) from error
    version, new = registry.register(uri, name, run_ids[step.fingerprint], ancestry)
    outcome = {"name": name, "version": version.version, "uri": version.uri, "promoted": False, "hook_failure": None}
    if version.gate in (Verdict.PASSED, Verdict.REFUSED) or not (verdict or new):
        return outcome | {"promoted": bool(version.promoted)}
    registry.set_candidate(uri, version)
    if verdict and uri == config.tracking.uri:
        run.event("gate", verdict=Verdict.of(verdict).value, reasons=verdict["reasons"], version=version.version)
        if verdict["passed"] and config.gate.promote:
            done = promote(uri, version, "the gate passed", config.gate.on_promotion, config.gate.hook_timeout)
            outcome |= {"promoted": True, "hook_failure": done.hook_failure}
            _tell(run, config, done, ["gate"])  # a version passes the gate once, whatever is repeated after a crash
    registry.record_verdict(uri, version, verdict, ancestry)  # last: it marks the verdict as applied
    return outcome


def not_registered(name: str, reason: str) -> dict:
    """What `settle` would return, for a run that cannot be registered."""
    return {"name": name, "version": None, "uri": None, "promoted": False, "hook_failure": None, "failure": reason}


def promote(
    uri: str, version: Version, why: str, hook: Sequence[str] | None = None, hook_timeout: float = 600.0
) -> Promotion:
    """Make a version the champion, run the hook, and write an event to its run.

    Raises:
        LineageError: MLflow cannot be reached or returns an error.
    """
    before = registry.set_champion(uri, version, why)
    failure = _run_hook(hook, version, hook_timeout) if hook else None
    done = Promotion(version, before, why, failure)
    with contextlib.suppress(OSError, ImportError):  # the run may be gone; MLflow has the record
        run = RunDirectory(version.run_uri)
        if run.exists("config.yaml"):
            run.event("promoted", **done.to_json())
    return done


def _tell(run: RunDirectory, config: PipelineConfig, done: Promotion, key: Sequence[Any]) -> None:
    """Post a message on a promotion."""
    before = f", before it version {done.before.version}" if done.before else ""
    text = f"{done.version.name}: version {done.version.version} is the champion ({done.why}){before}"
    facts = {**done.to_json(), "run_uri": done.version.run_uri}
    post(run, config.notify, "promotion", [done.version.uri, *key], text, **facts)


def _run_hook(command: Sequence[str], version: Version, timeout: float) -> str | None:
    """Run the command without a shell; returns why it failed, or None."""
    facts = {
        "CURLORA_MODEL_NAME": version.name,
        "CURLORA_MODEL_VERSION": str(version.version),
        "CURLORA_MODEL_URI": version.uri,
        "CURLORA_RUN_URI": version.run_uri,
        "CURLORA_STEP_DIRECTORY": version.step_directory,
    }
    try:
        done = subprocess.run(
            list(command), env={**os.environ, **facts}, capture_output=True, text=True, timeout=timeout, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"gate.on_promotion {command[0]}: {error}"
    if done.returncode == 0:
        return None
    last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
    return f"gate.on_promotion {command[0]} ended with {done.returncode}: {last}"


# -- by hand
def promote_run(run: RunDirectory, force: bool = False, reason: str = "", hook: bool = True) -> Promotion:
    """Make a finished run's version the champion if the gate passes it now; `force` ignores the gate.

    Raises:
        ConfigError: the run is not finished or not registered.
        Refused: the gate refuses it.
        LineageError: MLflow cannot be reached or returns an error.
    """
    config, results = run.config(), run.results()
    uri, name = _registry_of(config)
    if not results or not results.is_finished:
        raise ConfigError([Problem(run.name, "is not finished; only a finished chain can be promoted")])
    step = results.steps[-1]
    version = registry.of_step(uri, name, identity(run), step.fingerprint)
    if version is None:
        raise ConfigError([Problem(run.name, f"is not registered as '{name}'; send it first: curlora sync {run.uri}")])
    verdict = decide(run, config, results)
    if verdict:
        registry.record_verdict(uri, version, verdict, from_run(run, step.directory))
        if verdict["passed"] is not True and not force:
            raise Refused("\n".join(verdict["reasons"]))
    why = f"forced: {reason}" if force else "the gate passed" if verdict else "by hand, without a gate"
    return _promote_by_hand(run, config, version, why, hook)


def restore(run: RunDirectory, number: int, force: bool = False, reason: str = "", hook: bool = True) -> Promotion:
    """Make a version of the run's model the champion again.

    Without `force` only a former champion or a version that passed the gate is accepted.

    Raises:
        ConfigError: there is no such version.
        Refused: the version was never champion and has not passed the gate.
        LineageError: MLflow cannot be reached or returns an error.
    """
    config = run.config()
    uri, name = _registry_of(config)
    version = registry.by_number(uri, name, number)
    if version is None:
        raise ConfigError([Problem("--to", f"model '{name}' has no version {number} in {uri}; see curlora ui")])
    if not (version.promoted or version.gate == Verdict.PASSED or force):
        verdict = f"the gate's verdict: {version.gate or 'none'}"
        raise Refused(f"version {number} was never in use ({verdict}); to use it anyway: --force --reason TEXT")
    why = f"forced: {reason}" if force else f"restored{f': {reason}' if reason else ''}"
    return _promote_by_hand(run, config, version, why, hook)


def _promote_by_hand(run: RunDirectory, config: PipelineConfig, version: Version, why: str, hook: bool) -> Promotion:
    command = config.gate.on_promotion if config.gate and hook else None
    done = promote(config.tracking.uri, version, why, command, config.gate.hook_timeout if config.gate else 0)
    with contextlib.suppress(OSError):  # the run's storage may be read-only; the registry has the record
        _tell(run, config, done, [time.time()])
    return done


def _registry_of(config: PipelineConfig) -> tuple[str, str]:
    tracking = config.tracking
    if tracking is None or tracking.register_as is None:
        remedy = "set it in the configuration and run the chain again (nothing is trained twice)"
        raise ConfigError([Problem("tracking.register_as", f"is null, so the run has no versions; {remedy}")])
    return tracking.uri, tracking.register_as
