"""What an adapter's folder says of it, to someone who has nothing else."""

import json

import pytest
import torch
import yaml
from sample_run import make_grown_run, make_run

from pipelines.config.paths import public_name
from pipelines.inference.export import export_step
from pipelines.lineage.model_card import ancestry_of, model_card
from pipelines.runs.directory import RunDirectory


def card_of(run: RunDirectory, form: str = "adapter", **changes) -> str:
    config = run.config()
    config = config.model_copy(update={"base_model": config.base_model.model_copy(update=changes)})
    return model_card(form, run.name, config, ancestry_of(run, run.results().steps[-1].directory))


def test_it_names_tasks_scores_and_lineage_and_no_path(tmp_path):
    run = make_run(tmp_path)
    card, scores = card_of(run), run.results().scores
    assert f"| sst2 | classification | accuracy | {scores[3][1]:.4g} | {scores[2][1]:.4g} |" in card
    assert f"| biomed | language-modeling | nll | {scores[3][2]:.4g} | {scores[3][2]:.4g} |" in card
    before, *_, after = run.results().perplexity["wikitext2"]
    assert f"| wikitext2 | {after:.4g} | {before:.4g} |" in card
    steps = run.results().steps
    order = [card.index(step.fingerprint) for step in steps]
    assert order == sorted(order)
    assert run.metrics(steps[0].directory).data["mrpc"].train.digest in card
    assert "base `tiny-llama`" in card
    assert str(tmp_path) not in card


def test_its_metadata_name_a_base_on_the_hub_and_no_other(tmp_path):
    run = make_run(tmp_path)
    local, hub = (yaml.safe_load(card.split("---")[1]) for card in (card_of(run), card_of(run, path="owner/base")))
    assert "base_model" not in local
    assert (hub["base_model"], hub["library_name"]) == ("owner/base", "peft")
    assert 'from_pretrained("owner/base"' in card_of(run, path="owner/base")


def test_it_tells_the_tasks_of_the_run_that_it_grew_from(tmp_path):
    first = make_run(tmp_path, name="first", tasks=("mrpc",))
    grown = make_grown_run(tmp_path, first, "sst2", name="second")
    card = card_of(grown)
    assert "2 tasks learned one after another" in card
    assert first.results().steps[0].fingerprint in card


@pytest.mark.parametrize(("written", "expected"), [("owner/base", ("owner/base", True)), ("/a/b", ("copy", False))])
def test_a_local_copy_is_known_by_the_hub_id_in_its_configuration(tmp_path, written, expected):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "config.json").write_text(json.dumps({"_name_or_path": written}))
    assert public_name(str(tmp_path / "copy")) == expected


def test_a_base_without_configuration_is_known_by_its_file(tmp_path):
    assert public_name(str(tmp_path / "model.Q4.gguf")) == ("model.Q4.gguf", False)


@pytest.mark.parametrize("form", ["adapter", "lora", "merged"])
def test_an_export_is_loaded_as_its_card_says(trained, tmp_path, form):
    run, adapted = trained
    folder = export_step(run, None, form, tmp_path / "export")
    card = (folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert ("import curlora" in code) == (form == "adapter")
    names = {}
    exec(code.replace("BASE", str(tmp_path / "my-base")).replace("FOLDER", str(folder)), names)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.allclose(names["model"].eval()(ids).logits, adapted(ids).logits, atol=1e-4)
    chat = names["tokenizer"].apply_chat_template([{"role": "user", "content": "good"}], tokenize=False)
    assert chat == "user: good\n"
    assert "| reviews | classification | accuracy | 0.75 |" in card
    for file in folder.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


def test_a_published_adapter_names_its_base_as_others_know_it(trained):
    run, _ = trained
    raw = json.loads(run.read_bytes("steps/1-reviews-abcdef12/adapter/adapter_config.json"))
    assert raw["base_model_name_or_path"] == "my-base"
