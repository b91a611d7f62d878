"""One Ray head for all tests that send jobs."""

import pytest

from tests.cluster.head import Head


@pytest.fixture(scope="session")
def head(tmp_path_factory):
    head = Head.start(tmp_path_factory.mktemp("head"))
    yield head
    head.stop()
