"""What a step tells during training reaches MLflow while it trains, once, and with the moments it happened at."""

import time
from dataclasses import replace

import pytest
import torch
from sample_run import make_run
from test_lineage import everything, history

from pipelines.lineage import background
from pipelines.lineage import store as mlflow_store
from pipelines.lineage.background import Projector
from pipelines.lineage.projection import Projection, project
from pipelines.runs.directory import RunDirectory
from pipelines.runs.identity import live_folder
from pipelines.runs.live import MOST_SAMPLES, PART, LiveStep, read_curve, read_live, write_curve, write_live
from pipelines.workers import live_feed
from pipelines.workers.live_feed import LiveFeed
from tests.unit.sample_records import step_record

CPU = torch.device("cpu")
TASKS = ("mrpc", "sst2")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    mlflow_store.initialize(uri)
    return uri


@pytest.fixture
def client(store):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=store)


def tell(run: RunDirectory, upto: int, of: RunDirectory | None = None) -> str:
    """Write what the second step of a finished run (`of`) told after so many steps; returns its fingerprint."""
    of = of or run
    record = of.metrics(of.results().steps[1].directory)
    series = {key: [row for row in rows if row[0] <= upto] for key, rows in record.training.series.items()}
    step = replace(record, cells=(), training=None, files=None, data=None, finished=record.started)
    folder = live_folder(record.fingerprint)
    write_curve(run, folder, [point for point in record.curve if point[0] <= upto], 0)
    write_live(run, folder, LiveStep(step, series))
    return record.fingerprint


def hide(run: RunDirectory) -> bytes:
    """Take back that the second step is finished; returns its record."""
    path = f"{run.results().steps[1].directory}/metrics.json"
    content = run.read_bytes(path)
    run.remove(path)
    return content


def test_curves_of_a_step_move_while_it_trains_and_end_as_if_sent_at_the_end(tmp_path, store, client):
    run, whole = make_run(tmp_path, tasks=TASKS), make_run(tmp_path / "whole", tasks=TASKS)
    chain = [step.fingerprint for step in run.results().steps]
    finished, results = hide(run), run.read_bytes("results.json")
    run.remove("results.json")
    projection = Projection(run, store, "moving")
    for upto in (10, 12, 31):
        name = tell(run, upto, whole)
        projection.send_live(chain)
        run_id = projection._known.children[name]
        assert [step for step, _ in history(client, run_id, "train/loss")] == list(range(1, upto + 1))
        assert [step for step, _ in history(client, run_id, "train/tokens_per_second")] == list(range(5, upto + 1, 5))
    child = client.get_run(run_id)
    assert child.info.status == "RUNNING"
    assert child.data.params["training.learning_rate"] == "0.003"
    assert projection.send(chain).keys() == {"parent", chain[0]}
    run.write_bytes(f"{whole.results().steps[1].directory}/metrics.json", finished)
    run.write_bytes("results.json", results)
    run.remove("live")
    live = projection.send(chain)
    assert live[name] == run_id
    at_end = project(run, store, "at the end")
    contents = [everything(client, experiment) for experiment in ("moving", "at the end")]
    pair = [contents[0][live[name]], contents[1][at_end[name]]]
    for content in pair:
        content["tags"].pop("mlflow.parentRunId")
    assert pair[0] == pair[1]


@pytest.mark.parametrize(("status", "expected"), [("failed", "FAILED"), ("stopped", "RUNNING")])
def test_a_step_that_is_not_finished_fails_with_its_chain_and_waits_otherwise(
    tmp_path, store, client, status, expected
):
    run = make_run(tmp_path, name=status, tasks=TASKS)
    chain = [step.fingerprint for step in run.results().steps]
    name = tell(run, 10)
    hide(run)
    run.write_json("results.json", replace(run.results(), status=status))
    projection = Projection(run, store, status)
    projection.send(chain)
    assert client.get_run(projection._known.children[name]).info.status == expected
    projection.send(chain[:1])  # the configuration has changed
    assert client.get_run(projection._known.children[name]).info.status == "KILLED"


