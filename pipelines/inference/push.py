"""Pushes a finished step to the Hugging Face hub: adapter or merged model, tokenizer and model card, in one commit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.errors import ConfigError, Problem, Unavailable
from pipelines.inference.export import export_step
from pipelines.runs.directory import RunDirectory
from pipelines.runs.records import choose_step

TOKEN = "HF_TOKEN"  # name of the environment variable, the only place that a token is taken from
HUB = "https://huggingface.co"


def push_step(run: RunDirectory, step: str | None, form: str, hub_id: str, private: bool = False) -> str:
    """Push a step to the model repository `hub_id`, which is created if need be; returns the address of the commit.

    Files of earlier pushes that this form does not have are kept. The hub is that of HF_ENDPOINT.

    Args:
        form: as of `export_step`.
        private: whether a new repository is private; an existing one stays as it is.

    Raises:
        ConfigError: no such step, no token, or `hub_id` is no id of a repository.
        Unavailable: the hub cannot be reached, or refuses.
    """
    import huggingface_hub  # slow

    directory = choose_step(run, step)
    _check_id(hub_id)
    endpoint = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    api = huggingface_hub.HfApi(endpoint=endpoint, token=_token(endpoint))
    metrics = run.metrics(directory)
    with _refusals(endpoint, hub_id):  # before the export, which may take minutes
        api.create_repo(hub_id, private=private or None, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = export_step(run, step, form, Path(scratch) / "model", name=hub_id)
        files = [
            huggingface_hub.CommitOperationAdd(str(file.relative_to(folder)), str(file))
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        ]
        message = f"{run.name}: step {metrics.position}, {metrics.label}"
        with _refusals(endpoint, hub_id):
            return api.create_commit(hub_id, files, commit_message=message).commit_url


def _check_id(hub_id: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id  # slow

    try:
        validate_repo_id(hub_id)
    except HFValidationError as error:
        raise ConfigError([Problem("--to", f"'{hub_id}' is no id of a hub repository ({error})")]) from error
    if "/" not in hub_id:
        raise ConfigError([Problem("--to", f"'{hub_id}' names no owner; write owner/{hub_id}")])


def _token(endpoint: str) -> str:
    token = os.environ.get(TOKEN, "").strip()
    if not token:
        where = f"{endpoint}/settings/tokens"
        raise ConfigError([Problem(TOKEN, f"is not set; make a token with write access at {where} and export it")])
    return token


@contextmanager
def _refusals(endpoint: str, hub_id: str) -> Iterator[None]:
    """Errors of the hub's client in words."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # slow

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise Unavailable("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = (error.server_message or str(error)).strip().splitlines()[0]
        reasons = {
            401: f"{endpoint} does not accept the token in {TOKEN} ({said}); make a new one with write access",
            403: f"the token in {TOKEN} may not write to {hub_id} ({said}); use one with write access to its owner",
        }
        raise Unavailable(reasons.get(status, f"{endpoint} refuses {hub_id}: {status}, {said}")) from error
    except (HTTPError, OSError) as error:  # connections, names, certificates
        raise Unavailable(f"{endpoint} cannot be reached ({error}); check the network and HF_ENDPOINT") from error
