"""A plain training loop (torch and PEFT, no Ray, no pipelines) in which the strategy tests run."""

import json
from dataclasses import replace

import numpy as np
import peft
import torch
from torch.nn.functional import cross_entropy

from curlora import CurloraConfig
from curlora.continual import Example, StepOutput, TaskContext
from curlora.continual.parameters import adapter_parameters

CONFIGS = {
    "curlora": lambda: CurloraConfig(r=4, task_type="CAUSAL_LM"),
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
}


def rows(task: str, count: int, seed: int = 0) -> list[Example]:
    generator = np.random.default_rng(seed)
    tokens = [tuple(generator.integers(3, 40, size=int(n)).tolist()) for n in generator.integers(4, 9, size=count)]
    return [Example(task, row, row) for row in tokens]


def adapted(model, kind: str):
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, CONFIGS[kind]())
    for index, parameter in enumerate(adapter_parameters(wrapped).values()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
        parameter.data.add_(noise, alpha=0.05)
    return wrapped


def forward(model, examples):
    ids = torch.zeros(len(examples), max(len(e.input_ids) for e in examples), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, example in enumerate(examples):
        ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
        if example.labels is not None:
            labels[row, : len(example.input_ids)] = torch.tensor(example.labels)
        mask[row, : len(example.input_ids)] = 1
    output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    each = cross_entropy(output.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none").sum(1)
    return (
        each / mask[:, 1:].sum(1),
        output.hidden_states[-1],
        mask,
        lambda rows, length: output.logits[rows, :length],
    )


def context(name: str, position: int, examples) -> TaskContext:
    return TaskContext(name, position, 0, examples, steps=6, losses=losses, draw=draw, write=write_)


def losses(model, examples):
    return forward(model, examples)[0]


def draw(model, examples, seed):
    """The same rows with next tokens drawn from the model."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(list(seed)).generate_state(1)[0]))
    drawn = []
    with torch.no_grad():
        for example in examples:
            scores = model(input_ids=torch.tensor([example.input_ids])).logits[0, :-1].double().softmax(-1)
            tokens = torch.multinomial(scores, 1, generator=generator)[:, 0].tolist()
            drawn.append(replace(example, labels=(-100, *tokens)))
    return drawn


def write_(model, count: int, length: int) -> list[tuple[int, ...]]:
    """Stands in for sampling from a model: the most likely continuation of each start token."""
    tokens = torch.arange(3, 3 + count)[:, None]
    with torch.no_grad():
        while tokens.shape[1] < length:
            tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)], 1)
    return [tuple(row) for row in tokens.tolist()]


def train(model, strategy, task: TaskContext, steps: int = 6, on_step=lambda step: None) -> None:
    """A plain training loop that calls the hooks in their order."""
    strategy.before_task(model, task)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, steps + 1):
        first = (step - 1) * 4 % len(task.examples)
        batch = strategy.batch(list(task.examples[first : first + 4]))
        losses, hidden, mask, logits = forward(model, batch)
        replayed = sum(e.replayed for e in batch)
        output = StepOutput(losses.mean(), hidden, mask, replayed=replayed, logits=logits)
        strategy.loss(model, batch, output).backward()
        optimizer.step()
        optimizer.zero_grad()
        strategy.after_step(model, step)
        on_step(step)
    strategy.after_task(model, task)


def through_json(state: tuple[dict, dict]) -> tuple[dict, dict]:
    tensors, values = state
    return {key: tensor.clone() for key, tensor in tensors.items()}, json.loads(json.dumps(values))


def minimise(model, strategy, steps=200):
    optimizer = torch.optim.Adam(adapter_parameters(model).values(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        penalty = strategy.penalty(model)
        penalty.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.97
    return strategy.penalty(model).item()
