"""The hub models of PEFT's tests as tiny random ones in the layout of a hub cache; the hub is never asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers as hf
from peft import LoraConfig

COMMIT = "0" * 40
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SMALL | {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2, "vocab_size": 256}
BERT = SMALL | {"hidden_size": 32, "intermediate_size": 37, "vocab_size": 256, "max_position_embeddings": 512}


def _gpt2() -> hf.PreTrainedModel:
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=256, **_ends()))


def _ends() -> dict[str, int]:
    return {"bos_token_id": 254, "eos_token_id": 255, "pad_token_id": 255}


MODELS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    # ffn_dim 4 is as on the hub: smaller than the rank of the tests
    "peft-internal-testing/tiny-random-OPTForCausalLM": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(hidden_size=16, ffn_dim=4, word_embed_proj_dim=16, vocab_size=256, **SMALL)
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": _gpt2,
    "hf-internal-testing/tiny-random-gpt2": _gpt2,
    "peft-internal-testing/tiny-random-GPTJForCausalLM": lambda: hf.GPTJForCausalLM(
        hf.GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, vocab_size=256, **_ends())
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)),
    "peft-internal-testing/tiny-dummy-qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**LLAMA)),
    "hf-internal-testing/tiny-random-MistralForCausalLM": lambda: hf.MistralForCausalLM(hf.MistralConfig(**LLAMA)),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**LLAMA, head_dim=8)
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(d_model=32, d_ff=37, d_kv=8, num_layers=2, num_heads=4, vocab_size=256, decoder_start_token_id=0)
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=4,
            decoder_ffn_dim=4,
            vocab_size=256,
        )
    ),
    "peft-internal-testing/tiny-random-BertModel": lambda: hf.BertModel(hf.BertConfig(**BERT)),
    "peft-internal-testing/tiny-random-RobertaModel": lambda: hf.RobertaModel(hf.RobertaConfig(**BERT)),
    "peft-internal-testing/tiny-random-DebertaModel": lambda: hf.DebertaModel(hf.DebertaConfig(**BERT)),
    "peft-internal-testing/tiny-random-DebertaV2Model": lambda: hf.DebertaV2Model(hf.DebertaV2Config(**BERT)),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": lambda: hf.BertForSequenceClassification(
        hf.BertConfig(**BERT)
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": lambda: hf.RobertaForSequenceClassification(
        hf.RobertaConfig(**BERT)
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": lambda: hf.LlamaForSequenceClassification(
        hf.LlamaConfig(**LLAMA, pad_token_id=0)
    ),
}


ADAPTER = "peft-internal-testing/tiny-opt-lora-revision"
"""An adapter of which the tests read only the configuration, at the revisions main and test."""


def build(home: Path) -> None:
    """Write every model into the cache below `home`, which is what HF_HOME has to name; those there are kept."""
    for name, make in (*MODELS.items(), (ADAPTER, LoraConfig)):
        root = home / "hub" / f"models--{name.replace('/', '--')}"
        if (root / "refs" / "main").exists():
            continue
        torch.manual_seed(0)
        make().save_pretrained(root / "snapshots" / COMMIT)
        (root / "refs").mkdir(parents=True, exist_ok=True)
        for revision in ("test", "main"):
            (root / "refs" / revision).write_text(COMMIT)
