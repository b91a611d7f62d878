"""A trial that is scored in the middle trains the same bits as one that is not: its adapter can be taken over."""

import pytest

from tests.integration.zero import launch, tiny_base

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    path = tmp_path_factory.mktemp("rungs")
    return launch("search_zero_worker.py", 2, "2,3", tiny_base(path / "base"), path / "out")


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_scores_at_rungs_leave_no_trace_in_what_is_trained(ranks, stage):
    for rank in ranks:
        (plain, none), (scored, scores) = rank[stage]["plain"], rank[stage]["scored"]
        assert none == []
        assert len(scores) == 2 and scores[0] != scores[1]
        assert scored == plain
    assert ranks[0][stage]["scored"] == ranks[1][stage]["scored"]
