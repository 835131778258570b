# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Reading checkpoint folders without trusting them: every header is checked before any weight is read."""

import json
import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch


# What the safetensors library itself accepts at most; a larger one is an attack or damage.
MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = 100_000_000

# Names of the format -> dtypes.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Other dtypes of the format: numbers of fewer bits, which mean something with their scales only.
QUANTISED_DTYPES = ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class ConversionError(ValueError):
    """A conversion cannot be done as asked; the message names what, why and what was found. Nothing was written."""


class CheckpointError(ConversionError):
    """A checkpoint is damaged, incomplete or not what its config says."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file, not read yet.

    Attributes:
        offset: of its first byte in the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The tensor in memory of its own: not memory-mapped, so reading a shard does not keep it resident."""
        data = torch.empty(self.num_bytes, dtype=torch.uint8)
        with self.file.open("rb") as file:
            file.seek(self.offset)
            if file.readinto(data.numpy().data) != self.num_bytes:
                raise CheckpointError(f"{self.file}: ends inside tensor '{self.name}'.")
        return data.view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class PickledTensor:
    """One tensor of a `.bin` file, memory-mapped by `torch.load(weights_only=True)`."""

    name: str
    tensor: torch.Tensor = field(repr=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def num_bytes(self) -> int:
        return self.tensor.numel() * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        return self.tensor.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose headers are sound.

    Attributes:
        config: `config.json` as it is.
        shards: the weight files in order of name, each with its tensors.
    """

    folder: Path
    config: dict[str, Any]
    shards: Mapping[Path, Sequence[StoredTensor | PickledTensor]]

    @cached_property
    def tensors(self) -> dict[str, StoredTensor | PickledTensor]:
        return {tensor.name: tensor for tensors in self.shards.values() for tensor in tensors}

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; keys given twice, other values than objects, and files beyond 100 MB are errors."""
    if not path.is_file():
        raise CheckpointError(f"{path}: file is missing.")
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: {size} bytes, more than the {MAX_JSON_BYTES} allowed for JSON.")
    return _parse_json(path.read_bytes(), str(path))


def _parse_json(data: bytes, where: str) -> dict[str, Any]:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            raise CheckpointError(f"{where}: key given twice: {', '.join(twice)}.")
        return values

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=without_duplicates)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON ({type(error).__name__}: {error}).") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {type(value).__name__}.")
    return value


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: unless the header is sound and describes exactly the bytes that the file has.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise CheckpointError(
                f"{file}: truncated or not a safetensors file ({size} bytes, header of {length} bytes announced)."
            )
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{file}: header of {length} bytes, more than the {MAX_HEADER_BYTES} allowed.")
        header = _parse_json(stream.read(length), f"{file}: header")
    header.pop("__metadata__", None)

    placed = []
    for name, entry in header.items():
        dtype, shape, begin, end = _header_entry(file, name, entry)
        num_bytes = math.prod(shape) * dtype.itemsize
        if end - begin != num_bytes:
            raise CheckpointError(
                f"{file}: tensor '{name}' ({dtype}, shape {list(shape)}) needs {num_bytes} bytes, the header gives it "
                f"{end - begin}."
            )
        placed.append((begin, end, StoredTensor(name, dtype, shape, file, 8 + length + begin)))
    placed.sort(key=lambda item: item[:2])
    position = 0
    for begin, end, tensor in placed:
        if begin != position:
            raise CheckpointError(
                f"{file}: tensor '{tensor.name}' starts at byte {begin} of the data where byte {position} is due "
                "(tensors overlap or leave a gap)."
            )
        position = end
    if position != size - 8 - length:
        raise CheckpointError(
            f"{file}: the header describes {position} bytes of data, the file holds {size - 8 - length} (truncated?)."
        )
    return [tensor for _, _, tensor in placed]


