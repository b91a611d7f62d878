"""Embeddings and convolutions: the same update, against the dense formula on their weights as matrices."""

import pytest
import torch
from curlora_cases import orthonormal, randomise, tiny_llama, tokens
from peft import PeftModel, get_peft_model
from torch import nn

from curlora import CurloraConfig
from curlora.conversion import to_lora

LAYERS = {
    "embedding": (lambda: nn.Embedding(30, 12), lambda: torch.randint(0, 30, (5, 4))),
    "embedding with padding": (lambda: nn.Embedding(30, 12, padding_idx=3), lambda: torch.randint(0, 30, (5, 4))),
    "conv1d": (lambda: nn.Conv1d(4, 10, 3, padding=1), lambda: torch.randn(5, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 10, 3, stride=2, padding=1), lambda: torch.randn(5, 4, 9, 7)),
    "conv2d without bias": (lambda: nn.Conv2d(4, 10, (3, 2), bias=False), lambda: torch.randn(5, 4, 9, 7)),
    "conv2d, reflecting": (
        lambda: nn.Conv2d(4, 9, 3, padding=1, padding_mode="reflect"),
        lambda: torch.randn(5, 4, 8, 8),
    ),
    "conv2d 1×1": (lambda: nn.Conv2d(12, 10, 1), lambda: torch.randn(5, 12, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(3, 10, 2, dilation=2), lambda: torch.randn(2, 3, 5, 6, 5)),
}


class One(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.lin = layer

    def forward(self, x):
        return self.lin(x)


def base(kind, seed=0):
    torch.manual_seed(seed)
    return One(LAYERS[kind][0]())


def inputs(kind):
    torch.manual_seed(7)
    return LAYERS[kind][1]()


def wrapped(kind, **config):
    model = get_peft_model(base(kind), CurloraConfig(**{"r": 4, "target_modules": ["lin"]} | config)).eval()
    randomise(model, std=0.5)
    return model


def dense(model, kind, x):
    """The layer with W + ΔW, by the definition: ΔW = s C U R of the weight as a matrix (m, n)."""
    layer = model.base_model.model.lin
    core = layer.curlora_core["default"]
    stored = layer.get_base_layer().weight.detach().double()
    matrix = stored.t() if kind.startswith("embedding") else stored.flatten(1)
    rows, columns, _ = core.read_record()
    c, r = orthonormal(matrix[:, columns]), orthonormal(matrix[rows].t()).t()
    update = 0.58 * (len(matrix) / core.settings.r) ** 0.5 * c @ core.U.detach().double() @ r
    copy = LAYERS[kind][0]().double()
    copy.load_state_dict(layer.get_base_layer().state_dict())
    copy.weight.data = stored + (update.t() if kind.startswith("embedding") else update.view(stored.shape))
    return copy, copy(x if x.dtype == torch.long else x.double())


@pytest.mark.parametrize("kind", LAYERS)
def test_forward_gradients_merging_and_files_agree_with_the_dense_formula(kind, tmp_path):
    model, x = wrapped(kind), inputs(kind)
    reference, expected = dense(model, kind, x)
    found = model(x)
    assert torch.allclose(found.double(), expected, atol=1e-4)
    grad = torch.randn_like(found)
    (found * grad).sum().backward()
    (expected * grad.double()).sum().backward()
    core = model.base_model.model.lin.curlora_core["default"]
    left, right = core.left.double() / core.norm_left[0, 0], core.right.double()
    whole = reference.weight.grad.t() if kind.startswith("embedding") else reference.weight.grad.flatten(1)
    stored = model.base_model.model.lin.get_base_layer().weight.detach().double()
    matrix = stored.t() if kind.startswith("embedding") else stored.flatten(1)
    wanted = core.norm_left[0, 0] * (matrix[:, core.cols] @ left).t() @ whole @ (right @ matrix[core.rows]).t()
    assert torch.allclose(core.U.grad.double(), wanted, rtol=1e-3, atol=1e-3)

    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(PeftModel.from_pretrained(base(kind), tmp_path / "adapter").eval()(x), found)
    if kind in ("conv3d", "conv2d, reflecting"):
        with pytest.raises(
            ValueError, match="lin: PEFT's LoRA of a convolution knows neither dilation nor padding_mode"
        ):
            to_lora(model, tmp_path / "lora")
    else:
        to_lora(model, tmp_path / "lora")
        assert torch.allclose(PeftModel.from_pretrained(base(kind), tmp_path / "lora").eval()(x), found, atol=1e-4)
    model.merge_adapter(safe_merge=True)
    assert torch.allclose(model(x), found, atol=1e-4)
    model.unmerge_adapter()
    assert torch.allclose(model(x), found, atol=1e-4)
    merged = model.merge_and_unload()
    assert type(merged.lin) is type(base(kind).lin) and torch.allclose(merged(x), found, atol=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
def test_mixed_batches_half_precision_dropout_and_a_changed_weight(kind):
    model, x = wrapped(kind, dropout=0.5), inputs(kind)
    model.add_adapter("other", CurloraConfig(r=3, target_modules=["lin"], init_weights=False))
    names = (["default", "other", "__base__"] * 2)[: len(x)]
    rows = []
    for row, name in zip(x, names, strict=True):
        model.set_adapter("default" if name == "__base__" else name)
        layer = model.base_model.model.lin
        rows.append(layer.get_base_layer()(row[None]) if name == "__base__" else model(row[None]))
    assert torch.allclose(model(x, adapter_names=names), torch.cat(rows), atol=1e-5)

    model.set_adapter("default")
    expected = model(x)
    model.train()
    assert not torch.allclose(model(x), expected, atol=1e-4)
    model.eval()
    half = model.to(torch.bfloat16)(x if x.dtype == torch.long else x.to(torch.bfloat16))
    assert torch.allclose(half.float(), expected, atol=0.1 * float(expected.abs().max()))
    with torch.no_grad():
        model.base_model.model.lin.get_base_layer().weight.mul_(1.5)
    with pytest.warns(UserWarning, match="has changed"):
        model(x if x.dtype == torch.long else x.to(torch.bfloat16))


def test_a_tied_embedding_is_adapted_and_untied_by_a_merge():
    model = get_peft_model(tiny_llama(tied=True), CurloraConfig(r=4, target_modules=["embed_tokens"])).eval()
    randomise(model)
    expected = model(tokens()).logits
    merged = model.merge_and_unload()
    assert torch.allclose(merged(tokens()).logits, expected, atol=1e-4)
    assert torch.equal(merged.lm_head.weight, tiny_llama(tied=True).lm_head.weight)


def test_what_cannot_be_adapted_says_why():
    config = {"r": 2, "target_modules": ["lin"]}
    with pytest.raises(ValueError, match=r"lin: a convolution with groups=2 cannot be adapted"):
        get_peft_model(One(nn.Conv2d(4, 8, 3, groups=2)), CurloraConfig(**config))
    with pytest.raises(ValueError, match="lin: selection='activation' is measured on dense layers only"):
        get_peft_model(base("conv2d"), CurloraConfig(**config, selection="activation"))
    with pytest.raises(ValueError, match="lin: a layer of type LayerNorm cannot be adapted"):
        get_peft_model(One(nn.LayerNorm(4)), CurloraConfig(**config))
