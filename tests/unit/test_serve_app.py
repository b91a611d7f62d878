"""The HTTP routes on a real service: answers, streams, tasks, the canary, metrics, and what is refused."""

import json
import re
import threading
import time

import pytest
from fastapi.testclient import TestClient

from pipelines.config.serve import ServeConfig
from pipelines.inference.predict import predict
from pipelines.serve.app import HEADER, make_app
from pipelines.serve.schema import MOST_BYTES
from pipelines.serve.service import Service
from pipelines.serve.target import Plan, token_digest
from tests.conftest import make_tokenizer
from tests.unit.serving import ROWS, register, write_base, write_run

TOKEN = "a-token-of-many-letters"
MODEL = "served"
ASKED = [{"role": "user", "content": "the film is good"}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    base = write_base(root / "base", make_tokenizer())
    return {name: write_run(root, base, name, number) for number, name in enumerate(("one", "two"), 1)}


@pytest.fixture(scope="module")
def plan(runs, store, client):
    register(client, MODEL, runs["one"], "champion")
    register(client, MODEL, runs["two"], "candidate")
    config, storage = runs["one"].config(), runs["one"].uri.rpartition("/")[0]
    settings = ServeConfig(max_new_tokens=48, batch_rows=8, poll=60.0)
    return Plan(config.base_model, config, storage, (store, MODEL), settings, run=runs["one"].uri)


@pytest.fixture(scope="module")
def service(plan):
    service = Service(plan)
    yield service
    service.close()


@pytest.fixture(scope="module")
def http(service):
    with TestClient(make_app(service), raise_server_exceptions=False) as client:
        yield client


def _post(http, path: str, **body):
    response = http.post(f"/v1/{path}", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def _complete(http, **body) -> dict:
    return _post(http, "completions", **{"model": "champion", "prompt": "the film", "temperature": 0} | body)


def _chat(http, **body) -> dict:
    return _post(http, "chat/completions", **{"model": "champion", "messages": ASKED, "temperature": 0} | body)


def _events(http, path: str, **body) -> list[dict]:
    with http.stream("POST", f"/v1/{path}", json=body | {"stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream"), response.read()
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# -- answers
def test_every_response_says_which_adapter_answered(http, runs):
    said = {}
    for name, label in (("base", "base"), ("champion", f"models:/{MODEL}/1"), ("candidate", f"models:/{MODEL}/2")):
        response = http.post("/v1/completions", json={"model": name, "prompt": "the film", "temperature": 0})
        body = response.json()
        assert body["model"] == name and body["adapter"]["name"] == response.headers[HEADER] == label
        said[name] = body["choices"][0]["text"]
    step = runs["two"].results().steps[0]
    body = _complete(http, model="two/mood")
    assert body["adapter"] == {"name": "two/mood", "version": None, "fingerprint": step.fingerprint, "canary": False}
    assert body["system_fingerprint"] == step.fingerprint
    assert body["choices"][0]["text"] == said["candidate"]
    assert len(set(said.values())) == 3
    assert _chat(http)["adapter"]["version"] == 1


def test_models_lists_what_can_be_asked(http):
    listed = {model["id"]: model["adapter"]["name"] for model in http.get("/v1/models").json()["data"]}
    assert listed["base"] == "base" and listed["champion"] == f"models:/{MODEL}/1"
    assert {"candidate", "one/mood"} <= set(listed)


@pytest.mark.parametrize("temperature", [0, 1.2])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_stream_is_the_answer_in_pieces(http, path, temperature):
    body = {"model": "champion", "temperature": temperature, "seed": 3, "max_tokens": 30, "n": 2}
    body |= {"prompt": "the plot"} if path == "completions" else {"messages": ASKED}
    whole = _post(http, path, **body)
    events = _events(http, path, **body, stream_options={"include_usage": True})
    chat = path != "completions"
    for index, choice in enumerate(whole["choices"]):
        mine = [c for event in events for c in event["choices"] if c["index"] == index]
        text = "".join(c["delta"].get("content", "") if chat else c["text"] for c in mine)
        assert text == (choice["message"]["content"] if chat else choice["text"])
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        assert [c["finish_reason"] for c in mine[:-1]] == [None] * (len(mine) - 1) and len(mine) > 3
        assert not chat or mine[0]["delta"]["role"] == "assistant"
    assert events[-1]["usage"] == whole["usage"] and events[-1]["choices"] == []
    assert {event["adapter"]["name"] for event in events} == {f"models:/{MODEL}/1"}
    texts = [str(choice) for choice in whole["choices"]]
    assert (texts[0].replace("'index': 0", "") == texts[1].replace("'index': 1", "")) == (temperature == 0)


def test_seeds_repeat_and_their_absence_does_not(http):
    seeded = [_complete(http, temperature=1.5, max_tokens=24, seed=11)["choices"][0]["text"] for _ in range(2)]
    assert seeded[0] == seeded[1]
    free = {_complete(http, temperature=1.5, max_tokens=24)["choices"][0]["text"] for _ in range(3)}
    assert len(free) > 1


def test_stop_texts_lengths_and_usage(http):
    whole = _complete(http, max_tokens=40)
    text = whole["choices"][0]["text"]
    assert whole["usage"]["completion_tokens"] <= 40 and whole["usage"]["prompt_tokens"] > 1
    cut = _complete(http, max_tokens=40, stop=text[5:8])["choices"][0]
    assert cut["text"] == text[: text.index(text[5:8])] and cut["finish_reason"] == "stop"
    assert _complete(http)["usage"]["completion_tokens"] <= 16, "as OpenAI has it without max_tokens"
    assert _chat(http, max_completion_tokens=2)["usage"]["completion_tokens"] <= 2


def test_several_prompts_text_and_tokens(http, service):
    prompts = ["the film", "a plot is good"]
    ids = [service.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    single = [_complete(http, prompt=prompt)["choices"][0]["text"] for prompt in prompts]
    for asked in (prompts, [[*service.prompts.encoder.prefix, *one] for one in ids]):
        choices = _complete(http, prompt=asked)["choices"]
        assert [choice["text"] for choice in choices] == single
        assert [choice["index"] for choice in choices] == [0, 1]


def test_log_probabilities_in_both_forms(http):
    chat = _chat(http, logprobs=True, top_logprobs=2, max_tokens=5)["choices"][0]["logprobs"]["content"]
    assert len(chat) == 5 and all(entry["logprob"] == entry["top_logprobs"][0]["logprob"] for entry in chat)
    assert all(entry["bytes"] in (None, list(entry["token"].encode())) for entry in chat)
    plain = _complete(http, logprobs=3, max_tokens=5)["choices"][0]["logprobs"]
    assert [len(top) for top in plain["top_logprobs"]] == [3] * 5
    assert plain["text_offset"][1] == len(plain["tokens"][0])
    body = {"model": "champion", "messages": ASKED, "temperature": 0, "max_tokens": 5, "logprobs": True}
    events = _events(http, "chat/completions", **body, top_logprobs=2)
    streamed = [e for event in events for c in event["choices"] for e in (c["logprobs"] or {}).get("content", [])]
    assert streamed == chat
    assert _chat(http, max_tokens=3)["choices"][0]["logprobs"] is None


def test_the_role_developer_and_content_in_parts(http):
    parts = [{"type": "text", "text": "the film "}, {"type": "text", "text": "is good"}]
    assert _chat(http, messages=[{"role": "user", "content": parts}])["choices"] == _chat(http)["choices"]
    system = [{"role": "system", "content": "slow"}, *ASKED]
    developer = [{"role": "developer", "content": "slow"}, *ASKED]
    assert _chat(http, messages=developer)["choices"] == _chat(http, messages=system)["choices"]


@pytest.mark.parametrize("task", ["mood", "topic", "choose", "write"])
def test_tasks_are_answered_by_the_code_of_predict(http, runs, task):
    rows = [{name: row[name] for name in ("text", "choices")} for row in ROWS[:5]]
    for name, run in (("champion", "one"), ("two/mood", "two")):
        body = _post(http, "predict", model=name, task=task, rows=rows)
        assert body["predictions"] == predict(runs[run], task, rows)
        assert body["adapter"]["name"] == (f"models:/{MODEL}/1" if name == "champion" else "two/mood")
    if task in ("mood", "choose"):
        based = _post(http, "predict", model="base", task=task, rows=rows)["predictions"]
        assert based == predict(runs["one"], task, rows, "base")


# -- the canary
def test_the_canary_gets_its_share_and_is_counted(plan):
    from dataclasses import replace

    service = Service(replace(plan, settings=plan.settings.model_copy(update={"canary": 0.3})))
    service._chance.seed(0)
    with TestClient(make_app(service)) as http:
        found = [_complete(http, max_tokens=1)["adapter"] for _ in range(60)]
        direct = [_complete(http, model="candidate", max_tokens=1)["adapter"]["canary"] for _ in range(3)]
        text = http.get("/metrics").text
    service.close()
    diverted = [adapter for adapter in found if adapter["canary"]]
    assert 8 <= len(diverted) <= 28
    assert {adapter["version"] for adapter in diverted} == {2} and not any(direct)
    assert {adapter["version"] for adapter in found if not adapter["canary"]} == {1}
    line = (
        f'curlora_requests_total{{adapter="models:/{MODEL}/2",asked="champion",route="/v1/completions",status="200"}}'
    )
    assert f"{line} {float(len(diverted))}" in text


# -- what is refused: (route, body, status, words of the reason)
CHAT, TEXT = "chat/completions", "completions"
MALFORMED = [
    (CHAT, b"", 400, "not valid JSON"),
    (CHAT, b"{", 400, "not valid JSON"),
    (CHAT, b"\xff\xfe{}", 400, "not valid JSON"),
    (CHAT, b"[" * 100_000, 400, "nested too deeply"),
    (CHAT, b"[]", 400, "is list, expected a JSON object"),
    (CHAT, b'"hello"', 400, "is str, expected a JSON object"),
    (CHAT, b" " * (MOST_BYTES + 1), 413, "at most"),
    (CHAT, {}, 400, "model: field required"),
    (CHAT, {"messages": None}, 400, "messages:"),
    (CHAT, {"messages": []}, 400, "messages: list should have at least 1 item"),
    (CHAT, {"messages": "hi"}, 400, "messages:"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages.0.content: field required"),
    (CHAT, {"messages": [{"role": "wizard", "content": "hi"}]}, 400, "messages.0.role"),
    (CHAT, {"messages": [{"role": "user", "content": 3}]}, 400, "messages.0.content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content.0"),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, 400, "lone surrogate"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, 400, "no tools here"),
    (CHAT, {"messages": [{"role": "user", "content": "film " * 500}]}, 400, "leaves no room in the model's context"),
    (CHAT, {"model": "gpt-4o"}, 404, "there is no model 'gpt-4o'; use one of: base, candidate, champion"),
    (CHAT, {"model": "two/ghost"}, 404, "no finished step 'ghost'"),
    (CHAT, {"model": "../../etc/passwd"}, 404, "there is no model"),
    (CHAT, {"model": 3}, 400, "model:"),
    (CHAT, {"model": "x" * 10_000}, 404, "xxx..."),
    (CHAT, b'{"model": "champion", "messages": [], "temperature": NaN}', 400, "NaN is no number in JSON"),
    (CHAT, b'{"model": "champion", "messages": [], "temperature": 1e999}', 400, "temperature"),
    (CHAT, {"temperature": -1}, 400, "temperature: input should be greater than or equal to 0"),
    (CHAT, {"temperature": 9}, 400, "temperature: input should be less than or equal to 2"),
    (CHAT, {"temperature": "hot"}, 400, "temperature:"),
    (CHAT, {"top_p": 0}, 400, "top_p: input should be greater than 0"),
    (CHAT, {"n": 10**9}, 400, "n: input should be less than or equal to 16"),
    (CHAT, {"n": 9}, 400, "n: 1 prompts × n 9 is more than the 8 answers of a batch"),
    (CHAT, {"n": 0}, 400, "n:"),
    (CHAT, {"n": 1.5}, 400, "n:"),
    (CHAT, {"max_tokens": 0}, 400, "max_tokens:"),
    (CHAT, {"max_tokens": 49}, 400, "this server writes at most 48"),
    (CHAT, {"max_tokens": 48, "messages": ASKED * 4}, 400, "in the model's context of 64"),
    (CHAT, {"max_tokens": True}, 400, "max_tokens:"),
    (CHAT, {"seed": 2**70}, 400, "seed:"),
    (CHAT, {"stop": ""}, 400, "stop"),
    (CHAT, {"stop": ["a"] * 17}, 400, "stop"),
    (CHAT, {"stop": [1]}, 400, "stop"),
    (CHAT, {"stream": "yes"}, 400, "stream:"),
    (CHAT, {"stream_options": {"include_usage": True}}, 400, "only for stream: true"),
    (CHAT, {"top_logprobs": 3}, 400, "top_logprobs needs logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs:"),
    (CHAT, {"temprature": 1}, 400, "did you mean 'temperature'?"),
    (CHAT, {"tools": [{"type": "function"}]}, 400, "tools is not supported"),
    (CHAT, {"response_format": {"type": "json_object"}}, 400, "response_format is not supported"),
    (TEXT, {"prompt": None}, 400, "prompt"),
    (TEXT, {"prompt": []}, 400, "prompt"),
    (TEXT, {"prompt": ""}, 400, "nothing to continue"),
    (TEXT, {"prompt": [10**6]}, 400, "token 1000000 is not in the vocabulary"),
    (TEXT, {"prompt": [-1]}, 400, "prompt"),
    (TEXT, {"prompt": [[1], []]}, 400, "prompt"),
    (TEXT, {"prompt": ["a"] * 65}, 400, "prompt"),
    (TEXT, {"prompt": ["a"] * 9}, 400, "9 prompts"),
    (TEXT, {"prompt": ["a", 3]}, 400, "prompt"),
    (TEXT, {"logprobs": 6}, 400, "logprobs:"),
    (TEXT, {"echo": True}, 400, "echo is not supported"),
    ("predict", {"task": "ghost"}, 400, "the run has no task 'ghost'"),
    ("predict", {"task": "later"}, 400, "its head is untrained"),
    ("predict", {"rows": []}, 400, "rows:"),
    ("predict", {"rows": [{"text": 3.5}]}, 400, "row 1:"),
    ("predict", {"rows": [{"txt": "a"}]}, 400, "row 1: has no 'text'"),
    ("predict", {"rows": "a"}, 400, "rows:"),
    ("predict", {"model": "nobody"}, 404, "there is no model"),
]
GOOD = {
    CHAT: {"model": "champion", "messages": ASKED},
    TEXT: {"model": "champion", "prompt": "the film"},
    "predict": {"model": "champion", "task": "topic", "rows": [{"text": "a film"}]},
}


@pytest.mark.parametrize("number", range(len(MALFORMED)))
def test_malformed_requests_get_a_status_and_one_line(http, number):
    path, body, status, words = MALFORMED[number]
    content = body if isinstance(body, bytes) else json.dumps((GOOD[path] if body else {}) | body).encode()
    response = http.post(f"/v1/{path}", content=content, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, words in error["message"]) == (status, True), response.text
    assert "\n" not in error["message"] and len(error["message"]) < 400
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


def test_the_server_lives_after_all_of_them(http, service):
    assert _chat(http, max_tokens=3)["usage"]["completion_tokens"] <= 3
    assert http.get("/health").status_code == 200
    assert all(loaded.users == 0 for loaded in service.catalogue._loaded.values()), "a refusal lets go of its adapter"


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)])
def test_other_paths_and_methods_are_answered_as_errors_too(http, method, path, status):
    response = http.request(method, path)
    assert response.status_code == status and path in response.json()["error"]["message"]


# -- state, token, load
def test_ready_says_what_serves_and_metrics_count(http):
    ready = http.get("/ready")
    assert ready.status_code == 200 and ready.json()["serving"]["champion"]["version"] == 1
    _complete(http, max_tokens=2)
    assert http.post("/v1/completions", json={"model": "nobody", "prompt": "a"}).status_code == 404
    ended = time.monotonic() + 10
    while "curlora_rows_running 0.0" not in (text := http.get("/metrics").text):
        assert time.monotonic() < ended, "the row has ended"
        time.sleep(0.05)
    assert 'curlora_alias_version{alias="champion"} 1.0' in text
    assert "curlora_first_token_seconds_count" in text
    assert re.search(r'curlora_tokens_total\{adapter="models:/served/1",kind="completion"\} [1-9]', text)
    assert 'status="404"' in text and 'asked="unknown"' in text


def test_without_its_token_nothing_is_told(service):
    service.token = token_digest(TOKEN)
    try:
        with TestClient(make_app(service)) as http:
            for headers in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": TOKEN},
                {"Authorization": "Bearer é"},
            ):
                encoded = {name: value.encode() for name, value in headers.items()}
                for path in ("/v1/models", "/metrics"):
                    refused = http.get(path, headers=encoded)
                    assert refused.status_code == 401 and "bearer token" in refused.json()["error"]["message"]
                assert http.post("/v1/completions", content=b"{", headers=encoded).status_code == 401
            assert http.get("/health").status_code == http.get("/ready").status_code == 200
            right = {"Authorization": f"Bearer {TOKEN}"}
            assert http.get("/v1/models", headers=right).status_code == 200
    finally:
        service.token = None


