"""Whether a base model keeps packed documents and examples apart."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import masking_utils

from pipelines.models.losses import accepts

SEPARATION = "find_packed_sequence_indices"
"""What Transformers calls while it builds an attention mask from positions, to find the documents of a block."""


class _KnownError(Exception):
    """Ends the forward pass as soon as it is known whether the model separates documents."""

    def __init__(self, separates: bool):
        self.separates = separates


def separates_documents(model: nn.Module) -> bool | None:
    """Whether tokens attend only to their own document, if positions restart at each document of a block.

    Most models of Transformers pass their positions on to the attention mask. Some do not (OPT, BLOOM, GPT-OSS), and
    recurrent or convolutional layers, alone or between those of attention, have no mask: there, every document sees
    those before it.

    Args:
        model: on the meta device; only what comes before its first layer runs.

    Returns:
        None if that does not run on the meta device, or if Transformers no longer has `SEPARATION`.
    """
    if not accepts(model, "position_ids") or _carries_state(model):
        return False
    if not hasattr(masking_utils, SEPARATION):
        return None
    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    try:
        with _ends_when_known(model), _without_pad_token(model.config), torch.no_grad():
            model(input_ids=ids, position_ids=ids, use_cache=False)
    except _KnownError as known:
        return known.separates
    except RuntimeError:  # an operation that needs values
        return None
    return False


def _carries_state(model: nn.Module) -> bool:
    """Whether some layer passes something along the sequence other than by masked attention."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    unmasked = any(not kind.endswith("attention") or kind.startswith("linear") for kind in kinds)
    return unmasked or any(isinstance(module, nn.Conv1d) for module in model.get_decoder().modules())


@contextlib.contextmanager
def _ends_when_known(model: nn.Module) -> Iterator[None]:
    def separated(*args, **kwargs):
        raise _KnownError(True)

    def first_layer(*args):
        raise _KnownError(False)

    layers = next((module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList)), [])
    hooks = [layer.register_forward_pre_hook(first_layer) for layer in layers]
    original = getattr(masking_utils, SEPARATION)
    setattr(masking_utils, SEPARATION, separated)
    try:
        yield
    finally:
        setattr(masking_utils, SEPARATION, original)
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _without_pad_token(config) -> Iterator[None]:
    """Some models look for padding in their input if there is a pad token, which needs values."""
    pad, config.pad_token_id = getattr(config, "pad_token_id", None), None
    try:
        yield
    finally:
        config.pad_token_id = pad
