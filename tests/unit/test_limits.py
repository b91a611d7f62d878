"""MLflow servers with limits: what fits is sent, the rest is an artifact, and one line says so.

The server is MLflow's own store behind a plugin that refuses what managed servers refuse.
"""

import json

import pytest
from sample_run import make_run

from pipelines.lineage.limits import as_many_as_fit
from pipelines.lineage.projection import Projection
from pipelines.promotion.publish import sync
from pipelines.runs.directory import RunDirectory

PER_RUN, PER_REQUEST = 20, 7


@pytest.fixture(scope="module")
def capped(tmp_path_factory) -> str:
    """URI of a store that takes `PER_RUN` parameters per run and `PER_REQUEST` items per request."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from mlflow.tracking._tracking_service.utils import _tracking_store_registry

    folder = tmp_path_factory.mktemp("capped")

    class CappedStore(SqlAlchemyStore):
        def log_batch(self, run_id, metrics, params, tags):
            stored = len(self.get_run(run_id).data.params) if params else 0
            if max(map(len, (metrics, params, tags))) > PER_REQUEST or stored + len(params) > PER_RUN:
                raise MlflowException("limit exceeded", INVALID_PARAMETER_VALUE)
            super().log_batch(run_id, metrics, params, tags)

    def make(store_uri=None, artifact_uri=None):
        return CappedStore(f"sqlite:///{folder}/mlflow.db", (folder / "artifacts").as_uri())

    _tracking_store_registry.register("capped", make)
    return "capped://store"


def artifact(client, run_id: str, tmp_path) -> dict:
    return json.loads(open(client.download_artifacts(run_id, "parameters.json", str(tmp_path))).read())


def test_what_fits_is_sent_and_the_rest_is_an_artifact(tmp_path, capped):
    from mlflow import MlflowClient

    run, client = make_run(tmp_path / "run"), MlflowClient(tracking_uri=capped)
    projection = Projection(run, capped, "capped")
    sent = projection.send_all()
    assert sent.complete
    parent = client.get_run(sent.runs["parent"])
    child = client.get_run(sent.runs[run.results().steps[0].fingerprint])
    for found in (parent, child):
        everything = artifact(client, found.info.run_id, tmp_path)
        assert len(found.data.params) == PER_RUN < len(everything)
        assert found.data.params.items() <= everything.items()
    assert "base_model.path" in parent.data.params  # the first sections of a configuration matter most
    assert "training.learning_rate" in child.data.params
    assert child.data.metrics["train/loss"] == run.metrics(run.results().steps[0].directory).curve[-1][1]
    assert "takes no more parameters, 4 runs have" in sent.note
    history = client.get_metric_history(child.info.run_id, "train/loss")
    again = Projection(RunDirectory(run.uri), capped, "capped").send_all()  # another process
    assert again.runs == sent.runs
    assert again.note is None
    assert client.get_metric_history(child.info.run_id, "train/loss") == history


def test_a_limit_fails_no_sync(tmp_path, capped):
    run, notes = make_run(tmp_path, tasks=("mrpc",)), []
    _, _, warnings = sync(run, capped, notes.append)
    assert warnings == []
    assert len(notes) == 1


def refusing(limit: int, most: int = 10**6, bad=()):
    """A server with room for `limit` items and `most` per request, that takes none of `bad`; and what it has."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_LIMIT_EXCEEDED

    stored = []

    def send(batch):
        if len(batch) > most or len(stored) + len(batch) > limit or set(batch) & set(bad):
            raise MlflowException("no", RESOURCE_LIMIT_EXCEEDED)
        stored.extend(batch)

    return send, stored


@pytest.mark.parametrize(("limit", "most"), [(1000, 1000), (1000, 3), (200, 1000), (123, 10), (0, 5), (1, 1)])
def test_as_many_are_sent_as_there_is_room_for(limit, most):
    send, stored = refusing(limit, most)
    items = list(range(260))
    left = as_many_as_fit(send, items, 100)
    assert stored == items[:limit]
    assert left == items[limit:]


def test_an_item_that_is_refused_by_itself_holds_up_no_other():
    send, stored = refusing(1000, bad=[31])
    assert as_many_as_fit(send, list(range(90)), 50) == [31]
    assert stored == [i for i in range(90) if i != 31]


def test_any_other_error_is_raised():
    from mlflow.exceptions import MlflowException

    def send(batch):
        raise MlflowException("the database is gone")

    with pytest.raises(MlflowException, match="gone"):
        as_many_as_fit(send, [1, 2], 2)
