# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""One training run of ablation_puzzle.py: the variants, the condition, and what is measured.

Letters: B batch, T tokens, D hidden size, L sublayers, n sources of a mix.
"""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, set_seed


sys.path.insert(0, str(Path(__file__).parent))

from pretrain import build_model, read_texts, to_blocks, train_tokenizer

from modeling_attnres import AttnResConfig
from modeling_attnres.depth_attention_attnres import DepthAttention
from modeling_attnres.depth_variants_attnres import (
    InputDependentDepthAttention,
    SourcesForm,
    StaticMixing,
    learned_scalars,
    normed_scores,
    softmax,
)
from modeling_attnres.depth_weights_attnres import source_norm
from modeling_attnres.eval.depth_weights import mean_depth_weights
from modeling_attnres.training import attnres_parameter_groups


LENGTH, VOCABULARY = 128, 2048
LOGIT_SCALE = 16


# --- Variants that only this study has -------------------------------------------------------------------------------


class QueryAndProjection(InputDependentDepthAttention):
    """The projection with the pseudo-query as its bias: `w_l + W_l RMSNorm_l(v_n)`."""

    def __init__(self, config: AttnResConfig):
        super().__init__(config)
        self.query = nn.Parameter(torch.zeros_like(self.key_norm))

    def forward(self, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        projections, norm_floor = super().forward(embedding)
        queries = self.query * self.key_norm * math.sqrt(self.key_norm.shape[-1])
        bias = nn.functional.pad(queries, (0, 0, 1, 0)).unsqueeze(-1)
        return torch.cat([projections, bias], dim=-1), norm_floor


def biased_scores(projection: torch.Tensor, values: torch.Tensor, norm_floor: torch.Tensor) -> torch.Tensor:
    normed = values / source_norm(values, norm_floor)
    return (normed * (normed[-1] @ projection[:, :-1].mT + projection[:, -1])).sum(-1)


def scores_from_the_stream(projection: torch.Tensor, values: torch.Tensor, norm_floor: torch.Tensor) -> torch.Tensor:
    """Queries from the sum of all sources, which a plain model calls the hidden state, not from the latest source."""
    normed, stream = values / source_norm(values, norm_floor), values.sum(0)
    return (normed * ((stream / source_norm(stream, norm_floor)) @ projection.mT)).sum(-1)


def scores_of_mean_keys(query: torch.Tensor, values: torch.Tensor, norm_floor: torch.Tensor) -> torch.Tensor:
    """`w_l . mean(RMSNorm_l(v_i))` over all tokens of the batch: the method's parameters, and the same weights for all.

    A control only: the mean contains later tokens.
    """
    keys = (values / source_norm(values, norm_floor)).mean((1, 2), keepdim=True)
    return (keys @ query).expand(values.shape[:-1])


class QueryAndLogits(DepthAttention):
    """The pseudo-query with a learned logit per source beside it: `w_l . RMSNorm_l(v_i) + b_{l,i}`.

    The logits are kept divided by `LOGIT_SCALE`, so that with Adam they learn at as many times the rate of the query.
    """

    def __init__(self, config: AttnResConfig):
        super().__init__(config.num_sublayers, config.text_config.hidden_size, config.depth_norm_eps)
        self.logits = nn.Parameter(torch.zeros(config.num_sublayers, config.num_blocks + 1))

    def forward(self, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        queries, norm_floor = super().forward(embedding)
        return torch.cat([queries, LOGIT_SCALE * nn.functional.pad(self.logits, (0, 0, 1, 0))], dim=-1), norm_floor


def scores_and_logits(parameters: torch.Tensor, values: torch.Tensor, norm_floor: torch.Tensor) -> torch.Tensor:
    query, logits = parameters.split([values.shape[-1], len(parameters) - values.shape[-1]])
    return normed_scores(query, values, norm_floor) + logits[: len(values)].view(-1, 1, 1)


class StaticLogits(StaticMixing):
    """Scalars that go through a softmax, and start at zero: static, but neither negative nor above 1."""

    def __init__(self, config: AttnResConfig):
        super().__init__(config)
        nn.init.zeros_(self.mixing_weights)


def frozen_key_norms(model: PreTrainedModel):
    model.model.depth_attention.key_norm.requires_grad_(False)


def replaced(module: type[nn.Module] | None, form: SourcesForm):
    def change(model: PreTrainedModel):
        if module is not None:
            model.model.depth_attention = module(model.config)
        model.model.depth_form = form

    return change


# name -> fields of the configuration (None: the plain backbone), and what is changed in the model that is built
VARIANTS = {
    "prenorm": (None, None),
    "full": ({}, None),
    "static": ({"depth_attention_type": "static"}, None),
    "input-dependent": ({"depth_attention_type": "input_dependent"}, None),
    "sigmoid": ({"depth_attention_type": "sigmoid"}, None),
    "no-key-norm": ({"depth_attention_type": "no_key_norm"}, None),
    "sliding-window": ({"depth_attention_type": "sliding_window"}, None),
    "block-s2": ({"sublayers_per_block": 2}, None),
    "block-s4": ({"sublayers_per_block": 4}, None),
    "block-s8": ({"sublayers_per_block": 8}, None),
    "block-s16": ({"sublayers_per_block": 16}, None),
    "block-n8": ({"sublayers_per_block": None}, None),  # eight blocks, or one a sublayer if there are fewer
    "block-s4-heads16": ({"sublayers_per_block": 4, "depth_attention_type": "multi_head"}, None),
    "block-s4-no-key-norm": ({"sublayers_per_block": 4, "depth_attention_type": "no_key_norm"}, None),
    # Of this study alone
    "static-softmax": (
        {"depth_attention_type": "static"},
        replaced(StaticLogits, SourcesForm(learned_scalars, softmax)),
    ),
    "query-and-logits": ({}, replaced(QueryAndLogits, SourcesForm(scores_and_logits))),
    "full-mean-keys": ({}, replaced(None, SourcesForm(scores_of_mean_keys))),
    "query-and-projection": (
        {"depth_attention_type": "input_dependent"},
        replaced(QueryAndProjection, SourcesForm(biased_scores)),
    ),
    "input-dependent-from-stream": (
        {"depth_attention_type": "input_dependent"},
        replaced(None, SourcesForm(scores_from_the_stream)),
    ),
    "full-frozen-key-norm": ({}, frozen_key_norms),
    "input-dependent-frozen-key-norm": ({"depth_attention_type": "input_dependent"}, frozen_key_norms),
}
# --- One run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A variant under a condition: what its file is named after.

    Attributes:
        variant: a name in `VARIANTS`.
        seed: of the weights and of the batches.
        lr, depth_lr: learning rates of the backbone and of the depth parameters.
        layers: decoder layers, L / 2.
        width: D.
        steps, batch: optimizer steps, and blocks of `LENGTH` tokens in each.
        query_std: of the depth parameters at the start (0: uniform weights).
        muon: whether projections are trained by Muon, everything else by AdamW as ever.
    """

    variant: str
    seed: int = 0
    lr: float = 3e-3
    depth_lr: float = 3e-3
    layers: int = 6
    width: int = 64
    steps: int = 320
    batch: int = 8
    query_std: float = 0.0
    muon: bool = False

    @property
    def name(self) -> str:
        condition = f"{self.layers}x{self.width}-{self.steps}x{self.batch}-std{self.query_std:g}{'-muon' * self.muon}"
        return f"{self.variant}-{condition}-lr{self.lr:g}-depth{self.depth_lr:g}-seed{self.seed}"


