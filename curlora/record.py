"""The record that every adapted layer saves: its rows and columns, a fingerprint of its base, and a checksum of U.

It is one int32 tensor with rows (k), columns (k), fingerprint (blocks, 3) as float bits and the checksum, k =
blocks·r: a single tensor because a header entry takes more bytes than its content, and an integer one because casting
a model to bf16 leaves integers unchanged. Only a file holds a checksum; in memory it is 0.
"""

from __future__ import annotations

import json
import math
import os
import struct
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor

from . import cur

EXACT_TOLERANCE = 0.01
"""Largest relative deviation of the base fingerprint that another float dtype can cause."""

QUANTISED_TOLERANCE = 0.20
"""Largest relative deviation that an 8 or 4 bit base can cause."""


class BaseMismatchError(ValueError):
    """The adapter was made for another base model."""


def length(k: int, blocks: int) -> int:
    """Number of int32 entries of a record."""
    return 2 * k + 3 * blocks + 1


def pack(rows: Tensor, columns: Tensor, fingerprint: Tensor) -> Tensor:
    """Indices (k) int64 and fingerprint (blocks, 3) float32 as one record, without a checksum."""
    bits = fingerprint.float().contiguous().view(torch.int32).flatten()
    return torch.cat([rows.int(), columns.int(), bits, torch.zeros(1, dtype=torch.int32)])


