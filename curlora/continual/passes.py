"""Additional forward passes with other adapter weights, without gradient and without dropout."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from curlora.continual.parameters import adapter_parameters, swapped
from curlora.continual.strategy import Example


@torch.no_grad()
def run_with(model: nn.Module, weights: Mapping[str, Tensor], **inputs):
    """The output of a PEFT `model` on `inputs` with other adapter weights (by parameter name)."""
    was_training = model.training
    model.eval()
    try:
        with swapped(adapter_parameters(model), weights):
            return model(**inputs, use_cache=False)
    finally:
        model.train(was_training)


def logits_with(model: nn.Module, weights: Mapping[str, Tensor], examples: Sequence[Example], device) -> Tensor:
    """(examples, length − 1, vocabulary): logits after each token but the last, for sequences of equal length."""
    ids = torch.tensor([example.input_ids for example in examples], device=device)
    return run_with(model, weights, input_ids=ids).logits[:, :-1]


def hidden_with(model: nn.Module, weights: Mapping[str, Tensor], examples: Sequence[Example], mask: Tensor) -> Tensor:
    """Hidden states of the last layer, (examples, length, hidden); `mask` (examples, length) marks real tokens.

    Packed documents are separated as in training: by positions that restart, without an attention mask.
    """
    ids, positions = torch.zeros_like(mask), torch.arange(mask.shape[1], device=mask.device).repeat(len(mask), 1)
    for row, example in enumerate(examples):
        ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
        for start in example.breaks:
            positions[row, start:] = torch.arange(mask.shape[1] - start)
    knows = inspect.signature(model.get_base_model().forward).parameters
    # as a tensor: behind an int, Transformers slices, and on a CPU the output layer then copies its weight per row
    last = torch.tensor([mask.shape[1] - 1], device=mask.device)
    options = {"logits_to_keep": last} if "logits_to_keep" in knows else {}
    packed = any(example.breaks for example in examples)
    seen = {"position_ids": positions} if packed else {"attention_mask": mask}
    return run_with(model, weights, input_ids=ids, output_hidden_states=True, **seen, **options).hidden_states[-1]
