"""Runs a chain as a job on a Ray cluster: submits it once, follows it, finds it again.

A job's name is derived from its configuration and the attempt, so submitting the same configuration twice finds the
running job. The configuration is written to the run's storage; the job carries only code and never a secret: secrets
belong into the environment of the nodes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import socket
import time
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from pipelines.config.loading import parse_config, read_config
from pipelines.config.pipeline import PipelineConfig
from pipelines.errors import ConfigError, Problem, Unavailable
from pipelines.preflight.portability import open_secrets, unshared
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import fingerprint

CODE = Path(__file__).resolve().parents[1]

EXCLUDES = [
    *(".git/", ".venv/", "/tests/", "docs/", "/build/", "/dist/", "*.egg-info/", "__pycache__/", ".*_cache/"),
    *("/runs/", "/mlruns/", "mlflow.db*", "*.safetensors", "*.ipynb"),
]

STOP_SECONDS = 60  # granted to a driver after a stop request, in which its workers write a checkpoint
POLL_SECONDS = 1.0
AGENT_SECONDS = 30  # until a cluster that has just started accepts jobs
RUN_KEY = "curlora_run"  # job metadata: name of the run


class ClusterError(Unavailable):
    """The cluster cannot be reached, refuses the request, or does not know the job."""


@dataclass(frozen=True)
class Job:
    """A job as reported by the cluster. `status`: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""

    id: str
    run: str
    status: str
    started: float | None
    exit_code: int | None
    message: str

    @property
    def over(self) -> bool:
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


# -- what a job contains
def load_for_cluster(path: str, overrides: Iterable[str], one_machine: bool) -> PipelineConfig:
    """Load a configuration to be run as a job.

    Raises:
        ConfigError: with every problem: invalid fields, paths that only this machine has, secrets.
    """
    raw = read_config(path, overrides)
    config = parse_config(raw)
    as_written = PipelineConfig.model_validate(raw)
    problems = [*unshared(as_written, one_machine), *open_secrets(config)]
    if problems:
        raise ConfigError(problems)
    return _self_contained(config)


def load_for_tick(path: str, overrides: Iterable[str]) -> PipelineConfig:
    """Load a configuration for `curlora tick`, which must mean the same in any working directory.

    Raises:
        ConfigError: invalid fields or relative paths.
    """
    raw = read_config(path, overrides)
    config = parse_config(raw)
    if problems := unshared(PipelineConfig.model_validate(raw), one_machine=True):
        raise ConfigError(problems)
    return config