def unpack(record: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (k) int64, columns (k) int64 and fingerprint (blocks, 3) float32, on the CPU."""
    record = record.cpu()
    fingerprint = record[2 * k : -1].contiguous().view(torch.float32).view(-1, 3)
    return record[:k].long(), record[k : 2 * k].long(), fingerprint


def check_indices(key: str, kind: str, indices: Tensor, limit: int) -> None:
    """Raise ValueError unless the indices are distinct and within [0, limit)."""
    inside = bool(((indices >= 0) & (indices < limit)).all())
    if not inside or len(indices.unique()) != len(indices):
        raise ValueError(
            f"{key}: the {kind} indices of the adapter are not {len(indices)} different integers below {limit}; the "
            "file is damaged or was made for another base model."
        )


# -------------------------------------------------------------------------------------------------- the fingerprint


def fingerprint(weight: Tensor, rows: cur.Factor, columns: cur.Factor, r: int) -> Tensor:
    """‖C_i‖_F, ‖R_i‖_F and Σ W[I_i, J_i] of each block i, (blocks, 3) float32 on the CPU."""
    result = []
    for start in range(0, len(rows.indices), r):
        block = slice(start, start + r)
        crossing = _crossing(weight, rows.indices[block], columns.indices[block])
        result.append(
            [
                float(columns.triangle[:, block].norm()),
                float(rows.triangle[:, block].norm()),
                float(crossing.sum()),
            ]
        )
    return torch.tensor(result, dtype=torch.float32)


def _crossing(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """W[I, J] (r, r) float64 on the CPU."""
    return weight[rows.to(weight.device)][:, columns.to(weight.device)].detach().cpu().double()


def block_norms(weight: Tensor, rows: cur.Factor, columns: cur.Factor, r: int) -> Tensor:
    """‖W[I_i, J_i]‖_F of each block, (blocks,)."""
    starts = range(0, len(rows.indices), r)
    blocks = [_crossing(weight, rows.indices[s : s + r], columns.indices[s : s + r]) for s in starts]
    return torch.tensor([float(block.norm()) for block in blocks])


def _deviation(expected: Tensor, found: Tensor, block_norms: Tensor) -> float:
    """Largest relative deviation between two fingerprints (blocks, 3).

    A sum of r² entries of both signs may be near zero, so its deviation is relative to twice ‖W[I, J]‖_F, which
    rounding changes little (bf16: 0.1 %, 4 bit: 5 %) and other weights change by about 70 %.
    """
    scale = torch.stack([found[:, 0], found[:, 1], torch.maximum(2 * block_norms, found[:, 2].abs())], dim=1)
    deviation = (expected - found).abs() / scale.clamp_min(torch.finfo(torch.float32).tiny)
    return float(deviation.nan_to_num(math.inf).max())


def check_base(key: str, expected: Tensor, found: Tensor, block_norms: Tensor, quantised: bool) -> float:
    """Raise BaseMismatchError if the base is not the one that the adapter was made for; return its deviation.

    ``expected`` is the saved fingerprint, ``found`` that of the base at hand, both (blocks, 3). What another float
    dtype can cause passes silently, what quantisation can cause passes with a warning.
    """
    deviation = _deviation(expected, found, block_norms)
    if deviation <= EXACT_TOLERANCE:
        return deviation
    if quantised and deviation <= QUANTISED_TOLERANCE:
        warnings.warn(
            f"{key}: the quantised base differs by {deviation:.1%} from the one the adapter was trained on.",
            stacklevel=2,
        )
        return deviation
    limit = QUANTISED_TOLERANCE if quantised else EXACT_TOLERANCE
    raise BaseMismatchError(
        f"{key}: the adapter was made for another base model: its fingerprint (‖C‖, ‖R‖, ΣW[I, J]) is "
        f"{expected.tolist()}, this base gives {found.tolist()} (deviation {deviation:.1%}, allowed {limit:.0%}). "
        "Load the base that base_model_name_or_path in adapter_config.json names, in any dtype."
    )


# -------------------------------------------------------------------------------- the state dict of a whole adapter


def checksum(*tensors: Tensor | None) -> int:
    """A non-zero signed 32 bit CRC of the values of the tensors, equal for a bf16 tensor and its fp32 copy."""
    crc = 0
    for tensor in tensors:
        if tensor is not None:
            crc = zlib.crc32(tensor.detach().cpu().float().contiguous().numpy().tobytes(), crc)
    return (crc or 1) - (1 << 32) * (crc >= 1 << 31)


def seal(directory: str | os.PathLike, replace: bool = True) -> None:
    """Write the checksum of each U into the adapter file of a directory; after editing that file on purpose.

    ``replace=False`` leaves the checksums that are there. Saving an adapter does this by itself. Only the file holds
    checksums: in memory U changes, is averaged and cast.
    """
    path = Path(directory) / SAFETENSORS_WEIGHTS_NAME
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    with safe_open(path, framework="pt") as file:
        found = {
            8 + length + header[key]["data_offsets"][1] - 4: _checksum_of(file, key, header)
            for key in header
            if key.endswith(".record") and (replace or not int(file.get_tensor(key)[-1]))
        }
    with open(path, "r+b") as file:
        for place, value in found.items():
            file.seek(place)
            file.write(struct.pack("<i", value))


def _checksum_of(file: safe_open, key: str, names: Iterable[str]) -> int:
    stem = key.removesuffix("record")
    return checksum(*(file.get_tensor(stem + name) for name in ("U", "frozen") if stem + name in names))


def check_whole(state: dict[str, Tensor]) -> None:
    """Raise ValueError if a U is an empty shard of ZeRO-3: the file would look valid and contain nothing."""
    for key in state:
        if not key.endswith(".record"):
            continue
        stem = key.removesuffix("record")
        current = state.get(stem + "U")
        if current is None or current.dim() != 2 or current.numel() == 0:
            shape = None if current is None else tuple(current.shape)
            raise ValueError(
                f"{stem}U has shape {shape}: ZeRO-3 has partitioned or dropped it. Save through Trainer.save_model, "
                "or pass a state_dict with the gathered parameters to save_pretrained."
            )


def check_sum(key: str, record: Tensor, current: Tensor, frozen: Tensor | None) -> None:
    """Raise ValueError if a record holds a checksum, as a file does, and U is not what it was computed from."""
    if record.is_meta or current.is_meta or int(record[-1]) in (0, checksum(current, frozen)):
        return
    raise ValueError(
        f"{key}: U does not match the checksum that was saved with it: the adapter file is damaged. Restore it from a "
        "copy (or, if you changed the file on purpose, call curlora.seal(directory))."
    )


def check_state(adapter_name: str, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Raise ValueError if an adapter's file is incomplete, damaged, or belongs to other layers or another rank.

    ``expected``: the tensors of this adapter in the model, of which only keys and shapes matter.
    """
    _refuse(adapter_name, "lacks", [key for key in expected if key not in found])
    _refuse(adapter_name, "has no layer in this model for", [key for key in found if key not in expected])
    for key, tensor in found.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(
                f"{key} has shape {tuple(tensor.shape)} in the file, but adapter_config.json says "
                f"{tuple(expected[key].shape)}: the file was saved with another r, rank_pattern or number of blocks."
            )
    for key, record in found.items():
        if key.endswith(".record"):
            stem = key.removesuffix("record")
            check_sum(stem.removesuffix("."), record, found[stem + "U"], found.get(stem + "frozen"))


def _refuse(adapter_name: str, problem: str, keys: list[str]) -> None:
    if keys:
        raise ValueError(
            f"The file of adapter {adapter_name!r} {problem} {len(keys)} entries, such as {keys[0]!r}: it is "
            "truncated or was saved with other target_modules; load the file that belongs to this adapter_config.json."
        )
