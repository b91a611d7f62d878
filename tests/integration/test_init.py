"""The configuration that `curlora init` writes is run as it is, but for a base that is there already."""


def test_the_starter_configuration_runs_and_learns(bench, monkeypatch):
    folder = bench.root / "starter"
    bench.command("init", str(folder), "--base", bench.raw["base_model"]["path"])
    places = (f"storage={bench.root}/runs", f"tracking.uri=sqlite:///{folder}/mlflow.db")
    monkeypatch.chdir(folder)  # its paths are relative
    results = bench.run_warm(folder / "chain.yaml", *places, "resources.workers=2")
    assert results["status"] == "finished" and results["tasks"] == ["tickets", "mood", "manual"]
    assert results["learning_accuracy"] > 0.5
    assert results["scores"][3][2] < results["scores"][0][2], "the manual has become likelier"