def _header_entry(file: Path, name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    def is_sizes(value: Any) -> bool:
        return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{file}: tensor '{name}' must have dtype, shape and data_offsets, got {entry!r:.200}.")
    if entry["dtype"] in QUANTISED_DTYPES:
        raise CheckpointError(
            f"{file}: quantised weights ('{name}' has dtype {entry['dtype']}) cannot be converted; save the model "
            "dequantised first."
        )
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{file}: tensor '{name}' has dtype {entry['dtype']!r:.50}; known are {', '.join(DTYPES)}."
        )
    if not is_sizes(entry["shape"]) or not is_sizes(entry["data_offsets"]) or len(entry["data_offsets"]) != 2:
        raise CheckpointError(
            f"{file}: tensor '{name}' has shape {entry['shape']!r:.100} and data_offsets "
            f"{entry['data_offsets']!r:.100}; lists of sizes are due."
        )
    return DTYPES[entry["dtype"]], tuple(entry["shape"]), *entry["data_offsets"]


def _read_pickled(file: Path) -> list[PickledTensor]:
    try:
        # The format before torch 1.6 is no zip archive and cannot be mapped: its files are read whole.
        mmap = zipfile.is_zipfile(file)
        state_dict = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file}: a pickled checkpoint that `torch.load(weights_only=True)` does not load is refused, because "
            f"unpickling it could run code. Save it as safetensors first. ({first_line(error)})"
        ) from None
    except (RuntimeError, ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{file}: damaged, or not a file of `torch.save` ({first_line(error)}).") from None
    if not isinstance(state_dict, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state_dict.items()
    ):
        raise CheckpointError(f"{file}: expected a dict of tensors by name.")
    return [PickledTensor(name, tensor) for name, tensor in state_dict.items()]


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Reads config and headers of a checkpoint folder: `model.safetensors`, shards with an index, or `.bin` files.

    Raises:
        CheckpointError: if a file is missing, damaged or ambiguous, or a tensor is stored twice.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    present = [name for name in (SAFETENSORS, SAFETENSORS_INDEX, PICKLED, PICKLED_INDEX) if (folder / name).is_file()]
    if not present:
        raise CheckpointError(f"{folder}: holds none of {SAFETENSORS}, {SAFETENSORS_INDEX}, {PICKLED}.")
    if {SAFETENSORS, SAFETENSORS_INDEX} <= set(present):
        raise CheckpointError(f"{folder}: holds {SAFETENSORS} and {SAFETENSORS_INDEX}; remove the one that is stale.")
    weights = present[0]
    read = read_header if weights in (SAFETENSORS, SAFETENSORS_INDEX) else _read_pickled
    index = read_index(folder / weights) if weights.endswith(".json") else None
    files = sorted(set(index.values())) if index is not None else [weights]
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: missing shard: {', '.join(missing)} (named by {weights}).")
    shards = {folder / name: read(folder / name) for name in files}
    _check_shards(folder, shards, index)
    return Checkpoint(folder, config, shards)


def read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of an index: tensor name -> name of a shard beside it."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no `weight_map`.")
    for name, file in weight_map.items():
        # A shard is a file beside the index; a path could lead anywhere.
        if not isinstance(file, str) or not re.fullmatch(r"[\w.\-]+\.(safetensors|bin)", file):
            raise CheckpointError(f"{path}: tensor '{name}' is in {file!r:.100}, not the name of a shard beside it.")
    return weight_map


def _check_shards(folder: Path, shards: Mapping[Path, Sequence], index: dict[str, str] | None):
    homes: dict[str, str] = {}
    for file, tensors in shards.items():
        for tensor in tensors:
            if tensor.name in homes:
                raise CheckpointError(
                    f"{folder}: tensor '{tensor.name}' is stored twice, in {homes[tensor.name]} and {file.name}."
                )
            homes[tensor.name] = file.name
    if index is not None and homes != index:
        wrong = sorted(name for name in homes.keys() | index.keys() if homes.get(name) != index.get(name))
        raise CheckpointError(
            f"{folder}: index and shards disagree on {len(wrong)} tensors: {shorten(wrong)} (for the first, the index "
            f"says {index.get(wrong[0])}, the shards {homes.get(wrong[0])})."
        )
    if not homes:
        raise CheckpointError(f"{folder}: holds no tensors.")


def shorten(names: Iterator[str] | list[str], limit: int = 8) -> str:
    """Names as a list for an error message, cut after `limit`."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def first_line(error: Exception) -> str:
    """An error of another library for use inside a message: its first line that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
