"""A served bank: every prompt goes to the adapter of the task that it looks like, in one batch with all others."""

import copy
import json
import shutil

import numpy as np
import peft
import pytest
import torch
from serving import Answer, ask, greedy_alone, write_adapter
from strategy_cases import rows

from curlora.continual import Example
from curlora.continual.parameters import adapter_parameters, read
from curlora.mixed import BASE
from pipelines.models.bank import Bank, bank_of
from pipelines.serve.contract import AdapterError
from pipelines.serve.engine import Engine, Limits
from pipelines.serve.shared_model import SharedModel
from tests.conftest import make_model, make_tokenizer

WORDS = {"base": (3, 40), "low": (3, 12), "high": (28, 40)}


def texts(task: str, count: int, seed: int = 0) -> list[tuple[int, ...]]:
    generator = np.random.default_rng([seed, *task.encode()])
    return [tuple(generator.integers(*WORDS[task], size=24).tolist()) for _ in range(count)]


@pytest.fixture(scope="module")
def base():
    return make_model(make_tokenizer())


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    """The steps of two tasks; the second one's folder holds the bank of both."""
    root, bank = tmp_path_factory.mktemp("bank"), Bank()
    for number, task in enumerate(("low", "high"), 1):
        folder = write_adapter(base, root / task, number)
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder / "adapter"), is_trainable=True)
        trained = read(adapter_parameters(model))
        if number == 1:
            for parameter in adapter_parameters(model).values():
                parameter.data.zero_()
            bank.begin(model, texts("base", 32))
        bank.add(model, task, [Example(task, text, text) for text in texts(task, 64)], trained)
    bank.save(root / "high")
    return {task: root / task for task in ("low", "high")}


@pytest.fixture
def shared(base, folders):
    model = SharedModel(copy.deepcopy(base))
    model.load("both", folders["high"])
    return model


def test_each_prompt_is_answered_by_the_adapter_of_its_task(shared, base, folders):
    prompts = [texts("low", 1, 5)[0], texts("base", 1, 6)[0], texts("high", 1, 7)[0]]
    routes = shared.routed("both", prompts)
    assert [task for _, task in routes] == ["low", "base", "high"]
    engine = Engine(shared, make_tokenizer(), Limits(tokens=2048, rows=8, waiting=8))
    answers = [Answer() for _ in prompts]
    engine.submit([ask(key, list(p), 10) for (key, _), p in zip(routes, prompts, strict=True)], answers)
    found = [answer.wait().tokens for answer in answers]
    engine.close()
    owners = [folders["low"], None, folders["high"]]
    assert found == [greedy_alone(base, folder, list(p), 10) for folder, p in zip(owners, prompts, strict=True)]
    assert found[0] != greedy_alone(base, folders["high"], list(prompts[0]), 10)  # the step's own adapter


def test_what_is_scored_alone_may_choose_from_the_bank_as_well(shared, base, folders):
    ids = torch.tensor([texts("low", 1, 5)[0]])
    expected = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folders["low"] / "adapter")).eval()(ids).logits
    with shared.alone("both") as model, torch.no_grad():
        bank = bank_of(model)
        with bank.active(model, bank.tasks.index("low")):
            assert torch.allclose(model(ids).logits, expected, atol=1e-5)
        assert not torch.allclose(model(ids).logits, expected, atol=1e-3)
    assert bank_of(shared.model) is None


def test_an_adapter_without_a_bank_answers_itself(shared, folders):
    shared.load("plain", folders["low"])
    assert not shared.has_bank("plain")
    assert shared.routed("plain", [rows("a", 1)[0].input_ids]) == [("plain", None)]
    assert shared.routed(BASE, [(3, 4)]) == [(BASE, None)]


def test_a_bank_leaves_with_all_its_adapters(shared, folders):
    shared.load("plain", folders["low"])
    assert shared.names == {"both", "both_1", "both_2", "plain"}
    shared.unload("both")
    assert shared.names == {"plain"} and not shared.has_bank("both")


def test_a_damaged_bank_is_refused_and_leaves_nothing_behind(shared, folders, tmp_path):
    folder = shutil.copytree(folders["high"], tmp_path / "damaged")
    state = json.loads((folder / "bank" / "state.json").read_text())
    (folder / "bank" / "state.json").write_text(json.dumps(state | {"tasks": [*state["tasks"], "ghost"]}))
    with pytest.raises(AdapterError, match="damaged: 'base' lacks"):
        shared.load("damaged", folder)
    assert shared.names == {"both", "both_1", "both_2"} and not shared.has_bank("damaged")
    assert [task for _, task in shared.routed("both", [texts("low", 1, 5)[0]])] == ["low"]
