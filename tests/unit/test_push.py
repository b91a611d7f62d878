"""`curlora push` against a stand-in for the hub on loopback, by the hub's own client."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from huggingface_hub import constants

from pipelines.cli.app import main

WRITES, READS = "hf_writes", "hf_reads"  # tokens


class Hub(ThreadingHTTPServer):
    """As much of the hub's API as a push needs: repositories, LFS and commits. https://huggingface.co/docs/hub/api"""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.created: list[dict] = []
        self.commits: list[str] = []
        self.asked: list[str] = []


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args) -> None:
        pass

    def send(self, status: int, value: dict, error: str = "") -> None:
        body = json.dumps(value | ({"error": error} if error else {})).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self) -> None:
        self.send(404, {}, "Repository not found")

    def do_PUT(self) -> None:
        content = self.body()
        self.server.objects[hashlib.sha256(content).hexdigest()] = content
        self.send(200, {})

    def do_POST(self) -> None:
        hub, body = self.server, self.body()
        hub.asked.append(self.path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (WRITES, READS):
            self.send(401, {}, "Invalid username or password.")
        elif token == READS:
            self.send(403, {}, "You don't have the rights to create a model under this namespace")
        elif self.path == "/api/repos/create":
            self.create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self.send(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if path.endswith(".safetensors") else "regular" for path in paths]
            files = [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in zip(paths, modes, strict=True)]
            self.send(200, {"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            upload = {"upload": {"href": f"{hub.endpoint}/lfs"}}
            objects = [item | {"actions": upload} for item in json.loads(body)["objects"]]
            self.send(200, {"transfer": "basic", "objects": objects})
        else:
            self.commit(self.path.split("/commit/")[0].removeprefix("/api/models/"), body)

    def create(self, wanted: dict) -> None:
        hub, name = self.server, f"{wanted['organization']}/{wanted['name']}"
        address = {"url": f"{hub.endpoint}/{name}"}
        if name in hub.repositories:
            self.send(409, address, "You already created this model repo")
            return
        hub.created.append(wanted)
        hub.repositories[name] = {}
        self.send(200, address)

    def commit(self, name: str, body: bytes) -> None:
        files = self.server.repositories[name]
        for line in body.decode().splitlines():
            kind, value = (json.loads(line)[key] for key in ("key", "value"))
            if kind == "header":
                self.server.commits.append(value["summary"])
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        address = f"{self.server.endpoint}/{name}/commit/c0ffee"
        self.send(200, {"success": True, "commitOid": "c0ffee", "commitUrl": address})


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.setenv("HF_TOKEN", WRITES)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a storage service of its own
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def push(trained):
    run, _ = trained

    def invoke(*arguments: str):
        storage, _, name = run.uri.rpartition("/")
        return CliRunner().invoke(main, ["push", name, "--storage", storage, *arguments])

    return invoke


@pytest.mark.parametrize("form", ["adapter", "lora", "merged"])
def test_what_is_on_the_hub_answers_as_the_step_and_says_how_to_load_it(trained, hub, push, tmp_path, form):
    pushed = push("--to", "me/demo", "--as", form)
    assert (pushed.exit_code, pushed.stdout) == (0, f"{hub.endpoint}/me/demo/commit/c0ffee\n")
    files = hub.repositories["me/demo"]
    card = files["README.md"].decode()
    assert 'AutoTokenizer.from_pretrained("me/demo")' in card and "FOLDER" not in card
    assert not any(str(tmp_path).encode() in content for content in files.values())
    for name, content in files.items():
        (tmp_path / "there" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "there" / name).write_bytes(content)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(tmp_path, form)(ids).logits, trained[1](ids).logits, atol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "there").chat_template


def loaded(folder: Path, form: str):
    there = folder / "there"
    if form == "merged":
        return transformers.AutoModelForCausalLM.from_pretrained(there, dtype=torch.float32).eval()
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "my-base", dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, there).eval()


def test_a_repository_that_exists_gets_another_commit(hub, push):
    for arguments in (("--private",), (), ("--step", "reviews")):
        assert push("--to", "me/demo", *arguments).exit_code == 0
    assert hub.commits == ["unit: step 1, reviews"] * 3
    assert [wanted.get("visibility") for wanted in hub.created] == ["private"]


def test_the_token_is_that_of_the_environment_and_of_nothing_else(hub, push, monkeypatch, tmp_path):
    (tmp_path / "token").write_text(WRITES)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN")
    refused = push("--to", "me/demo")
    assert refused.exit_code == 2
    assert f"HF_TOKEN: is not set; make a token with write access at {hub.endpoint}/settings/tokens" in refused.output
    assert hub.asked == []


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("hf_nobody", "does not accept the token in HF_TOKEN (Invalid username or password.)"),
        (READS, "the token in HF_TOKEN may not write to me/demo (You don't have the rights"),
    ],
)
def test_a_refusal_of_the_hub_is_one_line_without_the_token(hub, push, monkeypatch, token, said):
    monkeypatch.setenv("HF_TOKEN", token)
    refused = push("--to", "me/demo")
    assert refused.exit_code == 1
    (line,) = refused.output.splitlines()
    assert said in line and token not in line
    assert hub.repositories == {}


def test_a_hub_that_does_not_answer_is_named(hub, push, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused = push("--to", "me/demo")
    assert refused.exit_code == 1
    assert refused.output.startswith("error: http://127.0.0.1:9 cannot be reached (")
    assert "check the network and HF_ENDPOINT" in refused.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--to", "demo"), "--to: 'demo' names no owner; write owner/demo"),
        (("--to", "me/a b"), "--to: 'me/a b' is no id of a hub repository"),
        (("--to", "me/demo", "--step", "none"), "has no finished step 'none'"),
    ],
)
def test_bad_input_asks_nothing_of_the_hub(hub, push, arguments, said):
    refused = push(*arguments)
    assert refused.exit_code == 2 and said in refused.output
    assert hub.asked == []
