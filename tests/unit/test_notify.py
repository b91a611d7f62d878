"""Messages to the outside: to a real HTTP server and a real command, once per event, with no secret in any file."""

from __future__ import annotations

import http.server
import json
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from sample_run import make_run

from pipelines.config.loading import parse_config
from pipelines.config.notify import NotifyConfig
from pipelines.errors import ConfigError, RunFailed, RunStopped
from pipelines.notify.outbox import begin, post, waiting
from pipelines.notify.sender import Sender, telling
from pipelines.preflight.tools import notify_problems
from pipelines.promotion.promotion import restore
from pipelines.promotion.publish import sync
from pipelines.runs.directory import RunDirectory
from tests.conftest import minimal

SECRET = "s3cr3t-of-the-test"


class Receiver:
    """An HTTP server on loopback; `statuses` are its next answers, after them 200. A status of 0: no answer."""

    def __init__(self):
        self.got, self.statuses, self.heard, self.release = [], [], threading.Event(), threading.Event()
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = receiver.statuses.pop(0) if receiver.statuses else 200
                receiver.got.append((status, self.path, dict(self.headers), json.loads(body)))
                receiver.heard.set()
                if status == 0:
                    receiver.release.wait(20)
                    return
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def accepted(self) -> list[dict]:
        return [message for status, _, _, message in self.got if status == 200]


@pytest.fixture
def receiver():
    server = Receiver()
    yield server
    server.release.set()
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def folder(tmp_path) -> RunDirectory:
    return RunDirectory(str(tmp_path / "run"))


def files(folder: RunDirectory) -> str:
    return "\n".join(p.read_text() + p.name for p in Path(folder.root).rglob("*") if p.is_file())


def test_a_message_is_delivered_once_with_its_token_and_leaves_no_secret(receiver, folder, monkeypatch):
    monkeypatch.setenv("HOOK", f"hooks/{SECRET}")
    monkeypatch.setenv("TOKEN", SECRET)
    notify = NotifyConfig(url=receiver.url + "/${HOOK}", token="TOKEN")
    post(folder, notify, "failure", [1], "it failed", run="a")
    for _ in range(2):  # the second is a resumed run
        post(folder, notify, "failure", [1], "it failed", run="a")
        assert Sender(folder, notify).finish() == []
    [(_, path, headers, message)] = receiver.got
    assert path == f"/hooks/{SECRET}" and headers["Authorization"] == f"Bearer {SECRET}"
    assert headers["Idempotency-Key"] == message["id"] and headers["Content-Type"] == "application/json"
    assert (message["event"], message["text"], message["run"]) == ("failure", "it failed", "a")
    assert "delivered" in files(folder) and SECRET not in files(folder)


def test_refused_attempts_are_repeated_with_pauses(receiver, folder):
    receiver.statuses = [503, 500]
    notify = NotifyConfig(url=receiver.url)
    post(folder, notify, "drift", [1], "it drifts")
    begun = time.monotonic()
    assert Sender(folder, notify).finish() == []
    assert time.monotonic() - begun >= 3  # 1 s, then 2 s
    assert [status for status, *_ in receiver.got] == [503, 500, 200]


def test_what_was_not_delivered_is_tried_again_by_the_next_process(receiver, folder):
    notify = NotifyConfig(url=receiver.url, attempts=1)
    receiver.statuses = [500, 302]
    post(folder, notify, "failure", [1], "it failed")
    for reason in ("HTTP 500", "HTTP 302"):  # a redirect is not followed
        assert reason in Sender(folder, notify).finish()[0]
    assert Sender(folder, notify).finish() == []
    assert len(receiver.got) == 3 and len(receiver.accepted()) == 1


def test_a_receiver_that_is_away_delays_no_work_and_a_bounded_end(folder):
    notify = NotifyConfig(url="http://127.0.0.1:9", wait=0.1)
    post(folder, notify, "failure", [1], "it failed")
    begun = time.monotonic()
    sender = Sender(folder, notify)
    sender.start()
    assert "not delivered" in sender.finish()[0]
    assert time.monotonic() - begun < 10  # not the 15 s of all attempts
    assert waiting(folder)


def test_a_request_without_an_answer_is_not_repeated(receiver, folder):
    receiver.statuses = [0]
    notify = NotifyConfig(url=receiver.url, timeout=0.2)
    post(folder, notify, "failure", [1], "it failed")
    assert "not sent twice" in Sender(folder, notify).finish()[0]
    assert Sender(folder, notify).finish() == []
    assert len(receiver.got) == 1


