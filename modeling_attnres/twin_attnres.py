# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""A trial against the plain model, for versions of Transformers that are newer than this release.

The probe of `backbone_attnres` follows what a backbone hands to its parts. A later Transformers may change what nobody
thought of following. So on a version that this release was not tested with, the first model around each backbone class is
preceded by a trial: a *twin*, the same architecture at a size of milliseconds, runs beside the plain model on the same
weights. With `depth_weights="sum"` and zero queries the two must agree bit for bit, without a cache and with one, with
padding and in `generate`. If they do not, the model is refused: no answer is better than a wrong one.

Letters: B batch, T tokens.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .backbone_attnres import UnsupportedBackboneError, check_language_model_head
from .compat_attnres import CACHE


# The versions that the whole test suite ran on.
TESTED_TRANSFORMERS = ("5.19.0", "5.20.2", "5.21.1", "5.22.2", "5.23.0", "5.24.0")

_VOCABULARY = 64
_HEADS = 2
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_tried: set[type[PreTrainedConfig]] = set()


def installed_version() -> str:
    """The version of Transformers that runs. Looked up anew: the library reloads itself while others are imported."""
    return sys.modules["transformers"].__version__


def check_untested_version(
    text_config: PreTrainedConfig, build_twin: Callable[[PreTrainedConfig, bool], PreTrainedModel]
):
    """On an untested Transformers, compares a backbone class with its plain model, once per process.

    Args:
        text_config: the backbone's config, of any size.
        build_twin: builds the AttnRes model of a config, `depth_weights="sum"`, with a language model head or without.

    Raises:
        UnsupportedBackboneError: with the first difference, or if the comparison cannot be run.
    """
    config_class = type(text_config)
    if installed_version() in TESTED_TRANSFORMERS or config_class in _tried:
        return
    _tried.add(config_class)  # before the twin, which is built by the code that called this
    cause = None
    try:
        difference = _first_difference(text_config, build_twin)
    except Exception as error:
        difference, cause = f"the comparison ends in {error!r}", error
    if difference is not None:
        _tried.discard(config_class)
        raise UnsupportedBackboneError(_refusal(text_config, difference)) from cause


def _refusal(text_config: PreTrainedConfig, reason: str) -> str:
    return (
        f"Backbone '{text_config.model_type}' is refused on Transformers {installed_version()}, which this release "
        f"was not tested with: a tiny model of it must equal the plain one, and {reason}. Install one of "
        f"{', '.join(TESTED_TRANSFORMERS)}, or a newer release of modeling-attnres."
    )


def _first_difference(text_config, build_twin) -> str | None:
    """Where a tiny AttnRes model with zero queries first differs from the plain one; `None` if nowhere."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    # Inside `from_pretrained` the default device is meta, and the default dtype is the checkpoint's.
    on_cpu = nullcontext() if device.type == "cpu" else torch.device("cpu")  # the context slows every call a little
    try:
        torch.set_default_dtype(torch.float32)
        with on_cpu, torch.random.fork_rng(devices=[]), torch.no_grad():
            config = shrunk_config(text_config)
            has_head = _has_plain_head(config)
            plain = (AutoModelForCausalLM if has_head else AutoModel).from_config(config).eval()
            _fill(plain)
            twin = build_twin(config, has_head).eval()
            _copy_weights(plain, twin)
            for (step, expected), (_, value) in zip(_answers(plain), _answers(twin), strict=True):
                if not torch.equal(value, expected):
                    gap = (value.double() - expected.double()).abs().max().item()
                    return f"it differs in {step} by up to {gap:.3g}"
    finally:
        torch.set_default_dtype(dtype)
    return None


def _has_plain_head(config: PreTrainedConfig) -> bool:
    try:
        check_language_model_head(config)
    except UnsupportedBackboneError:
        return False
    return True


def _answers(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """What a model says in every way of running it that a user has: a description and a tensor each."""
    ids = (torch.arange(12).view(2, 6) * 7 + 3) % _VOCABULARY
    padding = torch.ones_like(ids)
    padding[0, :2] = 0
    yield "a forward without a cache", model(input_ids=ids, use_cache=False)[0]
    steps = _generated(model, ids, padding) if model.can_generate() else _stepped(model, ids, padding)
    yield from zip(("a left-padded prefill", "cached step 1", "cached step 2", "the text of `generate`"), steps)


def _generated(model: PreTrainedModel, ids: torch.Tensor, padding: torch.Tensor) -> Iterator[torch.Tensor]:
    """The logits of each step of `generate`, then the tokens."""
    choices = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0}
    results = {"output_logits": True, "return_dict_in_generate": True}
    outputs = model.generate(ids, attention_mask=padding, **choices, **results)
    yield from (*outputs.logits, outputs.sequences)


def _stepped(model: PreTrainedModel, ids: torch.Tensor, padding: torch.Tensor) -> Iterator[torch.Tensor]:
    """The hidden states of a prefill and of two cached steps, of a model without a head."""
    outputs = model(input_ids=ids, attention_mask=padding, use_cache=True)
    yield outputs[0]
    for step in (1, 2):
        padding = torch.cat([padding, torch.ones_like(padding[:, :1])], dim=1)
        outputs = model(
            input_ids=ids[:, step, None], attention_mask=padding, use_cache=True, **{CACHE: outputs[CACHE]}
        )
        yield outputs[0]


# --- Tiny models -----------------------------------------------------------------------------------------------------


def shrunk_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the same architecture at a size that runs in milliseconds: every kind of layer once, few heads.

    Widths of heads stay, since other fields (rotary scaling, partial rotary) are written in terms of them.
    """
    fields = config.to_dict()
    for name in ("dtype", "quantization_config", "architectures", "auto_map", "transformers_version"):
        fields.pop(name, None)
    heads = fields["num_attention_heads"]
    small = {name: _small_number(name, value) for name, value in fields.items() if type(value) is int}
    head_width = fields.get("head_dim") or fields["hidden_size"] // heads
    if heads * head_width == fields["hidden_size"]:
        small["hidden_size"] = _HEADS * head_width
    if type(fields.get("linear_num_value_heads")) is int:
        small["linear_num_value_heads"] = _HEADS * fields["linear_num_value_heads"] // fields["linear_num_key_heads"]
    if type(fields.get("num_key_value_heads")) is int and fields["num_key_value_heads"] < heads:
        small["num_key_value_heads"] = 1
    layers = _one_of_each_kind(fields)
    small["num_hidden_layers"] = len(layers)
    per_layer = {
        name: [value[index] for index in layers]
        for name, value in fields.items()
        if isinstance(value, list) and len(value) == fields["num_hidden_layers"]
    }
    return type(config)(**{**fields, **small, **per_layer, **_TOKENS})


