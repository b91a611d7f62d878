"""Tiny untrained models of the families that users bring, each written to a folder with a tokenizer of its own."""

from collections.abc import Callable
from pathlib import Path

import torch
import transformers

MANY = 32  # experts of a mixture: more than the tokens of a short sequence can reach
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
GATED = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
GEMMA3 = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6, "query_pre_attn_scalar": 8}
QWEN3_MOE = {"num_experts": MANY, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT_OSS = {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 6}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.0}

FAMILIES: dict[str, Callable[..., transformers.PreTrainedConfig]] = {
    "qwen3": lambda **ids: transformers.Qwen3Config(**GATED, **ids),
    "gemma3": lambda **ids: transformers.Gemma3TextConfig(**GATED, **GEMMA3, **ids),
    "mixtral": lambda **ids: transformers.MixtralConfig(**GATED, num_local_experts=MANY, **ids),
    "qwen3-moe": lambda **ids: transformers.Qwen3MoeConfig(**GATED, **QWEN3_MOE, **ids),
    "gpt2": lambda **ids: transformers.GPT2Config(**GPT2, **ids),
    "opt": lambda **ids: transformers.OPTConfig(**SMALL, **OPT, **ids),
    "falcon": lambda **ids: transformers.FalconConfig(**SMALL, **ids),
}
OTHERS: dict[str, Callable[..., transformers.PreTrainedConfig]] = {
    "falcon-alibi": lambda **ids: transformers.FalconConfig(**SMALL, alibi=True, multi_query=False, **ids),
    "gpt-oss": lambda **ids: transformers.GptOssConfig(**GATED, **GPT_OSS, **ids),
    "bloom": lambda **ids: transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **ids),
    "mamba": lambda **ids: transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8, **ids),
}
"""Families whose scores are checked, but that no chain is run with."""
SEPARATING = ("qwen3", "gemma3", "mixtral", "qwen3-moe", "gpt2", "falcon", "falcon-alibi")
"""Families that keep the documents of a packed block apart."""
FUSED = ("mixtral", "qwen3-moe")


def tiny(family: str, tokenizer, scale: float = 1.0) -> transformers.PreTrainedModel:
    """The same model at every call, in fp32; `scale` multiplies its matrices, so that its outputs differ clearly."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        (FAMILIES | OTHERS)[family](vocab_size=len(tokenizer), **ids)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model.float().eval()


def with_listed_experts(tokenizer, folder: Path) -> Path:
    """A checkpoint with model code of its own (`trust_remote_code`), whose experts are dense layers in a list."""
    from tests.fixtures.modeling_listed_experts import ListedExpertsConfig, ListedExpertsForCausalLM

    ListedExpertsConfig.register_for_auto_class()
    ListedExpertsForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    torch.manual_seed(0)
    config = ListedExpertsConfig(**GATED, num_experts=MANY, vocab_size=len(tokenizer))
    ListedExpertsForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(family: str, tokenizer, folder: Path) -> Path:
    """The model and its tokenizer, as a checkpoint that is loaded by its folder."""
    tiny(family, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
