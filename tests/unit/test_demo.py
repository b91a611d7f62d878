"""The demo's material: what is read from the environment, how it is split, and when it is made anew."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.demo import build as demo_build
from pipelines.demo import cleaning, corpus, presets, pretraining, tasks
from pipelines.demo.build import prepare_demo
from pipelines.demo.corpus import Passage
from pipelines.demo.presets import Library
from pipelines.errors import DemoError

SOURCE = '''"""The module explains in plain words what all of its functions are good for."""

raise RuntimeError("this package must never be imported")


class Engine:
    """An engine that turns the fuel of a car into motion, using `fuel.pump.Pump` as a source of it."""

    def start(self):
        """
        Start the engine and wait for it to be warm, which can take a minute in the winter.

        Parameters
        ----------
        self : Engine
            The engine that is to be started by this function of the class.

        Examples
        --------
        >>> Engine().start()
        """
'''


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "fake"
    for name in ("b", "a"):
        (folder / name).mkdir(parents=True)
        text = SOURCE.replace("motion", f"motion of the kind {name * 3}")
        (folder / name / "__init__.py").write_text(text)
    (folder / "tests").mkdir()
    (folder / "tests" / "test_it.py").write_text(SOURCE)
    (folder / "broken.py").write_text('"""A template that is not Python at all but is in the package."""\n{{ x }} !')
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache that holds a finished demo of the test preset."""
    folder = tmp_path_factory.mktemp("cache")
    prepare_demo(folder, preset="test")
    return folder


