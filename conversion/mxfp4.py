# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""MXFP4 weights as compressed-tensors packs them, decoded to bf16 one weight at a time.

A weight `[O, I]` is stored as two tensors. `weight_packed` `[O, I/2]` holds two E2M1 codes per byte, the even column in
the low four bits. `weight_scale` `[O, I/32]` holds one byte s per 32 columns, which stands for 2^(s - 127). A value is
its code times its scale, with no rounding: bf16 holds every product that is finite.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .checkpoint import CheckpointError, PickledTensor, StoredTensor, shorten


GROUP = 32  # columns per scale
PACKED, SCALE = ".weight_packed", ".weight_scale"
# 2^(s - 127) for larger bytes is not finite in bf16 or fp32 times the largest code, 6; 255 is not a number at all.
MAX_SCALE = 252
# Rows are decoded in runs of about this many bytes, so that the indices need little memory.
RUN_BYTES = 2**18
_CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1 without the sign bit

# What a quantisation config must say about the weights; other values are other formats.
_WEIGHTS = {
    "num_bits": (4,),
    "type": ("float",),
    "strategy": ("group",),
    "group_size": (GROUP,),
    "symmetric": (True,),
    "dynamic": (False, None),
    "actorder": (None,),
    "block_structure": (None,),
    "scale_dtype": ("torch.uint8", None),
    "zp_dtype": (None,),
}
_FORMAT = "mxfp4-pack-quantized"