def test_a_process_killed_while_it_sends_sends_nothing_twice(receiver, folder):
    receiver.statuses = [0]
    notify = NotifyConfig(url=receiver.url)
    post(folder, notify, "failure", [1], "it failed")
    code = f"""
        from pipelines.config.notify import NotifyConfig
        from pipelines.notify.sender import Sender
        from pipelines.runs.directory import RunDirectory
        Sender(RunDirectory({folder.uri!r}), NotifyConfig(url={receiver.url!r})).finish()
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    assert receiver.heard.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert Sender(folder, notify).finish() == []
    assert len(receiver.got) == 1


def test_of_two_processes_one_makes_an_attempt(folder):
    notify = NotifyConfig(command=["true"])
    post(folder, notify, "failure", [1], "it failed")
    [attempt] = waiting(folder)
    assert begin(folder, attempt)["text"] == "it failed"
    assert begin(folder, attempt) is None and waiting(folder) == []


def test_an_attempt_is_claimed_once_in_an_object_store(bucket):
    folder = RunDirectory("s3://tasks/claims")
    assert folder.create("notify/a.1.begun", b"1")
    assert not folder.create("notify/a.1.begun", b"2")


def test_a_command_reads_the_message_and_its_failure_is_repeated(folder, tmp_path):
    code = "import sys, pathlib; p = pathlib.Path(sys.argv[1]); n = len(list(p.iterdir())); "
    code += "(p / str(n)).write_text(sys.stdin.read()); sys.exit('not yet' if n == 0 else 0)"
    (tmp_path / "got").mkdir()
    notify = NotifyConfig(command=[sys.executable, "-c", code, str(tmp_path / "got")])
    post(folder, notify, "promotion", [1], "version 2 is the champion")
    assert Sender(folder, notify).finish() == []
    texts = [json.loads((tmp_path / "got" / name).read_text())["text"] for name in ("0", "1")]
    assert texts == ["version 2 is the champion"] * 2
    assert "exit code 1: not yet" in files(folder)


def test_a_command_that_hangs_is_ended_with_all_that_it_started(folder, tmp_path):
    late = tmp_path / "late"
    child = f"import time; time.sleep(2); open({str(late)!r}, 'w')"
    beat = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    notify = NotifyConfig(command=[sys.executable, "-c", beat], timeout=0.5)
    post(folder, notify, "drift", [1], "it drifts")
    assert "ended after 0.5 s" in Sender(folder, notify).finish()[0]
    time.sleep(2.5)
    assert not late.exists()


def test_only_the_events_that_are_asked_for_are_told(receiver, folder):
    notify = NotifyConfig(url=receiver.url, events=["promotion"])
    post(folder, notify, "failure", [1], "it failed")
    post(folder, None, "promotion", [1], "nobody asked")
    post(folder, notify, "promotion", [1], "promoted")
    Sender(folder, notify).finish()
    assert [message["text"] for message in receiver.accepted()] == ["promoted"]


@pytest.mark.parametrize(
    ("error", "told"), [(RunFailed("no room"), 1), (ZeroDivisionError("bug"), 1), (RunStopped("x"), 0)]
)
def test_a_run_that_fails_tells_and_one_that_is_stopped_does_not(receiver, tmp_path, error, told):
    run = make_run(tmp_path, tasks=("mrpc",), notify={"url": receiver.url})
    warned: list[str] = []
    for _ in range(2):  # a resumed run that fails again is another event
        with pytest.raises(type(error)), telling(run, run.config(), warned.append):
            raise error
    assert [m["text"] for m in receiver.accepted()] == [f"{run.name} failed: {error}"] * 2 * told
    assert warned == []


def test_verdict_and_promotion_are_told_once_however_often_the_run_is_sent(receiver, tmp_path, store):
    def made(name: str, drop: float):
        tracking = {"uri": store, "experiment": "told", "register_as": "told"}
        changes = {"tracking": tracking, "gate": {"max_forgetting": 0.05}, "notify": {"url": receiver.url}}
        return make_run(tmp_path, name=name, tasks=("mrpc", "sst2"), drop=drop, **changes)

    good, bad = made("good", 0.0), made("bad", 0.2)
    for run in (good, good, bad, bad):
        sync(run)
    for run in (good, bad):
        run.remove("published.json")  # as if the process had died before its last write
        sync(run)
    promoted, refused = receiver.accepted()
    assert (promoted["event"], promoted["uri"], promoted["run_uri"]) == ("promotion", "models:/told/1", good.uri)
    assert refused["event"] == "refusal" and "mrpc" in refused["reasons"][0] and refused["against"]["version"] == 1
    restore(bad, 1, reason="by hand")
    Sender(bad, bad.config().notify).finish()
    assert receiver.accepted()[-1]["why"] == "restored: by hand"


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({}, "notify: neither url nor command is set"),
        ({"url": "http://127.0.0.1/", "command": ["true"]}, "notify: url and command are both set"),
        ({"url": "ftp://example.org"}, "notify.url: is no http(s) address"),
        ({"url": "http://[half"}, "notify.url: is no http(s) address"),
        ({"url": f"https://me:{SECRET}@example.org"}, "notify.url: contains a name or password"),
        ({"url": "https://example.org", "token": f"xoxb-{SECRET}"}, "notify.token: is no name of an environment"),
        ({"url": "http://example.org", "token": "TOKEN"}, "notify: the token would be sent to url unencrypted"),
        ({"command": ["true"], "token": "TOKEN"}, "notify: token belongs to url"),
        ({"command": []}, "notify.command: found []"),
        ({"command": ["true"], "events": ["failed"]}, "found 'failed', did you mean 'failure'?"),
        ({"command": ["true"], "attempts": 0}, "notify.attempts: found 0"),
        ({"command": ["true"], "timout": 3}, "unknown key 'timout', did you mean 'timeout'?"),
    ],
)
def test_a_wrong_section_is_one_line_without_the_secret(tmp_path, section, said):
    with pytest.raises(ConfigError) as error:
        parse_config(minimal(tmp_path, tmp_path, notify=section))
    assert said in str(error.value) and len(str(error.value).splitlines()) == 1
    assert SECRET not in str(error.value)


def test_what_is_missing_in_the_environment_is_said_before_work_starts(tmp_path, monkeypatch):
    monkeypatch.delenv("CURLORA_NO_SUCH", raising=False)
    config = parse_config(minimal(tmp_path, tmp_path, notify={"url": "https://${CURLORA_NO_SUCH}"}))
    assert [str(p) for p in notify_problems(config)] == [
        "notify: the environment variable CURLORA_NO_SUCH is not set; set it where the chain is driven"
    ]
    config = parse_config(minimal(tmp_path, tmp_path, notify={"command": ["no-such-command"]}))
    assert "'no-such-command' is not found" in str(next(notify_problems(config)))
