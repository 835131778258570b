# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from k3_folders import QUANTISATION

from modeling_attnres.conversion.checkpoint import CheckpointError
from modeling_attnres.conversion.mxfp4 import MAX_SCALE, check_mxfp4_config, decode_mxfp4, pair_experts


def exact_value(code: int, scale: int) -> Fraction:
    """An E2M1 code (sign, two bits of exponent, one of mantissa) times 2^(scale - 127), by the format's definition."""
    sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
    magnitude = Fraction(mantissa, 2) if exponent == 0 else (1 + Fraction(mantissa, 2)) * Fraction(2) ** (exponent - 1)
    return (-1) ** sign * magnitude * Fraction(2) ** (scale - 127)


def test_every_code_under_every_scale_is_exact():
    # Row s has scale byte s; its 32 columns hold all 16 codes twice, the low four bits first.
    packed = torch.tensor(
        [[(code + 1) << 4 | code for code in range(0, 16, 2)] * 2] * (MAX_SCALE + 1), dtype=torch.uint8
    )
    scale = torch.arange(MAX_SCALE + 1, dtype=torch.uint8).unsqueeze(-1)
    decoded = decode_mxfp4(packed, scale)
    assert decoded.dtype == torch.bfloat16
    assert decoded.shape == (MAX_SCALE + 1, 32)
    assert decoded.isfinite().all()
    for row, values in enumerate(decoded.double().tolist()):
        # Python's floats hold every value, so a rounding on either side would show.
        assert [Fraction(value) for value in values] == [exact_value(code, row) for code in [*range(16)] * 2], row
    assert torch.equal(decoded[:, :16].signbit(), (torch.arange(16) > 7).expand(MAX_SCALE + 1, 16))  # also of -0


