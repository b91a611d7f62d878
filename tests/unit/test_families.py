"""Scores and losses of models that are not Llamas, against the plain computation of one sequence at a time."""

import numpy as np
import pytest
import torch
import transformers

from curlora.continual import Example
from pipelines.config.loading import parse_config
from pipelines.data.encoding import IGNORE, Encoded
from pipelines.data.kinds.base import EvaluationSet
from pipelines.distributed.world import World
from pipelines.evaluation.batching import make_question_batches
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.sampling import sample_text
from pipelines.evaluation.scorers import greedy
from pipelines.models.packing import separates_documents
from pipelines.models.padding import pad
from pipelines.preflight.model import check_model, model_facts
from pipelines.training.batches import collate
from pipelines.training.example_losses import example_losses
from tests.conftest import minimal
from tests.families import FAMILIES, FUSED, OTHERS, SEPARATING, tiny, write

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(params=[*FAMILIES, *OTHERS])
def model(request, tokenizer):
    return tiny(request.param, tokenizer, scale=4)


def prompts(vocabulary: int, lengths=(11, 3, 8, 5)) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, vocabulary, size=length) for length in lengths]


@torch.no_grad()
def log_probabilities(model, ids) -> torch.Tensor:
    """(length − 1) of each token given those before it, without padding or a cache."""
    ids = torch.as_tensor(np.asarray(ids))[None]
    scores = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    return scores.gather(1, ids[0, 1:, None])[:, 0].double()


class Tokens:
    """Counts the tokens that a model takes in, and its passes."""

    def __init__(self, model):
        self.seen = []
        decoder = model.get_decoder()
        decoder.register_forward_pre_hook(
            lambda _, args, kwargs: self.seen.append((args or (kwargs["input_ids"],))[0].numel()), with_kwargs=True
        )


def test_choices_share_their_prompt_and_score_as_if_alone(model, tokenizer):
    answers = [np.array([7]), np.array([9, 11, 12])]
    questions = prompts(len(tokenizer))
    items = tuple(
        Encoded(number, np.concatenate([prompt, answer]), start=len(prompt), choice=choice)
        for number, prompt in enumerate(questions)
        for choice, answer in enumerate(answers)
    )
    rows = tuple(range(len(questions)))
    found = EvaluationSet("v", "verbalizer", "accuracy", items, (0,) * len(rows), rows, ("x", "y"), "d")
    tokens = Tokens(model)
    cell, outcomes = evaluate(model, found, ALONE, 60, "task", "k")
    assert len(tokens.seen) == 2 * len(make_question_batches(items, 60))
    losses = []
    for question, outcome in zip(questions, outcomes, strict=True):
        both = torch.stack(
            [log_probabilities(model, np.concatenate([question, a]))[len(question) - 1 :].sum() for a in answers]
        )
        assert outcome["prediction"] == int(both.argmax())
        losses.append(-both.log_softmax(-1)[0].item())
    assert cell.loss == pytest.approx(np.mean(losses), rel=1e-4)


def test_greedy_answers_are_those_of_one_prompt_without_a_cache(model, tokenizer):
    questions = prompts(len(tokenizer))
    padded = pad(questions, ALONE.device, side="left")
    with torch.no_grad():
        found = greedy(model, padded, 6, [], ALONE)
    for question, answer in zip(questions, found, strict=True):
        ids = list(question)
        for token in answer:
            with torch.no_grad():
                scores = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            assert scores[token] == pytest.approx(float(scores.max()), abs=1e-4)
            ids.append(token)


def test_sampling_takes_in_each_token_once(model, tokenizer):
    tokens = Tokens(model)
    sample_text(model, 3, 7, 1, 0, ALONE)
    assert tokens.seen == [3] * 6


def test_training_losses_do_not_see_padding(model, tokenizer):
    examples = [Example("t", tuple(ids.tolist()), tuple(ids.tolist())) for ids in prompts(len(tokenizer))]
    with torch.no_grad():
        losses, _ = example_losses(model, collate(examples, ALONE))
    expected = [-log_probabilities(model, example.input_ids).mean().item() for example in examples]
    assert losses.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_documents_of_a_block_are_kept_apart_or_are_known_not_to_be(family, tokenizer):
    model = tiny(family, tokenizer, scale=4)
    first, second = (tuple(ids.tolist()) for ids in prompts(len(tokenizer), (6, 5)))
    block = Example("t", first + second, (*[IGNORE] * 7, *second[1:]), breaks=(6,))
    other = Example("t", (9,) * 6 + second, block.labels, breaks=(6,))
    with torch.no_grad():
        losses, _ = example_losses(model, collate([block, other], ALONE))
    alone = -log_probabilities(model, second).mean().item()
    kept_apart = losses.tolist() == pytest.approx([alone, alone], rel=1e-4)
    with torch.device("meta"):
        described = transformers.AutoModelForCausalLM.from_config(model.config)
    assert separates_documents(described) is kept_apart
    assert kept_apart is (family in SEPARATING)


@pytest.fixture
def config_of(tokenizer, tmp_path, reviews):
    def make(family: str, **changes):
        base = {"path": str(write(family, tokenizer, tmp_path / family)), "dtype": "float32"}
        return parse_config(minimal(tmp_path, reviews, base_model=base, adapter={"r": 4}) | changes)

    return make


def test_a_base_that_lets_documents_see_each_other_is_refused_with_the_remedy(config_of, reviews):
    task = {"name": "text", "kind": "language-modeling", "data": str(reviews), "text": "sentence"}
    (problem,) = check_model(config_of("opt", tasks=[task]))
    assert problem.field == "tasks.0.documents"
    assert "'opt'" in problem.message and problem.message.endswith("set documents: joined")
    assert check_model(config_of("opt", tasks=[task | {"documents": "joined"}])) == []
    assert check_model(config_of("gpt2", tasks=[task])) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_that_no_adapter_reaches_are_counted(family, config_of, tokenizer):
    config, warned = config_of(family), []
    assert check_model(config, warn=warned.append) == []
    expected = sum(
        parameter.numel() for name, parameter in tiny(family, tokenizer).named_parameters() if ".experts." in name
    )
    assert sum(model_facts(config).unadapted_experts.values()) == expected
    assert len(warned) == (family in FUSED) == (expected > 0)


def test_experts_that_an_adapter_reaches_are_not_counted(config_of):
    lora = {"type": "lora", "r": 4, "target_modules": ["q_proj"]}
    options = {"target_parameters": ["mlp.experts.down_proj"]}
    config = config_of("mixtral", adapter=lora | {"options": options})
    assert list(model_facts(config).unadapted_experts) == ["model.layers.*.mlp.experts.gate_up_proj"]
    everything = config_of("mixtral", adapter=lora | {"target_modules": "all-linear"})
    assert model_facts(everything).warnings == []  # PEFT's LoRA reaches the experts of Mixtral
    assert model_facts(config_of("mixtral", adapter={"type": "none"})).warnings == []
