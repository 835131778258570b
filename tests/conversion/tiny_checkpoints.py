# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints on disk, and how conversions of them are compared."""

import filecmp
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_backbones import tiny_backbone, tiny_inputs
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def save_backbone(folder: Path, model_type: str = "llama", dtype=torch.float32, max_shard_size="50GB", **overrides):
    """A plain PreNorm checkpoint with random weights, as its own library would save it."""
    torch.manual_seed(0)
    config = tiny_backbone(model_type, **overrides)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def save_tokenizer(folder: Path):
    """A tokenizer of whole words."""
    words = {word: index for index, word in enumerate(["<unk>", "depth", "attends", "over", "blocks"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files by name."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def edit_json(path: Path, **changes):
    """Sets fields of a JSON file; `None` removes one."""
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


def aligned(model):
    """The model with every tensor at its own allocation: equal weights then multiply the same way, bit for bit."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model.eval()


def load(folder: Path, dtype: torch.dtype, model_class=AutoModelForCausalLM):
    return aligned(model_class.from_pretrained(folder, dtype=dtype))


@torch.no_grad()
def logits_with_and_without_cache(model, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Logits `[2, B, T, V]` of a prefill, and of a prefill of all but three tokens that are then decoded one by one."""
    tokens = tiny_inputs() if tokens is None else tokens
    output = model(tokens[:, :-3], use_cache=True)
    parts = [output.logits]
    for position in range(tokens.shape[1] - 3, tokens.shape[1]):
        output = model(tokens[:, position : position + 1], past_key_values=output.past_key_values, use_cache=True)
        parts.append(output.logits)
    return torch.stack([model(tokens, use_cache=False).logits, torch.cat(parts, dim=1)])


def same_files(a: Path, b: Path, patterns: tuple[str, ...]) -> bool:
    """Whether both folders have the same files of these names, byte for byte, and any at all."""
    names = {file.name for pattern in patterns for file in a.glob(pattern)}
    others = {file.name for pattern in patterns for file in b.glob(pattern)}
    return bool(names) and names == others and sorted(filecmp.cmpfiles(a, b, names, shallow=False)[0]) == sorted(names)
