"""Failures of PEFT's matrix that are by design, by the names of the tests, each with its reason."""

from __future__ import annotations

import re

REASONS: dict[str, str] = {
    r"test_loading_model(_with_modules_to_save)?_requires_grad_set_correctly": (
        "the test saves on one random base and loads on another, which CURLoRA refuses: its factors are parts of the "
        "base (the same on one base: tests/unit/test_curlora_model.py)"
    ),
    r"test_config::test_from_pretrained_cache_dir": "the test downloads a LoRA from the hub into an empty cache",
    r"test_decoder_models::test_lora_conversion\[.*OPTForCausalLM": (
        "the test converts at rank 8, but this OPT's feed-forward layers, which all linear layers include, have 4 rows"
    ),
    r"test_feature_extraction_models::test_training(_gradient_checkpointing)?\[.*(Bert|Roberta)Model": (
        "the test's loss does not read the pooler, which all linear layers include, so that it gets no gradient"
    ),
}
"""Regular expression of test names → why CURLoRA does not do what the test wants."""


def reason(name: str) -> str | None:
    """The reason why the test may fail, None if it must pass."""
    return next((text for pattern, text in REASONS.items() if re.search(pattern, name)), None)