def test_the_driver_sends_it_by_itself(tmp_path, store, client, monkeypatch):
    monkeypatch.setattr(background, "LIVE_SECONDS", 0.05)
    run = make_run(tmp_path, name="alone", tasks=TASKS)
    config = run.config()
    tracking = config.tracking.model_copy(update={"uri": store, "experiment": "alone"})
    chain = [step.fingerprint for step in run.results().steps]
    name = tell(run, 10)
    hide(run)
    run.write_json("results.json", replace(run.results(), status="running"))
    projector = Projector(run, config.model_copy(update={"tracking": tracking}), chain)
    projector._pause = 0.05
    projector.notify()
    deadline = time.monotonic() + 60

    def points() -> int:
        found = client.get_experiment_by_name("alone")
        runs = (
            client.search_runs([found.experiment_id], f"tags.`curlora.step_fingerprint` = '{name}'") if found else []
        )
        return len(client.get_metric_history(runs[0].info.run_id, "train/loss")) if runs else 0

    while points() < 10:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    tell(run, 20, make_run(tmp_path / "whole", name="alone", tasks=TASKS))
    while points() < 20:  # without another `notify`
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert projector.finish().warning is None


# -- on the worker
def feed_of(run: RunDirectory) -> LiveFeed:
    return LiveFeed(run, "live/12345678", step_record("12345678abcdef", ("mrpc",)), CPU)


def test_a_worker_writes_curve_speed_and_load_while_it_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(live_feed, "WRITE_SECONDS", 0.02)
    run, points = RunDirectory(str(tmp_path)), []
    feed = feed_of(run)
    feed.curve, feed.tokens = lambda: points, lambda: 100 * len(points)
    with feed.running():
        for step in range(1, 40):
            points.append([step, 1.0 / step, 1e-3, 1000.0 + step])
            time.sleep(0.005)
        while not read_curve(run, "live/12345678"):
            time.sleep(0.01)
    assert read_curve(run, "live/12345678") == points
    series = read_live(run, "live/12345678").series
    assert series["train/tokens_per_second"][0][1] > 0
    assert 0 < series["system/system_memory_usage_percentage"][-1][1] < 100
    assert set(series) >= {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"}


def test_steps_trained_again_keep_the_moments_that_were_told(tmp_path):
    run = RunDirectory(str(tmp_path))
    first = feed_of(run)
    first.curve = lambda: [[step, 0.5, 1e-3, 1000.0 + step] for step in range(1, 31)]
    first._counted = (0.0, 0)
    first._measure()
    first._write()
    again = feed_of(run)
    assert again.moments == {step: 1000.0 + step for step in range(1, 31)}
    assert again.series == first.series
    again.curve = lambda: [[step, 0.5, 1e-3, 1000.0 + step] for step in range(1, 11)]  # from an earlier checkpoint
    again._write()
    assert len(feed_of(run).moments) == 30  # a third process knows them as well


def test_a_long_curve_is_written_in_parts_of_which_only_the_last_one_changes(tmp_path):
    run = RunDirectory(str(tmp_path))
    points = [[step, 0.0, 0.0, float(step)] for step in range(1, 2 * PART + 5)]
    write_curve(run, "live/a", points, 0)
    assert len(run.list("live/a")) == 3
    run.write_json(f"live/a/curve-{1:09d}.json", [])  # whoever reads or writes it again would notice
    write_curve(run, "live/a", points, 2 * PART + 2)
    assert read_curve(run, "live/a", PART) == points[PART:]
    assert len(read_curve(run, "live/a")) == PART + 4


def test_measurements_stay_few_however_long_a_step_trains(tmp_path):
    feed = feed_of(RunDirectory(str(tmp_path)))
    feed.curve = lambda: [[7, 0.0, 0.0, 0.0]]
    feed._counted = (0.0, 0)
    pause = feed._pause
    for _ in range(MOST_SAMPLES + 1):
        feed._measure()
    lengths = {len(rows) for rows in feed.series.values()}
    assert lengths == {MOST_SAMPLES // 2 + 1}
    assert feed._pause == 2 * pause