@pytest.mark.parametrize("shape", [(1, 32), (3, 64), (5, 96), (130, 4096), (2, 2**20)])
def test_odd_shapes_and_runs_of_rows(shape):
    generator = torch.Generator().manual_seed(0)
    rows, columns = shape
    packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
    scale = torch.randint(100, 140, (rows, columns // 32), dtype=torch.uint8, generator=generator)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    due = values[codes.long()] * torch.exp2(scale.float() - 127).repeat_interleave(32, dim=1)
    assert torch.equal(decode_mxfp4(packed, scale), due.bfloat16())


def test_agrees_with_the_librarys_own():
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    convert = getattr(mxfp4, "_convert_moe_packed_tensors", None)
    if convert is None:
        pytest.skip("a private function of the library, which this version has no more")
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (64, 128), dtype=torch.uint8, generator=generator)
    scale = torch.randint(0, MAX_SCALE + 1, (64, 8), dtype=torch.uint8, generator=generator)
    due = convert(packed.view(1, 64, 8, 16), scale.view(1, 64, 8), dtype=torch.bfloat16)  # transposed
    assert torch.equal(decode_mxfp4(packed, scale), due[0].t())


# --- Pairs -----------------------------------------------------------------------------------------------------------


@dataclass
class Stored:
    """A tensor in memory that looks like one of a file."""

    name: str
    tensor: torch.Tensor

    def __post_init__(self):
        self.dtype, self.shape = self.tensor.dtype, tuple(self.tensor.shape)
        self.num_bytes = self.tensor.nbytes

    def read(self):
        return self.tensor


def pair(rows: int = 4, columns: int = 64, module: str = "w1", **replaced) -> list[Stored]:
    halves = {
        "weight_packed": torch.full((rows, columns // 2), 0x21, dtype=torch.uint8),
        "weight_scale": torch.full((rows, columns // 32), 128, dtype=torch.uint8),
    }
    return [
        Stored(f"{module}.{half}", tensor) for half, tensor in {**halves, **replaced}.items() if tensor is not None
    ]


def test_pairs_are_found_by_their_names_alone():
    norm = Stored("norm.weight", torch.ones(3))
    pairs = pair_experts([norm, *pair(module="a.w1"), *pair(2, 32, module="a.w2")], "folder")
    assert {name: (found.name, found.shape) for name, found in pairs.items()} == {
        "a.w1.weight_packed": ("a.w1.weight", (4, 64)),
        "a.w2.weight_packed": ("a.w2.weight", (2, 32)),
    }
    found = pairs["a.w1.weight_packed"]
    assert (found.dtype, found.num_bytes) == (torch.bfloat16, 2 * 4 * 64)
    assert torch.equal(found.read(), torch.tensor([1.0, 2.0], dtype=torch.bfloat16).repeat(4, 32))


def uint8(*shape: int, value: int = 0) -> torch.Tensor:
    return torch.full(shape, value, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (pair(weight_scale=None), r"folder: 1 packed weights have no `weight_scale`: w1\.weight_packed"),
        (pair(weight_packed=None), r"1 scales have no `weight_packed`: w1\.weight_scale"),
        ([*pair(), Stored("w1.weight", torch.ones(4, 64))], r"'w1\.weight' is stored twice, packed and unpacked"),
        (pair(weight_scale=uint8(4, 3)), r"'w1\.weight_packed' .* `weight_scale` must be \[4, 2\], got \[4, 3\]"),
        (pair(weight_scale=uint8(2, 4)), r"must be \[4, 2\], got \[2, 4\]"),
        (pair(weight_scale=torch.ones(4, 2)), r"`weight_scale` must be a uint8 matrix, got torch\.float32 \[4, 2\]"),
        (pair(weight_packed=uint8(4, 32).int()), r"`weight_packed` must be a uint8 matrix, got torch\.int32"),
        (pair(weight_packed=uint8(128)), r"`weight_packed` must be a uint8 matrix, got torch\.uint8 \[128\]"),
        (pair(weight_packed=uint8(4, 24)), "must have whole groups of 32 columns, got 48 columns"),
        (pair(weight_packed=uint8(4, 0)), "must have whole groups of 32 columns, got 0 columns"),
        (pair(weight_scale=uint8(4, 2, value=255)), r"at most 252 \(255 is NaN, 253 and 254 overflow\), got 255"),
        (pair(weight_scale=uint8(4, 2, value=253)), "got 253"),
    ],
)
def test_what_is_no_pair_is_refused_by_name(tensors, message):
    with pytest.raises(CheckpointError, match=message):
        pair_experts(tensors, "folder")


def test_decoding_checks_what_it_is_given():
    with pytest.raises(CheckpointError, match=r"Not a pair of MXFP4 tensors: .* got 254"):
        decode_mxfp4(uint8(1, 16), uint8(1, 1, value=254))
    with pytest.raises(CheckpointError, match=r"must be \[1, 1\], got \[1, 2\]"):
        decode_mxfp4(uint8(1, 16), uint8(1, 2))


# --- The config ------------------------------------------------------------------------------------------------------


def edited(path: str, value) -> dict:
    """The config of MXFP4 checkpoints with one field changed; `path` has its keys, by dots."""

    def edit(fields: dict, keys: list[str]) -> dict:
        return {**fields, keys[0]: edit(fields[keys[0]], keys[1:]) if keys[1:] else value}

    return edit(QUANTISATION, path.split("."))


def test_the_published_config_is_mxfp4():
    check_mxfp4_config(QUANTISATION, "config.json")
    check_mxfp4_config(edited("ignore", ["lm_head"]), "config.json")


WEIGHTS = "config_groups.group_0.weights"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("quant_method", "mxfp4", "quant_method='mxfp4', where 'compressed-tensors' is due"),
        ("format", "nvfp4-pack-quantized", "format='nvfp4-pack-quantized'"),
        ("kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme="),
        ("config_groups", {}, "must have `config_groups`"),
        ("config_groups", [1], "must have `config_groups`"),
        ("config_groups.group_0.format", "pack-quantized", "group_0.format='pack-quantized'"),
        ("config_groups.group_0.input_activations", {"num_bits": 8}, "group_0.input_activations="),
        (WEIGHTS, None, "`config_groups.group_0.weights` must say how, got None"),
        (f"{WEIGHTS}.num_bits", 8, "group_0.weights.num_bits=8, where 4 is due"),
        (f"{WEIGHTS}.type", "int", "weights.type='int'"),
        (f"{WEIGHTS}.group_size", 16, "weights.group_size=16"),
        (f"{WEIGHTS}.symmetric", False, "weights.symmetric=False"),
        (f"{WEIGHTS}.actorder", "group", "weights.actorder='group'"),
        (f"{WEIGHTS}.scale_dtype", "torch.float8_e4m3fn", "weights.scale_dtype="),
    ],
)
def test_other_formats_are_refused_by_the_field(path, value, message):
    with pytest.raises(CheckpointError, match=message):
        check_mxfp4_config(edited(path, value), "config.json")
