"""A chain as jobs on a real Ray head with token authentication: sent, followed, killed, resumed, cancelled."""

import json

import pytest

from tests.bench import wait_for
from tests.cluster.head import REPOSITORY, Head


@pytest.fixture
def config(bench):
    return bench.config(
        "job",
        storage=str(bench.root / "runs"),
        tasks=bench.raw["tasks"][2:],
        training=bench.raw["training"] | {"max_steps": 300},
        resources={"workers": 1},
        durability={"checkpoint_seconds": 0.5},
    )


def test_without_the_token_nothing_is_accepted(head, config, tmp_path):
    (tmp_path / "wrong").write_text("0" * 64)
    for path in (tmp_path / "wrong", tmp_path / "none"):
        environment = head.environment | {"RAY_AUTH_TOKEN_PATH": str(path)}
        refused = head.curlora("submit", str(config), env=environment)
        assert refused.returncode == 1
        assert "rejects the request: no valid token" in refused.stderr
        assert head.ray("job", "list", env=environment, check=False).returncode != 0


def test_a_job_is_sent_once_resumes_after_a_kill_and_after_a_cancellation(head, config, bench):
    directory = bench.directory("job")
    first = head.curlora("submit", str(config), "--detach")
    assert first.returncode == 0, first.stderr
    assert "submitted" in first.stderr
    assert "is already running" in head.curlora("submit", str(config), "--detach").stderr
    kill_driver(head, directory)
    wait_for(lambda: statuses(head) == ["FAILED"])

    assert "-2: submitted" in head.curlora("submit", str(config), "--detach").stderr  # a new attempt
    events = wait_for(lambda: [event for event in events_of(directory) if event["kind"] == "resumed"])
    assert events[0]["step"] > 0
    wait_for(lambda: len([e for e in events_of(directory) if e["kind"] == "segment_started"]) > 1)
    cancelled = head.curlora("cancel", "job", "--wait", "90")
    assert cancelled.returncode == 2  # that is the run, which is not in this folder's ./runs
    cancelled = head.curlora("cancel", "job", "--wait", "90", "--address", head.address)
    assert "-2: stopped" in cancelled.stdout, cancelled.stderr
    assert json.loads((directory / "results.json").read_text())["status"] == "stopped"

    # the third way in, which knows nothing of `curlora submit`, goes on from the checkpoint too
    plain = head.ray(
        "job", "submit", "--working-dir", ".", "--", "python", "-m", "pipelines", "run", str(config), cwd=REPOSITORY
    )
    assert "task 1/1 text done" in plain.stdout, plain.stdout
    results = json.loads((directory / "results.json").read_text())
    assert results["status"] == "finished"
    resumed = bench.metrics(results, 0)["training"]["resumed_at"]
    assert len(resumed) == 2
    assert 0 < resumed[0] <= resumed[1]

    followed = head.curlora("submit", str(config))
    assert followed.returncode == 0, followed.stderr
    assert "Everything is done already" in followed.stdout


def test_a_job_ends_with_the_exit_status_of_its_chain(head, config, bench):
    bad = bench.config("bad", storage=str(bench.root / "runs"), base_model={"path": "/nowhere"})
    followed = head.curlora("submit", str(bad))
    assert followed.returncode == 2
    assert "base_model.path: '/nowhere'" in followed.stdout


def kill_driver(head: Head, directory) -> None:
    """SIGKILL, when there is a checkpoint to go on from."""
    wait_for(lambda: list(directory.glob("train/*/*.safetensors")))
    drivers = [p for p in head.processes("pipelines run") if p.name().startswith("python")]
    assert drivers
    for process in drivers:
        process.kill()


def statuses(head: Head) -> list[str]:
    found = head.curlora("status", "job", "--address", head.address, "--json")
    return [job["status"] for job in json.loads(found.stdout)]


def events_of(directory) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(directory.glob("events/*.json"))]
