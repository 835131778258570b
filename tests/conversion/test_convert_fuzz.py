# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Random damage: whatever is done to a checkpoint, it converts to a model that computes the same, or says why not."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import edit_json, save_backbone

from modeling_attnres import UnsupportedBackboneError
from modeling_attnres.conversion import ConversionError, convert


SHARD_PATTERN = "model*.safetensors"


def a_shard(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob(SHARD_PATTERN)))


def flip_header_bits(folder: Path, rng: random.Random):
    """One to four bits anywhere in the length and the header of a shard."""
    file = a_shard(folder, rng)
    data = bytearray(file.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def change_size(folder: Path, rng: random.Random):
    file = a_shard(folder, rng)
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.7 else data + bytes(rng.randint(1, 99)))


def edit_tensors(folder: Path, rng: random.Random):
    """Drops, renames or reshapes a tensor; the index may or may not follow."""
    file = a_shard(folder, rng)
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    what = rng.choice(["drop", "rename", "transpose", "flatten", "slice", "cast"])
    new_name = name
    if what == "rename":
        new_name = rng.choice([name + ".x", name.replace("layers.1", "layers.7"), "model." + name, name[1:], ""])
    tensor = {
        "transpose": lambda: tensor.t().contiguous(),
        "flatten": lambda: tensor.reshape(-1),
        "slice": lambda: tensor[: rng.randrange(len(tensor))].clone(),
        "cast": lambda: tensor.to(rng.choice([torch.float16, torch.float64, torch.int32, torch.bool])),
    }.get(what, lambda: tensor)()
    if what != "drop":
        tensors[new_name] = tensor
    save_file(tensors, file)
    index = folder / "model.safetensors.index.json"
    if index.exists() and rng.random() < 0.7:
        weight_map = json.loads(index.read_text())["weight_map"]
        weight_map.pop(name, None)
        weight_map.update(dict.fromkeys([] if what == "drop" else [new_name], file.name))
        edit_json(index, weight_map=weight_map)


def edit_header(folder: Path, rng: random.Random):
    """Another value for a field of an entry, or for the entry."""
    file = a_shard(folder, rng)
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entry = header[rng.choice(sorted(name for name in header if name != "__metadata__"))]
    field = rng.choice(["dtype", "shape", "data_offsets"])
    entry[field] = rng.choice(["F16", "I32", "U8", [], [1], [0, 4], [2**40, 2**41], -1, None, {}, [[1]], "F32", 1.5])
    encoded = json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])


def edit_config(folder: Path, rng: random.Random):
    field = rng.choice(
        ["num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "model_type", "intermediate_size"]
        + ["tie_word_embeddings", "rms_norm_eps", "hidden_act", "num_key_value_heads", "head_dim", "dtype"]
    )
    value = rng.choice([0, 1, -1, 3, 64, "x", [], True, 1e9, 2**70, {"a": 1}, "float16", "qwen3", "gemma2"])
    edit_json(folder / "config.json", **{field: value})


def lose_a_file(folder: Path, rng: random.Random):
    rng.choice(sorted(folder.iterdir())).unlink()


CORRUPTIONS = (flip_header_bits, change_size, edit_tensors, edit_header, edit_config, lose_a_file)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    small = {"num_hidden_layers": 2, "hidden_size": 16, "vocab_size": 48, "num_attention_heads": 2}
    return [
        save_backbone(folder / "one", "llama", tie_word_embeddings=True, **small),
        save_backbone(folder / "shards", "mixtral", max_shard_size="20KB", **small),
    ]


def run_case(case: int, sources: list[Path], folder: Path) -> str:
    """Damages a copy of a source and converts it; returns "converted" or "refused"."""
    rng = random.Random(case)
    corruption = CORRUPTIONS[case % len(CORRUPTIONS)]
    source, out = folder / f"source{case}", folder / f"out{case}"
    shutil.copytree(rng.choice(sources), source)
    corruption(source, rng)
    try:
        report = convert(source, out)
    except (ConversionError, UnsupportedBackboneError) as error:
        refusal = str(error)
    else:
        refusal = None
    exists = out.exists()
    shutil.rmtree(source)
    shutil.rmtree(out, ignore_errors=True)
    assert exists == (refusal is None), f"case {case}"
    if refusal is not None:
        assert len(refusal) > 20, f"case {case}: {refusal}"
        return "refused"
    assert report.max_logit_difference == 0.0, f"case {case}"
    return "converted"


@pytest.mark.parametrize("cases", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_damage_is_refused_or_harmless(tmp_path, sources, cases):
    outcomes = [run_case(case, sources, tmp_path) for case in range(cases)]
    assert not list(tmp_path.iterdir())  # nothing partial is left
    print(f"\n{cases} cases: {outcomes.count('refused')} refused, {outcomes.count('converted')} converted")
    # Damage that changes nothing (a flipped bit in the padding) is rare, but there is some.
    assert outcomes.count("refused") > 0.7 * cases
    assert outcomes.count("converted") > 0
