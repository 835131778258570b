# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Writing checkpoint folders tensor by tensor, and putting them in place only when they are complete."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch
from tqdm import tqdm

from .checkpoint import DTYPE_NAMES, SAFETENSORS, SAFETENSORS_INDEX, ConversionError


COPY_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write; `read` gives it when its turn comes, in this dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class OutputShard:
    """A weight file to write.

    Attributes:
        copy_of: a safetensors file that already holds exactly these tensors, to be copied byte for byte.
    """

    tensors: list[OutputTensor]
    copy_of: Path | None = None

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)


def write_shards(folder: Path, shards: list[OutputShard]):
    """Writes the weight files and, if there are several, their index, with a progress bar."""
    names = [SAFETENSORS]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    with tqdm(total=sum(map(_file_bytes, shards)), unit="B", unit_scale=True, desc="Writing weights") as progress:
        for name, shard in zip(names, shards, strict=True):
            if shard.copy_of is not None:
                _copy_file(shard.copy_of, folder / name, progress)
            else:
                write_safetensors(folder / name, shard.tensors, progress)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards) for tensor in shard.tensors}
        total_size = sum(shard.num_bytes for shard in shards)
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _file_bytes(shard: OutputShard) -> int:
    return shard.copy_of.stat().st_size if shard.copy_of is not None else len(_header(shard.tensors)) + shard.num_bytes


def _copy_file(source: Path, target: Path, progress: tqdm):
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(COPY_CHUNK_BYTES):
            writer.write(chunk)
            progress.update(len(chunk))


def _write_order(tensors: list[OutputTensor]) -> list[OutputTensor]:
    """Wide dtypes first, so that every tensor starts at a multiple of its item size; by name for repeatable files."""
    return sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))


def _header(tensors: list[OutputTensor]) -> bytes:
    """Start of a safetensors file: the header's length (8 bytes, little endian), and the header as JSON."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in _write_order(tensors):
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.num_bytes],
        }
        position += tensor.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % 64)  # data on a cache line, for readers that map the file
    return len(encoded).to_bytes(8, "little") + encoded


def write_safetensors(path: Path, tensors: list[OutputTensor], progress: tqdm | None = None):
    """A safetensors file with one tensor in memory at a time, which the library's own writer cannot do."""
    progress = tqdm(disable=True) if progress is None else progress
    header = _header(tensors)
    with path.open("wb") as file:
        file.write(header)
        progress.update(len(header))
        for tensor in _write_order(tensors):
            file.write(_bytes_of(tensor))
            progress.update(tensor.num_bytes)


def _bytes_of(tensor: OutputTensor) -> memoryview:
    data = tensor.read()
    if data.dtype != tensor.dtype or tuple(data.shape) != tuple(tensor.shape):
        raise RuntimeError(
            f"'{tensor.name}' was announced as {tensor.dtype} {tensor.shape}, got {data.dtype} {tuple(data.shape)}."
        )
    return data.contiguous().view(-1).view(torch.uint8).numpy().data


def check_output(out: Path, source: Path | None, overwrite: bool):
    """Checks that `out` can be written, before any work.

    Raises:
        ConversionError: if it exists and may not be replaced, or lies inside the source.
    """
    if out.is_symlink():
        raise ConversionError(f"`out` must not be a link, got {out} (to {os.readlink(out)}).")
    resolved = out.resolve()
    longest = _longest_name(resolved.parent)
    if len(os.fsencode(out.name)) > longest:
        raise ConversionError(
            f"`out` must have a name of at most {longest} bytes, got {len(os.fsencode(out.name))}: {out.name[:40]}..."
        )
    if source is not None and (resolved == source.resolve() or source.resolve() in resolved.parents):
        raise ConversionError(f"`out` must not be the source or lie inside it, got {out} for the source {source}.")
    if source is not None and resolved in source.resolve().parents:
        raise ConversionError(f"`out` must not contain the source, got {out} for the source {source}.")
    if not resolved.parent.is_dir():
        raise ConversionError(f"`out` must lie in a folder that exists, got {out}.")
    if not out.exists():
        return
    if not overwrite:
        raise ConversionError(f"`out` exists: {out}. Choose another folder, or replace it with --overwrite.")
    if resolved == Path.cwd() or resolved in Path.cwd().parents:
        raise ConversionError(f"`out` must not be or contain the working folder, which would be replaced: {resolved}.")
    if not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").is_file()):
        raise ConversionError(f"`out` exists and is not a model folder, so --overwrite does not replace it: {out}.")


def _longest_name(folder: Path) -> int:
    """Bytes that a name in `folder` can have so that those of the folders beside it fit too."""
    try:
        allowed = os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError, AttributeError):
        allowed = 255  # the limit of every file system in common use; the folder itself is checked elsewhere
    return allowed - len(_replaced(Path("x")).name) + 1


@contextmanager
def workspace(out: Path) -> Iterator[Path]:
    """A folder beside `out` to work in, removed however the work ends.

    What a killed run left behind is cleared first; a run that is still alive is refused.
    """
    folder = out.parent / f".{out.name}.partial"
    lock = filelock.FileLock(out.parent / f".{out.name}.lock")
    try:
        # Here, because a lock that cannot be made looks like one that is held.
        Path(lock.lock_file).touch()
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ConversionError(f"`out` is being written by another conversion: {out}.") from None
    except OSError as error:
        raise ConversionError(f"`out` must lie in a folder that takes files, got {out} ({error.strerror}).") from error
    try:
        _finish_replacement(out)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ConversionError(f"No space left while writing {out}: nothing was written ({error}).") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def put_in_place(complete: Path, out: Path):
    """Moves a complete folder to `out`, which it replaces if it exists."""
    for file in complete.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())  # a rename must not outlive the data after a power cut
    replaced = _replaced(out)
    if out.exists():
        out.rename(replaced)
    try:
        complete.rename(out)
    except OSError:
        if replaced.exists():
            replaced.rename(out)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _replaced(out: Path) -> Path:
    return out.parent / f".{out.name}.replaced"


def _finish_replacement(out: Path):
    """Clears up after a run killed between the two renames of [`put_in_place`]: the old folder comes back."""
    replaced = _replaced(out)
    if replaced.exists() and not out.exists():
        replaced.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)


def check_space(folder: Path, num_bytes: int):
    """Raises `ConversionError` if `folder`'s file system has less than `num_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ConversionError(f"No space for the result: {num_bytes:,} bytes needed in {folder}, {free:,} free.")