def _records(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_extraction_reads_docstrings_without_importing(package):
    passages = corpus.extract(package, Library("fake", "fake"))
    assert [(p.module, p.part) for p in passages] == [("fake.a", "a")] * 3 + [("fake.b", "b")] * 3
    assert "fake" not in sys.modules


def test_extraction_does_not_depend_on_the_install_path(package, tmp_path):
    copy = tmp_path / "elsewhere" / "fake"
    shutil.copytree(package, copy)
    library = Library("fake", "fake")
    assert corpus.extract(package, library) == corpus.extract(copy, library)


def test_cleaning_keeps_prose_and_drops_tables_code_and_dotted_names(package):
    _, engine, start = [p.text for p in corpus.extract(package, Library("fake", "fake")) if p.part == "a"]
    assert start == "Start the engine and wait for it to be warm, which can take a minute in the winter."
    assert engine.endswith("using Pump as a source of it.")


def test_repeated_passages_are_found_when_lightly_changed():
    seen = set()
    text = "Compute the mean of all of the values in this column of the table, ignoring those which are missing."
    assert not cleaning.is_repetition(text, seen)
    assert cleaning.is_repetition(text.replace("column", "row"), seen)
    assert not cleaning.is_repetition(
        "Open a file for reading and return a stream of its decoded lines of text.", seen
    )


def test_classes_are_the_largest_parts_with_ties_by_name():
    passages = [Passage("lib", "lib.x", part, part) for part in ("b", "a", "c", "c", "__init__", "__init__")]
    assert tasks.largest_parts(passages, 2) == ["c", "a"]


def test_task_splits_are_disjoint_and_balanced(cache):
    assets = prepare_demo(cache, preset="test")
    for name, folder in assets.tasks.items():
        splits = {split: _records(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
        texts = [record["text"] for records in splits.values() for record in records]
        assert len(texts) == len(set(texts)) > 0
        if assets.manifest["tasks"][name]["kind"] == "classification":
            labels = json.loads((folder / "labels.json").read_text())
            for records in splits.values():
                counts = [sum(r["label"] == label for r in records) for label in range(len(labels))]
                assert len(set(counts)) == 1 and counts[0] > 0


def test_passages_to_classify_end_with_the_question_and_fit_the_context(cache):
    from transformers import AutoTokenizer

    assets = prepare_demo(cache, preset="test")
    tokenizer = AutoTokenizer.from_pretrained(assets.base_model)
    texts = [record["text"] for record in _records(assets.tasks["huggingface_hub"] / "train.jsonl")]
    assert all(text.endswith(tasks.ORIGIN) for text in texts)
    assert max(len(ids) for ids in tokenizer(texts)["input_ids"]) <= assets.manifest["model"]["context"]


def test_retention_text_is_in_no_task_and_of_no_library_of_a_task(cache):
    assets = prepare_demo(cache, preset="test")
    retained = [record["text"].split(tasks.ORIGIN) for record in _records(assets.retention / "test.jsonl")]
    assert not {origin.split(".")[0].strip() for _, origin in retained} & set(assets.tasks)
    for folder in assets.tasks.values():
        assert {text for text, _ in retained}.isdisjoint(r["text"] for r in _records(folder / "train.jsonl"))


def test_model_and_tokenizer_load_and_tokenizer_round_trips(cache):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assets = prepare_demo(cache, preset="test")
    model = AutoModelForCausalLM.from_pretrained(assets.base_model)
    tokenizer = AutoTokenizer.from_pretrained(assets.base_model)
    text = "Any text,  with `symbols`\n\tand é, comes back as it was ."
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert model.num_parameters() == assets.manifest["model"]["parameters"]
    assert len(tokenizer) == model.config.vocab_size


def test_manifest_states_everything_that_was_made(cache):
    assets = prepare_demo(cache, preset="test")
    assert assets.manifest["fingerprint"] == demo_build.fingerprint(presets.PRESETS["test"])
    model = assets.manifest["model"]
    assert model["unigram_nll"] - model["held_out_nll"] >= presets.PRESETS["test"].min_gain
    for name, folder in assets.tasks.items():
        for split in ("train", "validation", "test"):
            assert len(_records(folder / f"{split}.jsonl")) == assets.manifest["tasks"][name][split]
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


def test_second_preparation_imports_neither_torch_nor_transformers(cache):
    code = (
        "import sys; from pathlib import Path; from pipelines.demo.build import prepare_demo; "
        f"prepare_demo(Path({str(cache)!r}), preset='test'); "
        "sys.exit(bool({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_folder_without_manifest_is_made_anew(tmp_path, monkeypatch):
    def build(folder, preset, progress):
        (folder / demo_build.MANIFEST).write_text('{"tasks": []}')

    monkeypatch.setattr(demo_build, "build_demo", build)
    root = prepare_demo(tmp_path, preset="test").root
    (root / demo_build.MANIFEST).unlink()
    (root / "half-made").touch()
    assert prepare_demo(tmp_path, preset="test").root == root
    assert [path.name for path in root.iterdir()] == [demo_build.MANIFEST]


def test_second_of_two_builders_takes_the_folder_of_the_first(tmp_path, monkeypatch):
    def build(folder, preset, progress):
        (folder / demo_build.MANIFEST).write_text('{"tasks": [], "by": "second"}')
        first = tmp_path / f"test-{demo_build.fingerprint(preset)[:12]}"
        first.mkdir()
        (first / demo_build.MANIFEST).write_text('{"tasks": [], "by": "first"}')

    monkeypatch.setattr(demo_build, "build_demo", build)
    assets = prepare_demo(tmp_path, preset="test")
    assert assets.manifest["by"] == "first"
    assert list(tmp_path.iterdir()) == [assets.root]


def test_model_that_is_no_better_than_the_unigram_is_refused(tmp_path, package):
    texts = [p.text for p in corpus.extract(package, Library("fake", "fake"))] * 4
    preset = dataclasses.replace(presets.PRESETS["test"], steps=1, context=16, vocabulary=300, min_gain=1.0)
    with pytest.raises(DemoError, match="held-out NLL"):
        pretraining.pretrain(tmp_path / "model", texts, texts, preset, presets.no_progress)
    assert not (tmp_path / "model" / "model.safetensors").exists()


def test_missing_library_of_a_task_is_an_error_and_of_the_pretraining_is_not():
    missing = Library("no-such-distribution", "no_such_package")
    tiny = Library("click", "click")
    preset = dataclasses.replace(
        presets.PRESETS["test"], pretraining=(missing,), classification=(tiny,), language_modeling=tiny
    )
    assert list(corpus.read_corpus(preset, presets.no_progress)) == ["click"]
    with pytest.raises(DemoError, match="pip install no-such-distribution"):
        corpus.read_corpus(dataclasses.replace(preset, classification=(missing,)), presets.no_progress)


def test_part_with_hardly_any_text_is_refused(tmp_path):
    passages = [Passage("lib", "lib.x", part, "one two " * 10) for part in ("a", "b")]
    with pytest.raises(DemoError, match="too small"):
        tasks.write_classification(tmp_path / "task", passages, presets.PRESETS["test"])


def test_unigram_nll_is_that_of_the_training_frequencies():
    import torch

    train, held_out = torch.tensor([0, 0, 0, 1]), torch.tensor([1, 0, 1])
    expected = -(torch.tensor(4 / 6).log() + torch.tensor(2 / 6).log()) / 2
    assert pretraining.unigram_nll(train, held_out, 2) == pytest.approx(float(expected))


def test_model_nll_predicts_every_token_once_across_windows():
    import torch

    class Uniform:
        def __call__(self, input_ids, use_cache):
            self.seen = getattr(self, "seen", 0) + input_ids.shape[1] - 1
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 7)})

    model = Uniform()
    assert pretraining.model_nll(model, torch.zeros(23, dtype=torch.long), 8) == pytest.approx(
        float(torch.tensor(7.0).log())
    )
    assert model.seen == 22
