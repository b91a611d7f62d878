"""Whether a base model keeps the documents of a packed block apart."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import masking_utils

from pipelines.models.losses import accepts

SEPARATION = "find_packed_sequence_indices"
"""What Transformers calls while it builds an attention mask from positions, to find the documents of a block."""


class _SeparatedError(Exception):
    """The model has asked where the documents of its block begin."""


def separates_documents(model: nn.Module) -> bool | None:
    """Whether tokens attend only to their own document, if positions restart at each document of a block.

    Most models of Transformers pass their positions on to the attention mask. Some do not (OPT, BLOOM, XGLM), and
    recurrent ones have no mask: there, every document sees those before it.

    Args:
        model: on the meta device; only the part that builds the mask runs.

    Returns:
        None if the model does not run on the meta device, or if Transformers no longer has `SEPARATION`.
    """
    if not accepts(model, "position_ids"):
        return False
    if not hasattr(masking_utils, SEPARATION):
        return None
    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    try:
        with _stops_at_separation(), _without_pad_token(model.config), torch.no_grad():
            model(input_ids=ids, position_ids=ids, use_cache=False)
    except _SeparatedError:
        return True
    except RuntimeError:  # an operation that needs values
        return None
    return False


@contextlib.contextmanager
def _stops_at_separation() -> Iterator[None]:
    def stop(*args, **kwargs):
        raise _SeparatedError

    original = getattr(masking_utils, SEPARATION)
    setattr(masking_utils, SEPARATION, stop)
    try:
        yield
    finally:
        setattr(masking_utils, SEPARATION, original)


@contextlib.contextmanager
def _without_pad_token(config) -> Iterator[None]:
    """Some models look for padding in their input if there is a pad token, which needs values."""
    pad, config.pad_token_id = getattr(config, "pad_token_id", None), None
    try:
        yield
    finally:
        config.pad_token_id = pad
