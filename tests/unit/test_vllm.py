"""`on_promotion` for a server that loads LoRA adapters while it runs: a real HTTP server that answers as vLLM does."""

from __future__ import annotations

import http.server
import json
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipelines.cli.app import main as command_line
from pipelines.inference.vllm import Server, ServerError, main
from pipelines.lineage.registry import Version
from pipelines.promotion.promotion import _run_hook
from tests.unit.test_predict import trained  # noqa: F401  a fixture

LIMIT = 16


class Vllm:
    """`asked`: (route, body) of every POST. Refuses what vLLM refuses: unknown names, names in use, high ranks."""

    def __init__(self, token: str | None = None):
        self.loaded, self.asked, self.broken = {}, [], set()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                cards = [{"id": "base", "root": "/base", "parent": None}]
                cards += [{"id": name, "root": path, "parent": "base"} for name, path in server.loaded.items()]
                self.answer(200, json.dumps({"object": "list", "data": cards}))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if token and self.headers["Authorization"] != f"Bearer {token}":
                    return self.answer(401, "Unauthorized")
                server.asked.append((self.path, body))
                self.answer(
                    *{"/v1/load_lora_adapter": server.load, "/v1/unload_lora_adapter": server.unload}[self.path](body)
                )

            def answer(self, status: int, text: str):
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def load(self, body: dict) -> tuple[int, str]:
        name, path = body["lora_name"], Path(body["lora_path"])
        if name in self.loaded:
            return 400, f"The lora adapter '{name}' has already been loaded."
        if str(path) in self.broken:
            return 500, "CUDA out of memory"
        config = json.loads((path / "adapter_config.json").read_text())
        if config["peft_type"] != "LORA" or config["r"] > LIMIT:
            return 400, f"LoRA rank {config['r']} is greater than max_lora_rank {LIMIT}."
        self.loaded[name] = str(path)
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body: dict) -> tuple[int, str]:
        if self.loaded.pop(body["lora_name"], None) is None:
            return 404, f"The lora adapter '{body['lora_name']}' cannot be found."
        return 200, "Success"


@pytest.fixture
def vllm():
    server = Vllm()
    yield server
    server.server.shutdown()
    server.server.server_close()


def facts(run, version: int) -> dict[str, str]:
    """What `on_promotion` puts into the environment."""
    return {
        "CURLORA_MODEL_NAME": "support",
        "CURLORA_MODEL_VERSION": str(version),
        "CURLORA_RUN_URI": run.uri,
        "CURLORA_STEP_DIRECTORY": "steps/1-head-abcdef12",
    }


def test_the_champion_takes_the_place_of_the_former_one(vllm, trained, tmp_path):  # noqa: F811
    run, _ = trained
    for version in (1, 2, 2):
        main([vllm.url, str(tmp_path / "out"), "--max-rank", "16"], facts(run, version))
    first, second = (str(tmp_path / "out" / f"support-{version}") for version in (1, 2))
    assert vllm.asked == [
        ("/v1/load_lora_adapter", {"lora_name": "champion", "lora_path": first}),
        ("/v1/unload_lora_adapter", {"lora_name": "champion"}),
        ("/v1/load_lora_adapter", {"lora_name": "champion", "lora_path": second}),
    ]
    assert vllm.loaded == {"champion": second}
    assert (Path(second) / "tokenizer_config.json").exists()


def test_a_champion_that_the_server_refuses_leaves_the_former_one(vllm, trained, tmp_path):  # noqa: F811
    run, _ = trained
    main([vllm.url, str(tmp_path), "--name", "support"], facts(run, 1))
    vllm.broken.add(str(tmp_path / "support-2"))
    with pytest.raises(ServerError, match="HTTP 500 CUDA out of memory"):
        main([vllm.url, str(tmp_path), "--name", "support"], facts(run, 2))
    assert vllm.loaded == {"support": str(tmp_path / "support-1")}


def test_it_runs_as_the_command_of_a_promotion_and_says_why_it_fails(vllm, trained, tmp_path):  # noqa: F811
    run, _ = trained
    version = Version("support", 1, run.uri, "steps/1-head-abcdef12", "abcdef1234", "base", ("head",), {})
    hook = [sys.executable, "-m", "pipelines.inference.vllm", vllm.url, str(tmp_path), "--max-rank"]
    failure = _run_hook([*hook, "3"], version, 600)
    assert "the adapter's rank is 4, above 3" in failure and vllm.asked == []
    assert _run_hook([*hook, "4"], version, 600) is None
    assert vllm.loaded == {"champion": str(tmp_path / "support-1")}


def test_a_server_with_a_token_and_one_that_is_away():
    server = Vllm(token="key")
    with pytest.raises(ServerError, match="HTTP 401"):
        Server(server.url, None).unload("x")
    with pytest.raises(ServerError, match="HTTP 404"):
        Server(server.url, "key").unload("x")
    server.server.shutdown()
    server.server.server_close()
    with pytest.raises(ServerError, match="refused"):
        Server(server.url, "key").unload("x")


def test_an_export_above_the_servers_rank_is_refused_with_the_remedy(trained, tmp_path):  # noqa: F811
    run, _ = trained
    options = ["export", run.uri, "--as", "lora", "--to", str(tmp_path / "out"), "--max-rank"]
    found = CliRunner().invoke(command_line, [*options, "3"])
    assert found.exit_code == 2 and "--max-rank: the adapter's rank is 4, above 3; raise the server's" in found.output
    assert not (tmp_path / "out").exists()
    file = Path(run.path("steps/1-head-abcdef12/adapter/adapter_config.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"blocks": 3, "carry": "stack"}))
    found = CliRunner().invoke(command_line, [*options, "8"])
    assert "rank is 12 (3 stacked blocks of 4), above 8" in found.output and "carry: continue" in found.output
