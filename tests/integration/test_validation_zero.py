"""Validation and early stopping on two real processes under ZeRO-2, with every kind of strategy state.

Under ZeRO-3 the preflight refuses it with several workers, because it fails here.
"""

import pytest

from tests.integration.zero import launch, tiny_base

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
STEPS = 12
CASES = ("ilora", "replay", "rehearsal", "ewc", "curvature")
PAIRS = [("zero2", name) for name in CASES]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    path = tmp_path_factory.mktemp("validation")
    return launch("validation_zero_worker.py", 2, "2", tiny_base(path / "base"), path / "out")


@pytest.mark.parametrize(("stage", "name"), PAIRS)
def test_an_interruption_changes_no_bit_of_what_an_early_stop_keeps(ranks, stage, name):
    found = dict(ranks[0][stage][name])
    whole = found.pop("whole")
    stopped = whole["losses"][-1][0] < STEPS
    assert stopped or name not in ("ilora", "rehearsal"), "the loss of the others may fall to the end"
    assert [step for step, _ in whole["losses"]] == list(range(2, whole["losses"][-1][0] + 1, 2))
    step, loss = whole["best"]
    assert [step, loss] == min(whole["losses"], key=lambda point: point[1])
    assert not stopped or step == whole["losses"][-3][0], "two validations without a lower loss came after it"
    assert found
    for stop, again in found.items():
        assert f"stopped after {again['resumed_at']}" == stop
        assert again | {"resumed_at": None} == whole


@pytest.mark.parametrize(("stage", "name"), PAIRS)
def test_ranks_keep_the_same_state(ranks, stage, name):
    assert ranks[0][stage][name] == ranks[1][stage][name]


@pytest.mark.parametrize(("stage", "name"), PAIRS)
def test_what_is_kept_has_the_lowest_loss(ranks, stage, name):
    whole = ranks[0][stage][name]["whole"]
    assert whole["loss of what is kept"] == whole["best"][1]