def decode_mxfp4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Decodes one weight.

    Args:
        packed: `[O, I/2]` uint8.
        scale: `[O, I/32]` uint8, at most `MAX_SCALE`.

    Returns:
        `[O, I]` bf16, exact.

    Raises:
        CheckpointError: if a dtype or shape is another, or a scale is not a finite one.
    """
    if problem := _pair_problem(packed, scale) or _scale_problem(scale):
        raise CheckpointError(f"Not a pair of MXFP4 tensors: {problem}.")
    pairs = _pairs()
    decoded = torch.empty(packed.shape[0], 2 * packed.shape[1], dtype=torch.bfloat16)
    rows = max(1, RUN_BYTES // packed.shape[1])
    for start in range(0, packed.shape[0], rows):
        bytes_, scales = packed[start : start + rows], scale[start : start + rows]
        index = (scales.to(torch.int32) << 8).unsqueeze(-1) + bytes_.unflatten(-1, (-1, GROUP // 2))
        torch.index_select(pairs, 0, index.flatten(), out=decoded[start : start + rows].view(torch.int32).view(-1))
    return decoded


@cache
def _pairs() -> torch.Tensor:
    """`[256 * 256]` int32: both bf16 values of every byte under every scale."""
    codes = torch.tensor([*_CODES, *(-code for code in _CODES)], dtype=torch.float64)
    byte = torch.arange(256)
    values = torch.stack([codes[byte & 15], codes[byte >> 4]], dim=-1)
    scales = torch.ldexp(torch.ones(256, dtype=torch.float64), torch.arange(256) - 127)
    return (scales.view(-1, 1, 1) * values).to(torch.bfloat16).view(torch.int32).flatten()


@dataclass(frozen=True)
class PackedTensor:
    """A weight that is stored as a pair, decoded whenever it is read.

    Attributes:
        name: `X.weight`, where the files have `X.weight_packed` and `X.weight_scale`.
    """

    name: str
    packed: StoredTensor | PickledTensor
    scale: StoredTensor | PickledTensor

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.packed.shape[0], 2 * self.packed.shape[1])

    @property
    def num_bytes(self) -> int:
        return 4 * self.packed.num_bytes

    def read(self) -> torch.Tensor:
        return decode_mxfp4(self.packed.read(), self.scale.read())


def pair_experts(tensors: Iterable[StoredTensor | PickledTensor], where: str) -> dict[str, PackedTensor]:
    """The pairs among a checkpoint's tensors, by the name of their packed half. The two may lie in two files.

    Raises:
        CheckpointError: naming a half without the other, a pair whose dtypes or shapes are not MXFP4's, a weight that
            is also stored unpacked, or a scale byte that stands for no finite scale.
    """
    stored = {tensor.name: tensor for tensor in tensors}
    halves = {ending: [name for name in stored if name.endswith(ending)] for ending in (PACKED, SCALE)}
    alone = [name for name in halves[PACKED] if name.removesuffix(PACKED) + SCALE not in stored]
    if alone:
        raise CheckpointError(f"{where}: {len(alone)} packed weights have no `weight_scale`: {shorten(alone)}.")
    alone = [name for name in halves[SCALE] if name.removesuffix(SCALE) + PACKED not in stored]
    if alone:
        raise CheckpointError(f"{where}: {len(alone)} scales have no `weight_packed`: {shorten(alone)}.")
    pairs = {}
    for name in halves[PACKED]:
        module = name.removesuffix(PACKED)
        pair = PackedTensor(f"{module}.weight", stored[name], stored[module + SCALE])
        if pair.name in stored:
            raise CheckpointError(f"{where}: '{pair.name}' is stored twice, packed and unpacked.")
        if problem := _pair_problem(pair.packed, pair.scale) or _scale_problem(pair.scale.read()):
            raise CheckpointError(f"{where}: '{name}' and its scale are not MXFP4: {problem}.")
        pairs[name] = pair
    return pairs


def _pair_problem(packed: Any, scale: Any) -> str | None:
    """What is wrong with dtypes and shapes of a pair, if anything is."""
    for half, tensor in (("weight_packed", packed), ("weight_scale", scale)):
        if tensor.dtype != torch.uint8 or len(tensor.shape) != 2:
            return f"`{half}` must be a uint8 matrix, got {tensor.dtype} {list(tensor.shape)}"
    rows, num_bytes = packed.shape
    if num_bytes == 0 or 2 * num_bytes % GROUP:
        return f"`weight_packed` must have whole groups of {GROUP} columns, got {2 * num_bytes} columns"
    if tuple(scale.shape) != (rows, 2 * num_bytes // GROUP):
        return f"`weight_scale` must be {[rows, 2 * num_bytes // GROUP]}, got {list(scale.shape)}"
    return None


def _scale_problem(scale: torch.Tensor) -> str | None:
    if scale.numel() and (largest := int(scale.max())) > MAX_SCALE:
        return (
            f"`weight_scale` must have bytes of at most {MAX_SCALE} (255 is NaN, 253 and 254 overflow), got {largest}"
        )
    return None


def check_mxfp4_config(config: dict[str, Any], where: str):
    """Checks that a `quantization_config` describes MXFP4 weights and nothing else.

    Its `ignore` list is not asked: published ones leave out modules that are stored unpacked.

    Raises:
        CheckpointError: naming the field.
    """
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise CheckpointError(f"{where}: `quantization_config` must have `config_groups`, got {groups!r:.80}.")
    said = {"quant_method": (config.get("quant_method"), ("compressed-tensors",))}
    said["format"] = (config.get("format"), (_FORMAT,))
    said["kv_cache_scheme"] = (config.get("kv_cache_scheme"), (None,))
    for name, group in groups.items():
        weights = group.get("weights")
        if not isinstance(weights, dict):
            raise CheckpointError(f"{where}: `config_groups.{name}.weights` must say how, got {weights!r:.80}.")
        said[f"{name}.format"] = (group.get("format"), (_FORMAT, None))
        said |= {f"{name}.{side}": (group.get(side), (None,)) for side in ("input_activations", "output_activations")}
        said |= {f"{name}.weights.{field}": (weights.get(field), due) for field, due in _WEIGHTS.items()}
    for field, (found, due) in said.items():
        if found not in due:
            raise CheckpointError(
                f"{where}: quantised weights other than MXFP4 cannot be converted: `quantization_config` has "
                f"{field}={found!r:.60}, where {due[0]!r} is due."
            )
