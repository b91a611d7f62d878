"""Fixtures of the unit tests that look into MLflow."""

import pytest


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """One store for all tests of a file: the first migration of a sqlite file takes seconds."""
    from pipelines.lineage.store import initialize

    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    initialize(uri)
    return uri


@pytest.fixture(scope="module")
def client(store):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=store)
