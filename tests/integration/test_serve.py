"""`curlora serve` for real: Ray Serve on loopback, a registry, and OpenAI's client as it is."""

import concurrent.futures
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import openai
import psutil
import pytest
from mlflow import MlflowClient

from pipelines.inference.predict import predict
from pipelines.lineage import registry
from pipelines.lineage.store import initialize
from pipelines.runs.directory import RunDirectory
from tests.bench import wait_for
from tests.conftest import make_tokenizer
from tests.unit.serving import ROWS, register, write_base, write_run

SWAP_SECONDS = 10.0  # what a user is promised
ASKED = [{"role": "user", "content": "the film is good"}]
OPTIONS = {"temperature": 0, "max_tokens": 16}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with two runs on one base, registered as versions 1 and 2 of a model; the first is champion."""
    root = tmp_path_factory.mktemp("serve")
    store = f"sqlite:///{root}/mlflow.db"
    initialize(store)
    base = write_base(root / "base", make_tokenizer())
    for number, name in enumerate(("one", "two"), 1):
        tracking = {"uri": store, "experiment": "serve", "register_as": "served"}
        run = write_run(root, base, name, number, tracking=tracking, serve={"poll": "1s", "drain": "20s"})
        register(MlflowClient(tracking_uri=store), "served", run, "champion" if number == 1 else None)
    return root


@pytest.fixture(scope="module")
def server(root):
    """Address and process of a server of the champion."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pipelines", "serve", "models:/served@champion", "--port", str(port)]
    command += ["--uri", f"sqlite:///{root}/mlflow.db"]
    log = root / "serve.log"
    with log.open("w") as err:
        process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=err, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith(f"http://127.0.0.1:{port}/v1"), log.read_text()
        yield f"http://127.0.0.1:{port}", process
    finally:
        left = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for started in (process, *left):  # only where a test has failed before the server was told to end
            with contextlib.suppress(psutil.Error):
                started.kill()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none") as client:
        yield client


def _version(client) -> int | None:
    answer = client.chat.completions.create(model="champion", messages=ASKED, **OPTIONS | {"max_tokens": 1})
    return answer.adapter["version"]


def _promote_and_wait(root, client, number: int) -> float:
    """Seconds until new requests are answered by this version."""
    store = f"sqlite:///{root}/mlflow.db"
    registry.set_champion(store, registry.by_number(store, "served", number), "a test")
    begin = time.monotonic()
    wait_for(lambda: _version(client) == number, seconds=60)
    return time.monotonic() - begin


def test_openais_client_chats_streams_and_switches_adapters_by_name(client):
    assert {"base", "champion", "one/mood"} <= {model.id for model in client.models.list()}
    said = {}
    for model in ("base", "champion", "one/mood", "two/mood"):
        answer = client.chat.completions.create(model=model, messages=ASKED, **OPTIONS)
        parts = client.chat.completions.create(model=model, messages=ASKED, stream=True, **OPTIONS)
        said[model] = answer.choices[0].message.content
        assert "".join(part.choices[0].delta.content or "" for part in parts) == said[model]
        assert answer.model == model and answer.usage.completion_tokens <= 16
        expected = {"base": "base", "champion": "models:/served/1"}.get(model, model)
        assert answer.adapter["name"] == expected
    assert said["champion"] == said["one/mood"]
    assert len(set(said.values())) == 3, said
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4o'"):
        client.chat.completions.create(model="gpt-4o", messages=ASKED)


def test_tasks_are_answered_as_predict_answers_them(root, server):
    rows = [{"text": row["text"]} for row in ROWS[:4]]
    body = {"model": "champion", "task": "topic", "rows": rows}
    found = httpx2.post(f"{server[0]}/v1/predict", json=body, timeout=60).json()
    assert found["predictions"] == predict(RunDirectory(f"{root}/runs/one"), "topic", rows)


def test_a_promotion_and_the_way_back_are_followed_within_seconds_and_no_request_fails(root, client):
    impatient = client.with_options(max_retries=0)
    seen, failed, end = [], [], threading.Event()

    def ask() -> None:
        while not end.is_set():
            try:
                seen.append(_version(impatient))
            except openai.OpenAIError as error:
                failed.append(repr(error))

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            pool.submit(ask)
        try:
            there, back = _promote_and_wait(root, client, 2), _promote_and_wait(root, client, 1)
        finally:
            end.set()
    assert failed == [] and set(seen) == {1, 2}
    assert max(there, back) < SWAP_SECONDS


def test_a_killed_replica_is_replaced_and_says_so_in_between(server, client):
    """A client that retries, as OpenAI's does, loses nothing; one that does not gets a clear status."""
    (replica,) = [p for p in psutil.Process(server[1].pid).children(recursive=True) if "ServeReplica" in _name(p)]
    told: list = []

    def ask() -> None:
        raw = httpx2.post(f"{server[0]}/v1/completions", json={"model": "champion", "prompt": "a"}, timeout=120)
        told.append(raw.status_code)

    replica.kill()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(12):
            pool.submit(ask)
            time.sleep(0.1)
    assert set(told) <= {200, 500, 503} and len(told) == 12
    patient = client.with_options(max_retries=10)
    assert patient.completions.create(model="champion", prompt="a", max_tokens=1).adapter["version"] == 1


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_a_server_that_is_told_to_end_finishes_what_it_began(server, client):
    parts = client.chat.completions.create(
        model="champion", messages=ASKED, stream=True, temperature=1.0, seed=1, max_tokens=30
    )
    first = next(iter(parts))
    os.kill(server[1].pid, signal.SIGTERM)
    rest = list(parts)
    assert first.choices and rest[-1].choices[0].finish_reason in ("stop", "length")
    assert server[1].wait(timeout=60) == 0
    with pytest.raises(openai.APIConnectionError):
        client.with_options(max_retries=0).models.list()
