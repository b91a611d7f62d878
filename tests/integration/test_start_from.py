"""A chain in two runs ends like the chain in one, bit for bit."""

import json

import pytest


def test_a_run_that_goes_on_from_a_step_ends_like_the_one_that_never_stopped(bench, reference):
    start = f"{bench.directory('reference')}/word"
    results = bench.run_warm(bench.config("continued", start_from=start))
    assert [step["task"] for step in results["steps"]] == ["text"]
    assert results["learned_at"] == {"part": 0, "word": 0, "text": 1}
    assert results["steps"][0]["fingerprint"] == reference["steps"][2]["fingerprint"]
    assert bench.adapter_bytes(results, 0) == bench.adapter_bytes(reference, 2)
    for row, wanted in ((0, 2), (1, 3)):
        assert results["scores"][row] == reference["scores"][wanted]
        assert results["nll"]["other"][row] == reference["nll"]["other"][wanted]
    heads = [bench.step(r, k) / "heads.safetensors" for r, k in ((results, 0), (reference, 2))]
    assert heads[0].read_bytes() == heads[1].read_bytes()
    metrics = bench.metrics(results, 0)
    assert metrics["parent_run"] == str(bench.directory("reference"))
    assert metrics["parent"] == reference["steps"][1]["fingerprint"]
    assert json.loads((bench.directory("continued") / "start.json").read_text())["depth"] == 2


def test_a_run_goes_on_from_a_plain_lora_and_knows_what_it_knew(bench, reference):
    """The LoRA that another tool would see: an exported adapter, without the run that it comes from."""
    folder = bench.root / "plain-lora"
    bench.command("export", "reference", "--as", "lora", "--to", str(folder), "--step", "text")
    (folder / "heads.safetensors").unlink()
    stated = json.loads((folder / "adapter_config.json").read_text())
    adapter = {"type": "lora", "r": stated["r"], "alpha": stated["lora_alpha"]}
    adapter |= {"target_modules": stated["target_modules"]}
    adapter["options"] = {key: stated[key] for key in ("rank_pattern", "alpha_pattern") if stated[key]}
    tasks = [bench.raw["tasks"][1], bench.raw["tasks"][2] | {"name": "again"}]  # both can be scored from the start
    config = bench.config("grafted", start_from=str(folder), adapter=adapter, tasks=tasks)
    assert "warning" not in bench.command("run", str(config), "--dry-run")
    results = bench.run_warm(config)
    assert results["scores"][0][0] == reference["scores"][3][1]
    assert results["scores"][0][1] == pytest.approx(reference["scores"][3][2], rel=1e-4)
    assert results["nll"]["other"][0] == pytest.approx(reference["nll"]["other"][3], rel=1e-4)
    assert results["nll"]["other"][0] != pytest.approx(reference["nll"]["other"][0], rel=1e-3)
    lineage = json.loads(bench.command("lineage", "grafted", "--json"))["links"]
    assert [link["label"] for link in lineage] == ["base", "plain-lora", "word", "again"]
    assert lineage[1]["origin"] == str(folder)
