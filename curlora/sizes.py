"""The size of an adapter file, computed from shapes: works on the meta device, before any weight is read."""

from __future__ import annotations

import json

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

CODES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
"""Names of dtypes in safetensors, in the order in which it writes tensors."""


def adapter_file_bytes(model: PeftModel, adapter_name: str = "default") -> int:
    """Size in bytes of the ``adapter_model.safetensors`` that `save_pretrained` writes, for an adapter of any type."""
    return safetensors_bytes(get_peft_model_state_dict(model, adapter_name=adapter_name))


def safetensors_bytes(state: dict[str, Tensor]) -> int:
    """Size of a safetensors file: 8 bytes, a JSON header padded to a multiple of 8, then the tensors."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    order = list(CODES)
    for key, tensor in sorted(state.items(), key=lambda item: (order.index(item[1].dtype), item[0])):
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + length + (-length) % 8 + end
