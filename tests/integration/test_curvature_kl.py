"""The base's curvature on a real model: how well it predicts the divergence that training causes."""

import json

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from curlora import CurloraConfig
from curlora.continual import Example, TaskContext
from curlora.continual.curvature import coherence, measure, quadratic
from curlora.continual.parameters import adapter_parameters, read, write
from pipelines.distributed.world import World
from pipelines.evaluation.sampling import sample_text
from pipelines.training.example_losses import losses_alone

CPU = torch.device("cpu")
LENGTH, STEPS, SEEN = 64, 16, (2, 4, 8, 12, 16)
FAR = 0.3  # nats per token; no quadratic form holds beyond


def blocks(tokenizer, folder, count: int) -> list[tuple[int, ...]]:
    ids: list[int] = []
    for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines():
        ids += tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids
        if len(ids) >= count * LENGTH:
            return [tuple(ids[i : i + LENGTH]) for i in range(0, count * LENGTH, LENGTH)]
    raise AssertionError(f"{folder} is too short")


def log_probabilities(model, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=rows, use_cache=False).logits[:, :-1].float().log_softmax(-1)


def r2(measured: np.ndarray, predicted: np.ndarray) -> float:
    return 1 - ((measured - predicted) ** 2).sum() / ((measured - measured.mean()) ** 2).sum()


@pytest.fixture(scope="module")
def points(shared) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """KL(base ‖ model) as measured, as predicted, and ‖U‖², along training on two domains at three rates."""
    path = shared / "models" / "tiny-llama"
    tokenizer = AutoTokenizer.from_pretrained(path)
    config = CurloraConfig(r=23, target_modules="all-linear", selection="inverse", scale="adam", task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), config)
    world = World(0, 1, CPU)
    written = [Example("base", row, row) for row in sample_text(model, 64, LENGTH, tokenizer.bos_token_id, 7, world)]
    fresh = torch.tensor(sample_text(model, 32, LENGTH, tokenizer.bos_token_id, 8, world))
    base = log_probabilities(model, fresh)
    task = TaskContext("base", 1, 0, losses=lambda model, examples: losses_alone(model, examples, CPU))
    factors = measure(model, task, written, draw=False)
    parameters, found = adapter_parameters(model), []
    start = read(parameters)
    scale = None
    for domain in ("biomed_pubmedqa", "finance_reuters"):
        examples = [
            Example(domain, row, row) for row in blocks(tokenizer, shared / "data" / f"domain_{domain}", 8 * STEPS)
        ]
        if scale is None:
            scale = coherence(model, task, factors, written, examples[:32])
            assert all(torch.equal(value, start[name]) for name, value in read(parameters).items())
        for rate in (1e-3, 3e-3, 1e-2):
            write(parameters, start)
            optimizer = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=0)
            for step in range(1, STEPS + 1):
                losses_alone(model.train(), examples[8 * step - 8 : 8 * step], CPU).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                if step in SEEN:
                    now, moved = log_probabilities(model, fresh), read(parameters)
                    measured = float((base.exp() * (base - now)).sum(-1).mean())
                    predicted = sum(
                        float(quadratic(value - start[name], factors.outputs[name], factors.inputs[name]))
                        for name, value in moved.items()
                    )
                    norm = sum(float((value - start[name]).square().sum()) for name, value in moved.items())
                    found.append((measured, scale * predicted, norm))
    near = np.array([point for point in found if point[0] < FAR])
    assert len(near) > 20
    return tuple(near.T)


def test_the_calibrated_factors_predict_the_measured_divergence(points):
    measured, predicted, _ = points
    assert r2(measured, predicted) >= 0.8


def test_they_predict_it_better_than_the_size_of_the_update_does_each_at_its_best_scale(points):
    measured, *predictors = points
    best = [r2(measured, p * (measured @ p) / (p @ p)) for p in predictors]
    assert best[0] > best[1]
