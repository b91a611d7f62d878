"""Two real processes under ZeRO-2 and ZeRO-3 train, under every strategy, what one process trains."""

import pytest

from tests.integration.zero import launch, tiny_base

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
NAMES = (
    "replay",
    "replay of classes",
    "lwf of classes",
    "rehearsal",
    "rehearsal of classes",
    "ilora",
    "coma",
    "ewc",
    "curvature",
    "curvature of classes",
    "clora",
    "olora",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Stage → case → report of each rank; `one`: of a single process."""
    path = tmp_path_factory.mktemp("zero")
    base, worker = tiny_base(path / "base"), "strategies_zero_worker.py"
    one = launch(worker, 1, "2", base, path / "one")
    two = launch(worker, 2, "2,3", base, path / "two")
    return {"one": [one[0]["zero2"]]} | {stage: [rank[stage] for rank in two] for stage in ("zero2", "zero3")}


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_train_what_one_process_trains(runs, stage, name):
    one, first, second = runs["one"][0][name], runs[stage][0][name], runs[stage][1][name]
    assert first == second, "ranks agree, to the bit"
    for part in ("trained", "state"):
        assert first[part].keys() == one[part].keys()
        for key, values in one[part].items():
            # weights have the size of the learning rate; Fisher information is tiny
            weights = part == "trained" or key.startswith(("slow.", "fast.", "anchor."))
            assert values == pytest.approx(first[part][key], rel=2e-3, abs=2e-4 if weights else 1e-7)


OTHER = {"clora": "olora", "olora": "clora", "lwf of classes": "sequential of classes"}


@pytest.mark.parametrize("name", ["ilora", "coma", "lwf of classes", "ewc", "curvature", "clora", "olora"])
def test_a_penalty_changes_what_is_trained(runs, name):
    trained = {kind: runs["one"][0][kind]["trained"] for kind in runs["one"][0]}
    other = OTHER.get(name, "replay")
    difference = max(
        abs(a - b) for key in trained[name] for a, b in zip(trained[name][key], trained[other][key], strict=True)
    )
    assert difference > 5e-3
