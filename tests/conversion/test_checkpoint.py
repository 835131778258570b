# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import edit_json, weights

from modeling_attnres.conversion import CheckpointError, convert
from modeling_attnres.conversion import checkpoint as checkpoint_module
from modeling_attnres.conversion.checkpoint import DTYPES, open_checkpoint, read_header


NAME = "model.norm.weight"


def rewrite_header(file: Path, change):
    """Applies `change` to the parsed header of a safetensors file, which may also return its new bytes."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    changed = change(header)
    encoded = changed if isinstance(changed, bytes) else json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])


def announce_bytes(file: Path, length: int, size: int | None = None):
    """Announces a header of `length` bytes; the file is made `size` bytes long without taking that much disk."""
    with file.open("r+b") as stream:
        stream.write(length.to_bytes(8, "little"))
        if size is not None:
            stream.truncate(size)


def set_entry(**fields):
    return lambda header: header[NAME].update(fields)


def twice(header):
    entry = json.dumps(header[NAME])
    return json.dumps(header)[:-1].encode() + f', "{NAME}": {entry}}}'.encode()


def shift(header):
    for entry in header.values():
        if "data_offsets" in entry:
            entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]


# What is done to a sound single-file checkpoint -> what is said about it.
DAMAGE = {
    "file cut": (lambda file: file.write_bytes(file.read_bytes()[:-100]), "describes 148608 bytes of data, the file holds 148508"),
    "file empty": (lambda file: file.write_bytes(b""), "truncated or not a safetensors file"),
    "file longer": (lambda file: file.write_bytes(file.read_bytes() + b"x"), "the header describes"),
    "header beyond the file": (lambda file: announce_bytes(file, 2**60), "header of 1152921504606846976 bytes announced"),
    "header bomb": (lambda file: announce_bytes(file, 2**30, 2**31), "more than the 100000000 allowed"),
    "header no JSON": (lambda file: rewrite_header(file, lambda _: b"{not json"), "not valid JSON"),
    "header no object": (lambda file: rewrite_header(file, lambda _: b"[1]"), "expected a JSON object, got list"),
    "header nested deeply": (lambda file: rewrite_header(file, lambda _: b"[" * 10**6), "not valid JSON"),
    "header number without end": (lambda file: rewrite_header(file, lambda _: b'{"a":' + b"9" * 10**5), "not valid JSON"),
    "header no text": (lambda file: rewrite_header(file, lambda _: b"\xff\xfe{}"), "not valid JSON"),
    "key twice": (lambda file: rewrite_header(file, twice), f"key given twice: {NAME}"),
    "unknown dtype": (lambda file: rewrite_header(file, set_entry(dtype="F12")), "has dtype 'F12'; known are F64"),
    "dtype of scales": (lambda file: rewrite_header(file, set_entry(dtype="F8_E8M0")), "quantised weights .* has dtype F8_E8M0"),
    "narrower dtype": (lambda file: rewrite_header(file, set_entry(dtype="F16")), "needs 64 bytes, the header gives it 128"),
    "integer dtype": (lambda file: rewrite_header(file, set_entry(dtype="I32")), "not floating point: model.norm.weight"),
    "dtype no name": (lambda file: rewrite_header(file, set_entry(dtype=3)), "has dtype 3"),
    "negative size": (lambda file: rewrite_header(file, set_entry(shape=[-32])), r"has shape \[-32\]"),
    "size overflows": (lambda file: rewrite_header(file, set_entry(shape=[2**62, 2**62])), "needs .* bytes, the header"),
    "size no number": (lambda file: rewrite_header(file, set_entry(shape=[True])), "lists of sizes are due"),
    "field missing": (lambda file: rewrite_header(file, lambda header: header[NAME].pop("shape") and None), "must have dtype"),
    "field unknown": (lambda file: rewrite_header(file, set_entry(code="import os")), "must have dtype, shape and data_offsets"),
    "offsets overlap": (lambda file: rewrite_header(file, set_entry(data_offsets=[0, 128])), "overlap or leave a gap"),
    "offsets shifted": (lambda file: rewrite_header(file, shift), "starts at byte 4 of the data where byte 0 is due"),
    "other shape": (lambda file: rewrite_header(file, set_entry(shape=[4, 8])), r"shape of model.norm.weight: \[4, 8\]"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_with_the_reason(tmp_path, llama, damage):
    do, message = DAMAGE[damage]
    do(llama / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        convert(llama, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def edit_weight_map(folder: Path, change):
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    change(weight_map)
    edit_json(index, weight_map=weight_map)


def store_twice(folder: Path):
    first = sorted(folder.glob("*.safetensors"))[0]
    tensors = {**weights(folder)}
    save_file({name: tensors[name] for name in (NAME, *(entry.name for entry in read_header(first)))}, first)


SHARD_DAMAGE = {
    "missing shard": (
        lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(),
        "missing shard: model-00002-of",
    ),
    "truncated shard": (
        lambda folder: (path := sorted(folder.glob("*.safetensors"))[1]).write_bytes(path.read_bytes()[:-1]),
        r"model-00002-of-\d+\.safetensors: the header describes",
    ),
    "tensor stored twice": (store_twice, f"tensor '{NAME}' is stored twice, in model-00001-of"),
    "index without a tensor": (
        lambda folder: edit_weight_map(folder, lambda weight_map: weight_map.pop(NAME)),
        f"index and shards disagree on 1 tensors: {NAME}",
    ),
    "index names a wrong shard": (
        lambda folder: edit_weight_map(
            folder, lambda weight_map: weight_map.update({NAME: weight_map["model.embed_tokens.weight"]})
        ),
        f"index and shards disagree on 1 tensors: {NAME}",
    ),
    "index leads elsewhere": (
        lambda folder: edit_weight_map(folder, lambda weight_map: weight_map.update({NAME: "../x.safetensors"})),
        "not the name of a shard beside it",
    ),
    "index empty": (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "has no `weight_map`"),
    "two sets of weights": (
        lambda folder: save_file({NAME: torch.ones(32)}, folder / "model.safetensors"),
        "remove the one that is stale",
    ),
}


@pytest.mark.parametrize("damage", SHARD_DAMAGE)
def test_damaged_sets_of_shards_are_refused_with_the_reason(tmp_path, sharded_llama, damage):
    do, message = SHARD_DAMAGE[damage]
    do(sharded_llama)
    with pytest.raises(CheckpointError, match=message):
        convert(sharded_llama, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["sharded"]


def test_a_folder_without_weights_or_config_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: file is missing"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds none of model\.safetensors"):
        open_checkpoint(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        open_checkpoint(tmp_path)


class _Payload:
    """Would create a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_pickled_code_is_refused_and_not_run(tmp_path, llama, save):
    save({NAME: torch.ones(32), "payload": _Payload(tmp_path / "was here")}, llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"weights_only=True.* does not load is refused"):
        convert(llama, tmp_path / "out")
    assert not (tmp_path / "was here").exists()


def test_pickled_file_of_something_else(tmp_path, llama):
    torch.save({"epoch": 3}, llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="expected a dict of tensors by name"):
        convert(llama, tmp_path / "out")


def test_config_that_is_too_long_or_no_object(tmp_path, llama, monkeypatch):
    (llama / "config.json").write_text('["llama"]')
    with pytest.raises(CheckpointError, match="expected a JSON object, got list"):
        open_checkpoint(llama)
    monkeypatch.setattr(checkpoint_module, "MAX_JSON_BYTES", 5)
    with pytest.raises(CheckpointError, match="9 bytes, more than the 5 allowed"):
        open_checkpoint(llama)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_tensors_are_read_as_they_were_saved(tmp_path, dtype):
    tensors = {
        "matrix": (torch.arange(12).view(3, 4) % 2).to(dtype),
        "scalar": torch.ones((), dtype=dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    for stored in read_header(tmp_path / "model.safetensors"):
        tensor = stored.read()
        assert (tensor.dtype, tensor.shape) == (dtype, tensors[stored.name].shape)
        assert torch.equal(tensor.view(-1).view(torch.uint8), tensors[stored.name].view(-1).view(torch.uint8))
        assert stored.num_bytes == tensor.numel() * dtype.itemsize