def _small_number(name: str, value: int) -> int:
    if name == "vocab_size":
        return _VOCABULARY
    if name in ("n_group", "topk_group", "num_expert_group", "first_k_dense_replace"):
        return min(value, 1)
    if "per_tok" in name or name in ("moe_k", "moe_topk"):
        return min(value, 2)
    if name.endswith("experts"):
        return min(value, 4)
    if name.endswith(("hidden_size", "intermediate_size", "lora_rank", "ffn_dim")):
        return min(value, 32)
    if name.startswith("linear_") and name.endswith("_head_dim"):
        return min(value, 16)
    if name.endswith("_heads"):
        return min(value, _HEADS)
    return value


def _one_of_each_kind(fields: dict) -> list[int]:
    """Indices of decoder layers, at least two, that together have every value of every list with an entry per layer."""
    count = fields["num_hidden_layers"]
    lists = [value for value in fields.values() if isinstance(value, list) and len(value) == count]
    kinds: dict[tuple, int] = {}
    for index in range(count):
        kinds.setdefault(tuple(str(value[index]) for value in lists), index)
    first = list(kinds.values())
    return sorted({*first, *range(min(2, count))})


def _fill(model: nn.Module):
    """Weights that are the same everywhere and leave no part of a layer at nothing; norms near one."""
    if any(tensor.is_meta for tensor in itertools.chain(model.parameters(), model.buffers())):
        # The caller builds models without weights, for example in accelerate's `init_empty_weights`.
        model.to_empty(device="cpu")
        model.apply(model._init_weights)
    for index, parameter in enumerate(model.parameters()):
        waves = torch.sin(torch.arange(parameter.numel(), dtype=torch.float32) * 1.7 + index).view(parameter.shape)
        parameter.copy_(1 + 0.1 * waves if parameter.ndim < 2 else 0.2 * waves)


def _copy_weights(plain: PreTrainedModel, twin: PreTrainedModel):
    """Gives the twin every tensor of the plain model, buffers too, and depth attention its start."""
    if any(tensor.is_meta for tensor in itertools.chain(twin.parameters(), twin.buffers())):
        twin.to_empty(device="cpu")
    weights = dict(itertools.chain(plain.named_parameters(), plain.named_buffers()))
    for name, tensor in itertools.chain(twin.named_parameters(), twin.named_buffers()):
        if name.endswith("depth_attention.query"):
            tensor.zero_()
        elif name.endswith("depth_attention.key_norm"):
            tensor.fill_(1.0)
        else:
            tensor.copy_(weights[name])


__all__ = ["TESTED_TRANSFORMERS", "check_untested_version", "shrunk_config"]
