"""The run directory: whole files, a step is done when metrics.json is there, one driver at a time."""

import json
import subprocess
import sys
import threading
import time

import fsspec
import pytest

from pipelines.config.loading import parse_config
from pipelines.errors import LeaseHeld, RunDirectoryError
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import fingerprint
from pipelines.runs.lease import acquire_lease, driver_of
from pipelines.runs.step_record import PublishedFile
from tests.conftest import minimal
from tests.unit.sample_records import step_record


@pytest.fixture(params=["local", "memory"])
def run(request, tmp_path):
    if request.param == "local":
        return RunDirectory(str(tmp_path / "store" / "run"))
    fsspec.filesystem("memory").store.clear()
    return RunDirectory("memory://store/run")


def test_a_step_is_done_when_its_metrics_are_there(run, tmp_path):
    (tmp_path / "up" / "adapter").mkdir(parents=True)
    (tmp_path / "up" / "adapter" / "weights").write_bytes(b"123")
    run.upload(tmp_path / "up", "steps/1-a-00000000")
    assert run.finished_steps() == {}
    run.write_json("steps/1-a-00000000/metrics.json", step_record("f", ("a",)))
    assert run.finished_steps() == {"f": "steps/1-a-00000000"}
    local = run.download("steps/1-a-00000000", tmp_path / "down")
    assert (local / "adapter" / "weights").read_bytes() == b"123"


def test_events_come_back_in_order_and_only_unknown_ones(run):
    for number in range(5):
        run.event("tick", number=number)
        time.sleep(0.001)
    names = [name for name, _ in run.events()]
    assert [event.other["number"] for _, event in run.events()] == list(range(5))
    assert [event.other["number"] for _, event in run.events(names[:3])] == [3, 4]


def test_an_event_is_read_once(run, monkeypatch):
    run.event("tick", number=0)
    first = list(run.events())
    run.event("tick", number=1)
    reads = []
    read = run.read_bytes
    monkeypatch.setattr(run, "read_bytes", lambda path: (reads.append(path), read(path))[1])
    assert list(run.events())[:1] == first
    assert len(reads) == 1


def test_events_after_the_clock_was_set_back_are_seen(run, monkeypatch):
    run.event("tick", number=0)
    known = {name for name, _ in run.events()}
    past = time.time() - 3600
    monkeypatch.setattr(time, "time", lambda: past)
    run.event("tick", number=1)
    assert [event.other["number"] for _, event in run.events(known)] == [1]


def test_nothing_half_written_is_left_when_a_write_fails(tmp_path, monkeypatch):
    run = RunDirectory(str(tmp_path / "run"))
    run.write_json("results.json", {"old": True})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        run.write_json("results.json", {"old": False})
    assert run.read_json("results.json") == {"old": True}
    assert run.list("") == ["results.json"]


def test_nan_never_enters_a_json_file(run):
    with pytest.raises(ValueError, match="JSON"):
        run.write_json("results.json", {"x": float("nan")})


def test_second_driver_is_refused_while_the_first_lives(run):
    with acquire_lease(run), pytest.raises(LeaseHeld, match="process"):
        acquire_lease(run)
    acquire_lease(run).release()


def test_lease_of_a_dead_process_is_taken_at_once(tmp_path):
    code = (
        "import os, sys; from pipelines.runs.directory import RunDirectory\n"
        "from pipelines.runs.lease import acquire_lease\n"
        "acquire_lease(RunDirectory(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=False)
    run = RunDirectory(str(tmp_path / "run"))
    assert run.read_json("lease.json")["pid"]
    assert driver_of(run) is None
    acquire_lease(run).release()


FOREIGN = {"token": "t", "host": "elsewhere", "pid": 1, "started": 0.0, "beats": 7, "time": 0.0}


def test_lease_of_another_host_is_taken_after_silence_whatever_the_clocks_say(run, monkeypatch):
    monkeypatch.setattr("pipelines.runs.lease.LEASE_SECONDS", 0.6)
    for moment in (0.0, time.time(), time.time() + 1e6):
        run.write_json("lease.json", FOREIGN | {"time": moment})
        lease = acquire_lease(run)
        assert run.read_json("lease.json")["token"] == lease.token
        lease.release()


def test_lease_of_another_host_that_beats_is_respected(run):
    run.write_json("lease.json", FOREIGN)
    timer = threading.Timer(0.3, lambda: run.write_json("lease.json", FOREIGN | {"beats": 8}))
    timer.start()
    with pytest.raises(LeaseHeld, match="elsewhere"):
        acquire_lease(run)


def test_a_driver_whose_lease_was_taken_notices(run, monkeypatch):
    monkeypatch.setattr("pipelines.runs.lease.BEAT_SECONDS", 0.05)
    lease = acquire_lease(run)
    run.write_json("lease.json", FOREIGN)
    lease._thread.join(timeout=5)
    assert lease.lost
    lease.release()
    assert run.read_json("lease.json") == FOREIGN


def test_damaged_files_are_found_by_size(run):
    run.write_bytes("steps/1-a-00000000/adapter/weights", b"123")
    files = {"adapter/weights": PublishedFile(3), "heads.safetensors": PublishedFile(1)}
    assert run.damaged_files("steps/1-a-00000000", files) == ["heads.safetensors"]
    run.write_bytes("steps/1-a-00000000/adapter/weights", b"12")
    assert run.damaged_files("steps/1-a-00000000", files) == ["adapter/weights", "heads.safetensors"]


def test_a_request_to_stop_is_read_and_taken_back(run):
    assert run.stop_requested() is None
    run.request_stop("because")
    assert run.stop_requested() == "because"
    run.remove("stop.json")
    assert run.stop_requested() is None
    run.remove("stop.json")  # nothing happens


def test_storage_that_cannot_be_written_is_named_with_a_remedy(tmp_path):
    (tmp_path / "file").write_text("no folder")
    run = RunDirectory(str(tmp_path / "file" / "run"))
    with pytest.raises(RunDirectoryError, match=r"storage: .*file/run is not writable .*choose another storage"):
        run.open_for_writing(parse_config(minimal(tmp_path, tmp_path)))
    with pytest.raises(RunDirectoryError, match=r"file/run is not writable"):
        acquire_lease(run)


def test_other_format_is_recognised(tmp_path):
    config = parse_config(minimal(tmp_path, tmp_path))
    run = RunDirectory(config.run_uri)
    run.write_json("format.json", {"format": 99})
    with pytest.raises(RunDirectoryError, match="format 99"):
        run.open_for_writing(config)


def test_configuration_comes_back_as_it_was(tmp_path):
    config = parse_config(minimal(tmp_path, tmp_path))
    run = RunDirectory(config.run_uri)
    run.open_for_writing(config)
    assert run.config() == config


def test_fingerprint_ignores_key_order_but_not_values():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint(json.loads('{"b": [1, 2], "a": 1}'))
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert len(fingerprint({})) <= 36
