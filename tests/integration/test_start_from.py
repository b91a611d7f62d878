"""A chain in two runs ends like the chain in one, bit for bit."""

import json


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
