# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The models under test: one set of random weights, run by every variant, and the gate that they agree.

Letters: B batch, T tokens, D hidden size, L sublayers, S sublayers per block.
"""

import copy
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from modeling_attnres import AttnResConfig, AttnResForCausalLM

from .figure2 import Figure2ForCausalLM


@dataclass(frozen=True)
class Shape:
    """A Llama backbone and its block size S."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    sublayers_per_block: int

    @property
    def num_sublayers(self) -> int:
        return 2 * self.num_layers

    def text_config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
        )

    def narrow(self) -> "Shape":
        """The same depth and blocks at a width of 16, for counts that do not depend on the width."""
        return replace(self, hidden_size=16, num_heads=2, num_key_value_heads=1, intermediate_size=32, vocab_size=64)


PRESETS = {
    "8B": Shape(4096, 32, 32, 8, 14336, 128256, sublayers_per_block=8),
    "135M": Shape(576, 30, 9, 3, 1536, 49152, sublayers_per_block=8),
    "1024": Shape(1024, 16, 16, 8, 2816, 32000, sublayers_per_block=4),
    "tiny": Shape(64, 4, 4, 2, 128, 256, sublayers_per_block=4),
}

# name -> (implementation, S or None for the shape's, depth_weights)
VARIANTS = {
    "figure2": ("figure2", None, "mean"),
    "block": ("attnres", None, "mean"),
    "full": ("attnres", 1, "mean"),
    "block-sum": ("attnres", None, "sum"),
    "full-sum": ("attnres", 1, "sum"),
    "figure2-full": ("figure2", 1, "mean"),
}

# Random models amplify rounding: a variant may be this many times as far from fp64 as Figure 2 in its own dtype is.
GATE_FACTOR = 3.0


class EqualityGateError(RuntimeError):
    """Two variants that must agree do not, so their times mean nothing."""


@dataclass(frozen=True)
class Lineup:
    """The PreNorm base and its variants, all on the same parameters.

    Attributes:
        shape: of the base.
        models: `"base"` and the variants by name.
        query, key_norm: `[L, D]`, shared by the variants.
    """

    shape: Shape
    models: dict[str, nn.Module]
    query: nn.Parameter
    key_norm: nn.Parameter

    @property
    def device(self) -> torch.device:
        return self.query.device

    def clear_gradients(self):
        for parameter in (*self.models["base"].parameters(), self.query, self.key_norm):
            parameter.grad = None


def build_lineup(
    shape: Shape,
    variants: list[str],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    query_std: float = 0.03,
    device: torch.device | str = "cpu",
) -> Lineup:
    """The stock model with random weights and the named variants around it.

    Args:
        variants: names out of `VARIANTS`.
        query_std: standard deviation of the queries; not zero, so that no variant has an easy case.
        device: where all of it lies.

    Raises:
        ValueError: on an unknown variant.
    """
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown:
        raise ValueError(f"`variants` must be out of {list(VARIANTS)}, got {unknown}.")
    torch.manual_seed(seed)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(shape.text_config(), dtype=dtype)
        size = (shape.num_sublayers, shape.hidden_size)
        query = nn.Parameter((torch.randn(size) * query_std).to(dtype))
        key_norm = nn.Parameter((1 + 0.1 * torch.randn(size)).to(dtype))
    models = {"base": base, **{name: _variant(base, shape, name, query, key_norm) for name in variants}}
    for model in models.values():
        model.eval()
    return Lineup(shape, models, query, key_norm)


def _variant(base, shape: Shape, name: str, query: nn.Parameter, key_norm: nn.Parameter) -> nn.Module:
    implementation, sublayers_per_block, depth_weights = VARIANTS[name]
    sublayers_per_block = sublayers_per_block or shape.sublayers_per_block
    eps = base.config.rms_norm_eps
    if implementation == "figure2":
        return Figure2ForCausalLM(base, query, key_norm, eps, sublayers_per_block, depth_weights == "sum")
    config = AttnResConfig(
        text_config=copy.deepcopy(base.config), sublayers_per_block=sublayers_per_block, depth_weights=depth_weights
    )
    with torch.device("meta"):
        model = AttnResForCausalLM(config)
    state = base.state_dict(keep_vars=True) | {
        "model.depth_attention.query": query,
        "model.depth_attention.key_norm": key_norm,
    }
    # With `assign` the parameters themselves are shared, not copied: every variant reads the same memory.
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = base.model.rotary_emb
    return model


def random_tokens(shape: Shape, batch: int, tokens: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """`[B, T]` token ids, always the same."""
    return torch.randint(shape.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(device)


def check_equality(lineup: Lineup, tokens: int = 16) -> dict[str, float]:
    """The equality gate: every variant must compute what Figure 2 does, as exactly as Figure 2 does.

    The reference is Figure 2 in fp64. A variant's error (largest difference of a logit over the largest logit) may be
    `GATE_FACTOR` times that of Figure 2 in the variant's own dtype. Under `"sum"` zero queries must also give the
    base's logits bit for bit.

    Args:
        lineup: the models.
        tokens: length of the sequence compared.

    Returns:
        The error of each variant, Figure 2 itself among them.

    Raises:
        EqualityGateError: naming the variant, its error and the tolerance.
    """
    shape, base = lineup.shape, lineup.models["base"]
    input_ids = random_tokens(shape, 1, tokens, lineup.device)
    base64 = copy.deepcopy(base).double()
    errors: dict[str, float] = {}
    for name, model in lineup.models.items():
        if name == "base":
            continue
        _, sublayers_per_block, depth_weights = VARIANTS[name]
        arguments = (
            base.config.rms_norm_eps,
            sublayers_per_block or shape.sublayers_per_block,
            depth_weights == "sum",
        )
        exact = Figure2ForCausalLM(base64, lineup.query.double(), lineup.key_norm.double(), *arguments)
        peer = Figure2ForCausalLM(base, lineup.query, lineup.key_norm, *arguments)
        with torch.no_grad():
            reference = exact(input_ids).logits
            tolerance = GATE_FACTOR * _error(peer(input_ids).logits, reference)
            errors[name] = _error(model(input_ids=input_ids).logits, reference)
        if not errors[name] <= tolerance:
            raise EqualityGateError(
                f"'{name}' is {errors[name]:.2e} away from Figure 2 in fp64, more than the tolerance {tolerance:.2e}."
            )
        if depth_weights == "sum":
            _check_zero_queries(name, model, base, lineup.query, input_ids)
    return errors


def _error(logits: torch.Tensor, reference: torch.Tensor) -> float:
    return ((logits.double() - reference).abs().max() / reference.abs().max()).item()


@torch.no_grad()
def _check_zero_queries(name, model, base, query, input_ids):
    queries = query.clone()
    query.zero_()
    try:
        same = torch.equal(model(input_ids=input_ids).logits, base(input_ids=input_ids).logits)
    finally:
        query.copy_(queries)
    if not same:
        raise EqualityGateError(f"'{name}' with zero queries does not give the logits of the PreNorm base.")