def _self_contained(config: PipelineConfig) -> PipelineConfig:
    """Copy DeepSpeed settings from a file into the configuration."""
    if not isinstance(config.deepspeed, str) or not config.deepspeed.endswith(".json"):
        return config
    try:
        settings = yaml.safe_load(Path(config.deepspeed).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([Problem("deepspeed", f"'{config.deepspeed}' cannot be read as JSON ({error})")]) from error
    return PipelineConfig.model_validate(config.model_dump() | {"deepspeed": settings})


def runtime_env() -> dict:
    """Ray's runtime environment of a job; equal for all jobs of one code version, so that Ray can cache it.

    If this package is installed rather than checked out, no code is sent: the image of the nodes contains it.
    """
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
    if not _is_checkout(CODE):
        return {"env_vars": variables}
    return {"working_dir": str(CODE), "excludes": EXCLUDES, "env_vars": variables}


def _is_checkout(folder: Path) -> bool:
    """Whether the folder holds this project's sources; site-packages may contain another package's pyproject.toml."""
    project = folder / "pyproject.toml"
    return project.exists() and tomllib.loads(project.read_text(encoding="utf-8"))["project"]["name"] == "curlora"


def job_id(config: PipelineConfig, attempt: int) -> str:
    """Name of a job: run, digest of the configuration, number of the attempt."""
    return f"{config.name}-{fingerprint(config.model_dump())[:8]}-{attempt}"


def _write_config(config: PipelineConfig) -> str:
    """Write the configuration to the run's storage and return its URI."""
    text = yaml.safe_dump(config.model_dump(), sort_keys=False).encode()
    run = RunDirectory(config.run_uri)
    name = f"submitted/{fingerprint(config.model_dump())[:8]}.yaml"
    try:
        run.write_bytes(name, text)
    except OSError as error:
        raise ConfigError([Problem("storage", f"{config.storage} cannot be written from here ({error})")]) from error
    return f"{run.uri}/{name}"


# -- the cluster
class Cluster:
    """The jobs of a Ray cluster, through the address of its dashboard.

    Authenticates as Ray does: `RAY_AUTH_MODE=token` with `RAY_AUTH_TOKEN_PATH` or `RAY_AUTH_TOKEN`.

    Raises:
        ClusterError: the cluster does not answer, or there is no valid token.
    """

    def __init__(self, address: str):
        from ray.job_submission import JobSubmissionClient  # imports ray

        self.address = address
        with _errors(address):
            self._client = JobSubmissionClient(address)

    def is_this_machine(self) -> bool:
        """Whether this machine is the only node of the cluster, so that it sees every path."""
        with _errors(self.address):
            answer = self._client._do_request("GET", "/nodes?view=summary").json()
        nodes = [node for node in answer["data"]["summary"] if node["raylet"].get("state") == "ALIVE"]
        return [node["hostname"] for node in nodes] == [socket.gethostname()]

    def submit(self, config: PipelineConfig, verbose: bool = False) -> tuple[Job, bool]:
        """Start the chain as a job unless one is running; returns (job, whether it is new)."""
        attempt = 1
        while True:
            name = job_id(config, attempt)
            job = self.job(name)
            if job is None:
                if self._start(name, config, verbose):
                    return self.job(name), True
            elif job.over:
                attempt += 1
            else:
                return job, False

    def _start(self, name: str, config: PipelineConfig, verbose: bool) -> bool:
        """Submit a job; False if somebody else submitted it at the same moment."""
        end = time.monotonic() + AGENT_SECONDS
        command = ["python", "-m", "pipelines", "run", _write_config(config), *(["--verbose"] if verbose else [])]
        while True:
            try:
                with _errors(self.address):
                    self._client.submit_job(
                        entrypoint=shlex.join(command),
                        submission_id=name,
                        runtime_env=runtime_env(),
                        metadata={RUN_KEY: config.name, "storage": config.storage},
                    )
                return True
            except ClusterError as error:
                if self.job(name) is not None:
                    return False
                if "No available agent" not in str(error) or time.monotonic() > end:
                    raise
            time.sleep(POLL_SECONDS)

    def job(self, name: str) -> Job | None:
        """The job of this name; None if the cluster does not know it."""
        return next((job for job in self.jobs() if job.id == name), None)

    def jobs(self, run: str | None = None) -> list[Job]:
        """The jobs of a run, or of all runs (None), oldest first."""
        with _errors(self.address):
            found = [_job(details) for details in self._client.list_jobs()]
        found = [job for job in found if job.run and run in (None, job.run)]
        return sorted(found, key=lambda job: (job.started or 0, job.id))

    def stop(self, name: str, wait: float) -> Job:
        """Ask a job to stop, which writes a checkpoint first; returns its state after at most `wait` seconds."""
        with _errors(self.address):
            self._client.stop_job(name)
        end = time.monotonic() + wait
        while not (job := self.job(name)).over and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        return job

    def follow(self, name: str, say: Callable[[str], None]) -> Job:
        """Pass a job's output to `say` until the job has ended."""
        with _errors(self.address):
            asyncio.run(self._tail(name, say))
        while not (job := self.job(name)).over:
            time.sleep(POLL_SECONDS)
        return job

    async def _tail(self, name: str, say: Callable[[str], None]) -> None:
        async for lines in self._client.tail_job_logs(name):
            say(lines)


def _job(details) -> Job:
    return Job(
        id=details.submission_id or "",
        run=(details.metadata or {}).get(RUN_KEY, ""),
        status=str(getattr(details.status, "value", details.status)),
        started=details.start_time / 1000 if details.start_time else None,
        exit_code=details.driver_exit_code,
        message=details.message or "",
    )


@contextlib.contextmanager
def _errors(address: str):
    """Turn errors of client and network into a `ClusterError` with a remedy."""
    import aiohttp  # slow
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        remedy = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the file with the cluster's token"
        raise ClusterError(f"{address} rejects the request: no valid token; {remedy}") from error
    except (OSError, RuntimeError, ValueError, requests.RequestException, aiohttp.ClientError) as error:
        if isinstance(error, ClusterError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        remedy = "check --address (the dashboard's, e.g. http://127.0.0.1:8265) and that the cluster runs"
        raise ClusterError(f"{address}: {reason}; {remedy}") from error


def default_address() -> str | None:
    """`RAY_API_SERVER_ADDRESS`, as for Ray's own commands."""
    return os.environ.get("RAY_API_SERVER_ADDRESS") or None
