"""For `gate.on_promotion`: gives the new champion to a server that loads LoRA adapters while it runs, such as vLLM.

    on_promotion: [python, -m, pipelines.inference.vllm, "http://127.0.0.1:8001", /adapters, --name, champion]

The server must see the folder under the same path. Its routes: POST /v1/unload_lora_adapter, /v1/load_lora_adapter
(vLLM: `--enable-lora` and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True); its token is read from VLLM_API_KEY.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.errors import ConfigError
from pipelines.inference.export import export_step
from pipelines.runs.directory import RunDirectory

SECONDS = 120.0  # timeout of a request; loading reads the adapter


class ServerError(RuntimeError):
    """The server refuses a request or does not answer."""


class Server:
    """The routes of a server that concern its LoRA adapters."""

    def __init__(self, address: str, token: str | None):
        self.address = address.rstrip("/")
        self.headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}

    def adapters(self) -> dict[str, str]:
        """Name → folder of every adapter that the server has loaded."""
        models = json.loads(self._ask("/v1/models"))["data"]
        return {model["id"]: model["root"] for model in models if model.get("parent") and model.get("root")}

    def unload(self, name: str) -> None:
        self._ask("/v1/unload_lora_adapter", {"lora_name": name})

    def load(self, name: str, folder: str) -> None:
        self._ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})

    def _ask(self, route: str, body: dict | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + route, data, self.headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            reason = error.read(500).decode(errors="replace").strip()
            raise ServerError(f"{self.address}{route}: HTTP {error.code} {reason}") from error
        except OSError as error:
            raise ServerError(f"{self.address}{route}: {getattr(error, 'reason', error)}") from error


def replace_adapter(server: Server, name: str, folder: str) -> None:
    """Load a folder under a name; if the server refuses it, the adapter that had the name before is loaded again.

    Raises:
        ServerError: the server refuses or does not answer.
    """
    before = server.adapters().get(name)
    if before == folder:
        return
    if before:
        server.unload(name)
    try:
        server.load(name, folder)
    except ServerError:
        if before:
            server.load(name, before)
        raise


def main(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Export the promoted adapter, named by the variables that `on_promotion` sets, and load it.

    Raises:
        ConfigError: the adapter cannot be exported.
        ServerError: the server refuses it or does not answer.
    """
    parser = argparse.ArgumentParser("pipelines.inference.vllm", description=__doc__.splitlines()[0])
    parser.add_argument("address", help="URL of the server")
    parser.add_argument("folder", type=Path, help="folder for exported adapters, which the server sees, too")
    parser.add_argument("--name", default="champion", help="name of the adapter in requests")
    parser.add_argument("--max-rank", type=int, help="the server's limit (vLLM: --max-lora-rank)")
    chosen = parser.parse_args(arguments)
    target = chosen.folder / f"{environment['CURLORA_MODEL_NAME']}-{environment['CURLORA_MODEL_VERSION']}"
    if not (target / "README.md").exists():  # written last; a version never changes
        position = environment["CURLORA_STEP_DIRECTORY"].rpartition("/")[2].partition("-")[0]
        run = RunDirectory(environment["CURLORA_RUN_URI"])
        step = None if run.config().adapter.carry == "bank" else position  # a bank has no one adapter, and is refused
        export_step(run, step, "lora", target, max_rank=chosen.max_rank)
    replace_adapter(Server(chosen.address, environment.get("VLLM_API_KEY")), chosen.name, str(target))


if __name__ == "__main__":
    try:
        main(sys.argv[1:], os.environ)
    except (ConfigError, ServerError) as error:
        sys.exit(f"error: {error}")
