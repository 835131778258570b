# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""How the kernels of depth attention are launched: where they can run, their fixed tiles, checks of arguments.

Letters: D hidden size, n sources of a mix, R queries read together, `*` the dimensions of the tokens ([B, T] or [M]).
"""

import importlib.util
import os
from typing import NamedTuple

import torch


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HIDDEN_SIZE = 8192
# A program of phase 1 holds the scores of all sources by all rows in registers.
MAX_SOURCES, MAX_ROWS = 32, 16

# Fixed launch configurations, the same for every device: nothing is tuned, and equal inputs give equal bits.
# Merge: a program per token. A thread holds 16 elements of each tensor, in half precision two loads of 16 bytes.
MERGE_ELEMENTS = 16
# Backward of the merge: registers also hold two sums over tokens, so a thread holds only 16 bytes of each tensor. A program
# holds a slice of a token of at most 8 KB: more threads would leave each of them too few registers.
SLICE_BYTES, THREAD_BYTES = 8192, 16
# Programs that share the tokens in backward: several for each multiprocessor, and few partial sums to add up at the end.
BACKWARD_PROGRAMS = 512
# Phase 1: a program per token and slice of columns. A thread holds 32 elements of the R sums.
ROWS_ELEMENTS, ROWS_WIDTH, ROWS_WARPS = 8192, 1024, 8
# Backward of phase 1: one warp per token, so that sums over rows and over columns stay within the warp.
ROWS_BACKWARD_ELEMENTS, ROWS_BACKWARD_WIDTH = 2048, 256
# Decoding: tokens are few, so each gets many threads, of 8 elements and all the registers there are. The sources are scored
# in chunks of 4 elements a thread, several of which then load at a time.
DECODE_ELEMENTS, DECODE_CHUNK_ELEMENTS = 8, 4
# Registers of a multiprocessor, and the most that a thread can have.
REGISTERS, THREAD_REGISTERS = 65536, 255


class Tile(NamedTuple):
    """How one program of a kernel is laid out.

    Attributes:
        width: columns of its tile, a power of two.
        warps: of 32 threads.
        registers: the most that a thread may take; `None` leaves it to the assembler, which aims at many programs at a
            time and may spill a few bytes for one more.
    """

    width: int
    warps: int
    registers: int | None = None

    def options(self) -> dict[str, int | None]:
        """As Triton takes them at a launch."""
        return {"num_warps": self.warps, "maxnreg": self.registers}


def power_of_two(number: int) -> int:
    """The next power of two: the sizes that tiles have."""
    return 1 << (number - 1).bit_length()


def merge_tile(hidden_size: int) -> Tile:
    width = max(64, power_of_two(hidden_size))
    return Tile(width, max(1, width // (32 * MERGE_ELEMENTS)))


def merge_backward_tile(hidden_size: int, element_size: int) -> Tile:
    width = min(merge_tile(hidden_size).width, SLICE_BYTES // element_size)
    return Tile(width, max(1, width * element_size // (32 * THREAD_BYTES)))


def rows_tile(hidden_size: int, num_rows: int) -> Tile:
    width = min(ROWS_WIDTH, ROWS_ELEMENTS // power_of_two(num_rows), power_of_two(hidden_size))
    return Tile(width, ROWS_WARPS)


def rows_backward_tile(hidden_size: int, num_rows: int) -> Tile:
    width = min(ROWS_BACKWARD_WIDTH, ROWS_BACKWARD_ELEMENTS // power_of_two(num_rows), power_of_two(hidden_size))
    return Tile(width, 1, THREAD_REGISTERS)


def decode_tile(hidden_size: int) -> Tile:
    width = max(256, power_of_two(hidden_size))
    warps = min(16, width // (32 * DECODE_ELEMENTS))
    return Tile(width, warps, min(THREAD_REGISTERS, REGISTERS // (32 * warps)))


def decode_chunk(hidden_size: int, num_sources: int) -> int:
    """Columns of the `[n, columns]` tile in which a decode step scores all sources."""
    elements = 32 * DECODE_CHUNK_ELEMENTS * decode_tile(hidden_size).warps
    return max(16, elements // power_of_two(num_sources))


def available(
    device: torch.device, dtype: torch.dtype, hidden_size: int, num_sources: int = 1, num_rows: int = 1
) -> str | None:
    """Why the kernels cannot run on tensors of `device` and `dtype` with these D, n and R; `None` if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'modeling-attnres[triton]')"
    if dtype not in DTYPES:
        return f"they compute in fp32, and {dtype} is none of fp32, bf16 and fp16"
    if not 1 <= hidden_size <= MAX_HIDDEN_SIZE:
        return f"a hidden size of {hidden_size} is not between 1 and {MAX_HIDDEN_SIZE}"
    if not (1 <= num_sources <= MAX_SOURCES and 1 <= num_rows <= MAX_ROWS):
        return f"{num_sources} sources by {num_rows} rows are not between 1 and {MAX_SOURCES} by {MAX_ROWS}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None  # Triton's interpreter runs on any device
    return _why_not_on(torch.device(device))


def _why_not_on(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"{device} is not a CUDA device"
    if torch.version.hip is not None:
        return "they were compiled for NVIDIA devices alone"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def runs_kernels(like: torch.Tensor, num_sources: int, num_rows: int) -> bool:
    """Whether a forward over `like` `[B, T, D]` runs kernels: see [`plan_depth`] for `ATTNRES_KERNELS`."""
    asked = os.environ.get("ATTNRES_KERNELS", "auto")
    if asked not in ("auto", "off", "on"):
        raise ValueError(f"`ATTNRES_KERNELS` must be one of 'auto', 'off' and 'on', got {asked!r}.")
    if asked == "off" or (asked == "auto" and like.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"):
        return False
    reason = available(like.device, like.dtype, like.shape[-1], num_sources, num_rows)
    if reason and asked == "on":
        raise ValueError(f"`ATTNRES_KERNELS=on` asks for kernels, which cannot run here: {reason}.")
    return reason is None


def uses_kernel(impl: str, like: torch.Tensor, num_sources: int = 1, num_rows: int = 1) -> bool:
    """Whether `impl` asks for a kernel, which must then be able to run on tensors like `like` `[..., D]`."""
    if impl not in ("torch", "triton"):
        raise ValueError(f'`impl` must be "torch" or "triton", got {impl!r}.')
    if impl == "triton" and (reason := available(like.device, like.dtype, like.shape[-1], num_sources, num_rows)):
        raise ValueError(f'`impl="triton"` needs tensors that the kernels can run on: {reason}.')
    return impl == "triton"


def check_tensor(
    name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
):
    if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype or tensor.device != device):
        got = f"{list(tensor.shape)}, {tensor.dtype}, {tensor.device}"
        raise ValueError(f"`{name}` must be {list(shape)}, {dtype}, {device}, got {got}.")


def check_written_in_place(name: str, tensor: torch.Tensor | None):
    if tensor is not None and not tensor.is_contiguous():
        raise ValueError(f"`{name}` is written in place and must be contiguous, got strides {tensor.stride()}.")


def check_no_gradients(function: str, **tensors: torch.Tensor | None):
    if torch.is_grad_enabled():
        needed = [name for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad]
        if needed:
            raise ValueError(
                f"`{function}` is not differentiable and needs torch.no_grad(), got gradients for {needed}."
            )


def contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def rms_norm(values: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm as Llama's: statistics in fp32 at least, rounded, then times `weight`."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(values.dtype)
