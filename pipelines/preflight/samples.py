"""Checks that the prompts of `evaluation.samples` and their answers fit the model's context."""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.config.pipeline import PipelineConfig
from pipelines.data.encoding import Encoder
from pipelines.data.kinds.base import short
from pipelines.data.kinds.generation import Generation
from pipelines.data.samples import free_text
from pipelines.errors import Problem

FIELD = "evaluation.samples"


def sample_problems(config: PipelineConfig, tokenizer, context: int) -> Iterator[Problem]:
    """Prompts and answers that do not fit. Rows of tasks are cut as in an evaluation, general prompts never.

    Args:
        tokenizer: of the base; None if it cannot be loaded.
        context: of the base in tokens.
    """
    samples = config.evaluation.samples
    if samples is None:
        return
    room = context - samples.max_new_tokens
    if room < 1:
        message = f"{samples.max_new_tokens} leaves no room in the model's context of {context} tokens; lower it"
        yield Problem(f"{FIELD}.max_new_tokens", message)
    elif tokenizer is not None and samples.prompts:
        rows = {"prompt": list(samples.prompts)}
        asked = free_text(samples.max_new_tokens, bool(tokenizer.chat_template))
        for item in Generation().items(asked, [rows], Encoder(tokenizer, context + 10**6)):
            if len(item.input_ids) > room:
                message = (
                    f"{short(samples.prompts[item.example])} has {len(item.input_ids)} tokens and its answer up to "
                    f"{samples.max_new_tokens}, but the model's context holds {context}; shorten it or lower "
                    f"{FIELD}.max_new_tokens"
                )
                yield Problem(f"{FIELD}.prompts.{item.example}", message)