class Data:
    """Blocks `[n, LENGTH]` of the text: for training, for choosing rates, and for reporting."""

    def __init__(self, folder: Path):
        texts, held_out_texts = read_texts(folder)
        self.tokenizer = train_tokenizer(texts, VOCABULARY)
        split = [to_blocks(self.tokenizer, part, LENGTH).with_format("torch") for part in (texts, held_out_texts)]
        self.train, held_out = (blocks["input_ids"][:] for blocks in split)
        self.choosing, self.reporting = held_out[0::8], held_out[1::4]

    def batches(self, run: "Run") -> Iterator[torch.Tensor]:
        """`[batch, LENGTH]` each, in an order that depends on the seed alone."""
        generator = torch.Generator().manual_seed(run.seed)
        epochs = math.ceil(run.steps * run.batch / len(self.train))
        order = torch.cat([torch.randperm(len(self.train), generator=generator) for _ in range(epochs)])
        for chosen in order[: run.steps * run.batch].split(run.batch):
            yield self.train[chosen]


def has_depth_attention(run: Run) -> bool:
    return VARIANTS[run.variant][0] is not None


def build(run: Run, data: Data) -> PreTrainedModel:
    fields, change = VARIANTS[run.variant]
    heads = max(1, run.width // 32)
    text_config = {
        "num_hidden_layers": run.layers,
        "hidden_size": run.width,
        "intermediate_size": run.width * 11 // 4,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }
    overrides = {} if fields is None else {**fields, "depth_query_init_std": run.query_std}
    set_seed(run.seed)
    preset = "llama-800k-prenorm" if fields is None else "llama-800k-full"
    model = build_model(preset, {"text_config": text_config, **overrides}, data.tokenizer)
    if change is not None:
        change(model)
    return model


def parameter_groups(model: PreTrainedModel, run: Run) -> list[dict]:
    if has_depth_attention(run):
        return attnres_parameter_groups(model, run.lr, run.depth_lr, weight_decay=0.1)
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "lr": run.lr, "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "lr": run.lr, "weight_decay": 0.0},
    ]


class MuonOfSlices(torch.optim.Muon):
    """Muon for a stack of matrices `[L, D, D]`, each orthogonalised by itself; steps as large as those of AdamW."""

    def __init__(self, stack: nn.Parameter, lr: float):
        self.stack, slices = stack, [nn.Parameter(matrix) for matrix in stack.data.unbind(0)]  # of the same memory
        super().__init__(slices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    def step(self, closure=None):
        for matrix, gradient in zip(self.param_groups[0]["params"], self.stack.grad.unbind(0)):
            matrix.grad = gradient
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True):
        self.stack.grad = None


def build_optimizers(model: PreTrainedModel, run: Run) -> list[torch.optim.Optimizer]:
    stacks = [model.model.depth_attention.query_projection] if run.muon else []
    groups = parameter_groups(model, run)
    for group in groups:
        group["params"] = [p for p in group["params"] if not any(p is stack for stack in stacks)]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    return [adamw, *(MuonOfSlices(stack, run.depth_lr) for stack in stacks)]


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine to zero."""
    warm = max(1, steps // 20)
    if step < warm:
        return step / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@torch.no_grad()
def loss_on(model: PreTrainedModel, blocks: torch.Tensor) -> float:
    """Nats per predicted token."""
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in blocks.split(32)]
    return sum(losses) / len(blocks)


@torch.no_grad()
def depth_statistics(model: PreTrainedModel, blocks: torch.Tensor) -> dict[str, float]:
    """Of the depth weights, averaged over the mixes of at least two sources.

    `entropy`: of a token's weights, relative to uniform ones (1). `per_token`: how far a token's weights are from the
    mean ones, as total variation (0: the same for all tokens, to 1).
    """
    weights = model(input_ids=blocks, use_cache=False, output_depth_weights=True).depth_weights
    entropies, distances = [], []
    for mix in (mix for mix in weights if mix.shape[-1] > 1):
        shares = mix.abs() / mix.abs().sum(-1, keepdim=True)
        entropies.append(torch.special.entr(shares).sum(-1).mean() / math.log(mix.shape[-1]))
        distances.append((shares - shares.mean((0, 1))).abs().sum(-1).mean() / 2)
    return {"entropy": torch.stack(entropies).mean().item(), "per_token": torch.stack(distances).mean().item()}


def with_mean_weights(model: PreTrainedModel, blocks: torch.Tensor):
    """Puts each mix's mean weights on `blocks` in place of those that depend on the token."""
    scalars = torch.nan_to_num(mean_depth_weights(model, blocks))[1:]
    model.model.depth_attention = StaticMixing(model.config)
    model.model.depth_attention.mixing_weights.data = scalars
    model.model.depth_form = SourcesForm(learned_scalars, weights=lambda scalars: scalars)


def train(run: Run, data: Data) -> dict:
    """Trains as examples/pretrain.py does (AdamW, clipping, schedule), without what its Trainer writes."""
    started = time.process_time()
    model = build(run, data)
    optimizers = build_optimizers(model, run)
    schedules = [LambdaLR(optimizer, lambda step: rate_factor(step, run.steps)) for optimizer in optimizers]
    watched, curve = {1, 2, 5, 10, 20, 50, *range(100, run.steps, 100), run.steps}, []
    model.train()
    for step, batch in enumerate(data.batches(run), start=1):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        depth = [p.grad for name, p in model.named_parameters() if "depth_attention" in name and p.grad is not None]
        depth_norm = nn.utils.get_total_norm(depth).item() if depth else 0.0
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step in watched:
            record = {"step": step, "loss": loss.item(), "gradient_norm": norm, "depth_gradient_norm": depth_norm}
            curve.append(record | (depth_statistics(model, data.choosing[:4]) if has_depth_attention(run) else {}))
    model.eval()
    result = {"run": asdict(run), "parameters": model.num_parameters(), "curve": curve}
    result |= {"choosing_loss": loss_on(model, data.choosing), "loss": loss_on(model, data.reporting)}
    if has_depth_attention(run) and "static" not in run.variant:
        part = data.reporting[:64]
        loss = loss_on(model, part)
        with_mean_weights(model, data.choosing[:64])
        result["cost_of_mean_weights"] = loss_on(model, part) - loss
    return result | {"cpu_seconds": time.process_time() - started}
