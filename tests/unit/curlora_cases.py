"""Small models, and the dense formula, computed independently, that the CURLoRA tests compare with."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    DebertaConfig,
    DebertaForMaskedLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from curlora import CurloraConfig, CurloraCore, Linear


class OneLayer(nn.Module):
    """A model that is one dense layer called ``lin``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.lin = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


def one_layer(
    out_features: int, in_features: int, *, conv1d: bool = False, bias: bool = True, dtype=torch.float32, seed: int = 0
) -> OneLayer:
    torch.manual_seed(seed)
    layer = Conv1D(out_features, in_features) if conv1d else nn.Linear(in_features, out_features, bias=bias)
    nn.init.normal_(layer.weight, std=0.5)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return OneLayer(layer.to(dtype))


def adapted(model: nn.Module, *, seed: int = 0, trained: bool = True, **config) -> PeftModel:
    """The model with a CURLoRA adapter, whose U is random if ``trained``."""
    config.setdefault("target_modules", ["lin"])
    wrapped = get_peft_model(model, CurloraConfig(**config)).eval()
    if config.get("selection") == "activation":
        layer = layer_of(wrapped)
        dtype = layer.weight.dtype
        wrapped.base_model.calibrate([torch.randn(20, layer.in_features).to(dtype)])
    if trained:
        randomise(wrapped, seed)
    return wrapped


def randomise(model: PeftModel, seed: int = 0, std: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".U"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def layer_of(model: PeftModel) -> Linear:
    return next(module for module in model.modules() if isinstance(module, Linear))


def core_of(model: PeftModel, adapter: str = "default") -> CurloraCore:
    return layer_of(model).curlora_core[adapter]


def weight_of(layer: Linear) -> Tensor:
    """W as (m, n) in fp64, by the type of the base layer alone."""
    base = layer.get_base_layer()
    weight = base.weight.detach().double()
    return weight.t() if isinstance(base, Conv1D) else weight


def orthonormal(columns: Tensor) -> Tensor:
    """Q of the QR decomposition whose R has a positive diagonal."""
    q, r = torch.linalg.qr(columns)
    return q * r.diagonal().sign()


def dense_update(layer: Linear, blocks: list[Tensor], adapter: str = "default") -> Tensor:
    """ΔW (m, n) in fp64 by the definition, from the saved indices and one U (r, r) per block."""
    core = layer.curlora_core[adapter]
    config, alpha = core.settings.config, core.settings.alpha
    weight, r = weight_of(layer), blocks[0].shape[0]
    rows, columns, _ = core.read_record()
    c, right = weight[:, columns], weight[rows]
    if config.whiten:
        c, right = orthonormal(c), orthonormal(right.t()).t()
    update = torch.zeros_like(weight)
    for i, u in enumerate(blocks):
        block = slice(i * r, (i + 1) * r)
        c_i, r_i = c[:, block], right[block]
        mean_norms = 1.0 if config.whiten else float(c_i.norm() * r_i.norm()) / r
        scale = {"none": 1.0, "rsqrt": r**-0.5, "adam": 0.58 * (weight.shape[0] / r) ** 0.5 / mean_norms}
        update = update + alpha * scale[config.scale] * c_i @ u.double() @ r_i
    return update


def tiny_llama(seed: int = 0, tied: bool = False, **config) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {"num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 32, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**settings | config, tie_word_embeddings=tied)).eval()


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32, bos_token_id=1, eos_token_id=1)
    return GPT2LMHeadModel(config).eval()


def tiny_falcon(seed: int = 0) -> FalconForCausalLM:
    """Attention and feedforward in parallel: one layer's output is added to another's in place."""
    torch.manual_seed(seed)
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    return FalconForCausalLM(FalconConfig(**settings, bias=True, bos_token_id=1, eos_token_id=2)).eval()


def tiny_deberta(seed: int = 0) -> DebertaForMaskedLM:
    torch.manual_seed(seed)
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    attention = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16}
    return DebertaForMaskedLM(DebertaConfig(**settings, **attention, vocab_size=64, max_position_embeddings=32)).eval()


MIXTURE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
MIXTURE |= {"intermediate_size": 48, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "vocab_size": 64}


def mixture_with_a_dense_block(seed: int = 0) -> Qwen3MoeForCausalLM:
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**MIXTURE, num_experts=6, head_dim=8, mlp_only_layers=[0])).eval()


def mixture_with_a_shared_expert(seed: int = 0) -> Qwen2MoeForCausalLM:
    torch.manual_seed(seed)
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**MIXTURE, num_experts=6, shared_expert_intermediate_size=24)).eval()


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    return model(tokens() if ids is None else ids).logits


def reseeded(model: nn.Module) -> nn.Module:
    """The model with every U drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".curlora_core." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()
