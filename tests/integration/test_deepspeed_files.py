"""Users' DeepSpeed settings on two real processes: each trains what stage 0 trains, also from a checkpoint."""

import pytest

from tests.deepspeed_files import FILES
from tests.integration.zero import launch, tiny_base

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    path = tmp_path_factory.mktemp("files")
    names = sorted(FILES, key=lambda name: FILES[name]["zero_optimization"]["stage"])
    return launch("deepspeed_files_worker.py", 2, ",".join(names), tiny_base(path / "base"), path / "out")


@pytest.mark.parametrize("name", FILES)
def test_a_users_file_trains_the_same_adapter(reports, name):
    first, second = reports[0][name], reports[1][name]
    assert first == second, "ranks agree, to the bit"
    reference = reports[0]["llama-factory-zero0"][0]
    assert any(abs(value) > 1e-3 for values in reference.values() for value in values), "it has learned"
    for key, values in reference.items():
        assert first[0][key] == pytest.approx(values, rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("name", FILES)
def test_it_resumes_from_a_checkpoint_to_the_bit(reports, name):
    whole, resumed = reports[0][name]
    assert resumed == whole
