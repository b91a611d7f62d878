"""The models that are measured: one frozen base, and adapters on copies that share its weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from measure import DEVICE, DTYPE
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn

from curlora import CurloraConfig

QKV = ["q_proj", "k_proj", "v_proj"]
LINEAR = [*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"]
R = 16


@dataclass(frozen=True)
class Variant:
    """An adapter to be measured. PEFT keeps LoRA's factors in fp32 over a bf16 base (`stock`) unless it is told not
    to; in the base's dtype LoRA is faster, and the one to beat."""

    adapter: str  # curlora, lora or none
    r: int = R
    stock: bool = False

    @property
    def name(self) -> str:
        if self.adapter == "none":
            return "frozen base"
        title = {"curlora": "CURLoRA", "lora": "LoRA"}[self.adapter]
        if self.adapter == "curlora":
            return f"{title} r {self.r}"
        return f"{title} r {self.r}, {'fp32 factors (PEFT default)' if self.stock else 'factors as the base'}"

    def config(self, targets: list[str]) -> PeftConfig:
        if self.adapter == "curlora":
            return CurloraConfig(r=self.r, target_modules=targets, whiten=True, scale="adam")
        return LoraConfig(r=self.r, lora_alpha=self.r, target_modules=targets)


FROZEN, CURLORA = Variant("none"), Variant("curlora")
LORA, LORA_8, LORA_STOCK = Variant("lora"), Variant("lora", 8), Variant("lora", stock=True)
VARIANTS = (FROZEN, CURLORA, LORA, LORA_8, LORA_STOCK)


def adapted(base: nn.Module, variant: Variant, targets: list[str]) -> nn.Module:
    """The base, or an adapter on a copy of its modules that holds the same weights.

    What trains is drawn at random: products with the zeros of a fresh adapter can run faster.
    """
    if variant.adapter == "none":
        return base
    memo = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    copied = copy.deepcopy(base, memo)
    # PEFT's default casts factors to fp32, and CURLoRA's U is in fp32 in any case
    cast = variant.stock or variant.adapter == "curlora"
    model = get_peft_model(copied, variant.config(targets), autocast_adapter_dtype=cast)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.01)
    return model


class Decoder(nn.Module):
    """From token embeddings (batch, length, hidden) to the last hidden state, or with `labels` to the loss."""

    def __init__(self, model: nn.Module, labels: Tensor | None = None) -> None:
        super().__init__()
        self.model = model
        self.given: dict[str, Any] = {} if labels is None else {"labels": labels}

    def forward(self, embeddings: Tensor) -> Tensor:
        output = self.model(inputs_embeds=embeddings, use_cache=False, **self.given)
        return output.loss if self.given else output.last_hidden_state


def mistral(layers: int, tiny: bool, head: bool) -> nn.Module:
    """A frozen model of Mistral-7B's shape, made with random weights where it is measured."""
    import transformers

    sizes = SMALL if tiny else MISTRAL_7B
    config = transformers.MistralConfig(**sizes | {"num_hidden_layers": min(layers, 2) if tiny else layers})
    auto = transformers.AutoModelForCausalLM if head else transformers.AutoModel
    with torch.device(DEVICE):
        return auto.from_config(config, dtype=DTYPE).requires_grad_(False)


MISTRAL_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}
SMALL = MISTRAL_7B | {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
