"""Loads the frozen base model: in full precision, dequantised from a GGUF file, or quantised by bitsandbytes."""

from __future__ import annotations

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from pipelines.config.sections import BaseModelConfig
from pipelines.models.gguf import converted, described

# bytes per weight; NF4: half a byte, and per 64 weights a scale that is itself quantised to one byte
QUANTISED_BYTES = {"8bit": 1.0, "4bit": 0.5 + 1 / 64}


def load_base(base: BaseModelConfig, device: torch.device | None = None) -> nn.Module:
    """The model on `device`; None: where Transformers puts it, under ZeRO-3 in shards."""
    base = converted(base)
    options = hub_options(base) | {"dtype": getattr(torch, base.dtype)}
    if base.quantization:
        options |= {"quantization_config": _quantisation(base), "device_map": {"": device or torch.device("cpu")}}
    model = transformers.AutoModelForCausalLM.from_pretrained(base.path, **options)
    for module in model.modules():
        # on some CPUs bitsandbytes would repack 4-bit weights at the first evaluation, which no gradient passes
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model if device is None else model.to(device)


def context_length(config: transformers.PretrainedConfig) -> int:
    """Tokens that a model can take in; 1024 where its configuration does not say."""
    return int(getattr(config, "max_position_embeddings", None) or 1024)


def hidden_size(base: BaseModelConfig) -> int:
    """Size of the base's hidden states, from its configuration alone."""
    base = described(base)
    return transformers.AutoConfig.from_pretrained(base.path, **hub_options(base)).get_text_config().hidden_size


def load_tokenizer(base: BaseModelConfig):
    base = described(base)
    return transformers.AutoTokenizer.from_pretrained(base.path, **hub_options(base))


def hub_options(base: BaseModelConfig) -> dict:
    return {"revision": base.revision, "trust_remote_code": base.trust_remote_code}


def _quantisation(base: BaseModelConfig) -> transformers.BitsAndBytesConfig:
    if base.quantization == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, base.dtype),
    )


def quantised_numbers(model: nn.Module) -> int:
    """Number of weights that quantisation covers: those of all linear layers but the output layer."""
    output = model.get_output_embeddings()
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not output)
