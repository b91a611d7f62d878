"""Which data types a device computes in, and what `base_model.dtype: auto` means there."""

from __future__ import annotations

import torch

EMULATED = 6.5  # times the time of float32: bfloat16 on a processor without instructions for it


def best_dtype(device: str) -> str:
    """bfloat16 if the device computes in it, else float32.

    Args:
        device: "cuda" or "cpu", of this process.
    """
    return "bfloat16" if computes_bfloat16(device) else "float32"


def computes_bfloat16(device: str) -> bool:
    """Whether the device has instructions for bfloat16, so that nothing is emulated."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # x86-64; ARM