def test_a_full_server_says_so_and_a_late_answer_too(plan):
    from dataclasses import replace

    tight = plan.settings.model_copy(update={"batch_rows": 1, "queue": 1, "timeout": 3.0, "max_new_tokens": 48})
    service = Service(replace(plan, settings=tight))
    release = threading.Event()
    with TestClient(make_app(service)) as http:
        blocked = service.engine.call(lambda: release.wait(60))  # as a long forward pass would
        body = {"model": "champion", "prompt": "the film", "max_tokens": 4}
        found, scored = [], []

        def ask(path: str, body: dict, told: list) -> threading.Thread:
            return threading.Thread(target=lambda: told.append(http.post(f"/v1/{path}", json=body)))

        threads = [ask(TEXT, body, found) for _ in range(4)] + [
            ask("predict", GOOD["predict"], scored) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 60
        while (len(found) < 3 or len(scored) < 2) and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(3.1)  # the two that were taken are late now
        release.set()
        blocked.result()
        for thread in threads:
            thread.join()
        busy = [response for response in found if response.status_code == 429]
        late = [response for response in found if response.status_code == 504]
        assert len(busy) == 3 and len(late) == 1
        assert busy[0].headers["retry-after"] == "1" and "try again" in busy[0].json()["error"]["message"]
        assert "serve.timeout" in late[0].json()["error"]["message"]
        assert sorted(response.status_code for response in scored) == [429, 429, 504]
        assert _complete(http, max_tokens=4)["choices"]
        assert service.drain(5)
        refused = http.post("/v1/completions", json=body)
        assert refused.status_code == 503 and http.get("/ready").json()["status"] == "draining"
        assert http.post("/v1/predict", json=GOOD["predict"]).status_code == 503
    service.close()


def test_without_a_champion_that_loads_the_server_is_not_ready(plan, runs, client, store, tmp_path):
    import shutil
    from dataclasses import replace

    shutil.copytree(runs["two"].uri, tmp_path / "two")
    register(client, "broken", type(runs["two"])(str(tmp_path / "two")), "champion")
    shutil.rmtree(tmp_path / "two")
    service = Service(replace(plan, registry=(store, "broken")))
    with TestClient(make_app(service)) as http:
        ready = http.get("/ready")
        assert ready.status_code == 503 and ready.json()["failing"]["champion"]["version"] == 1
        refused = http.post("/v1/completions", json=GOOD[TEXT])
        assert refused.status_code == 503 and "version 1 does not load" in refused.json()["error"]["message"]
        assert _complete(http, model="base")["choices"]
        assert 'curlora_alias_failing_version{alias="champion"} 1.0' in http.get("/metrics").text
    service.close()
