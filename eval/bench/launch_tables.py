# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What a GPU would be asked to do, as figures beside their bars and as the tables of docs/performance.md.

Letters: B batch, T tokens, D hidden size, L sublayers.
"""

import importlib.util
from collections.abc import Sequence

import torch

from .launches import Case, count, overhead
from .models import PRESETS, Shape
from .report import format_markdown


LABELS = {"block": "Block, mean", "block-sum": "Block, sum", "full": "Full, mean", "figure2": "Figure 2, Block"}
LAUNCHES, ELEMENTS = "launches a sublayer, forward / backward", "D a sublayer, forward / backward"


def why_not_compiled() -> str | None:
    """Why compiled code cannot be counted here, or `None`."""
    if importlib.util.find_spec("triton") is None:
        return "Compiled code is not counted: Triton is not installed (pip install --no-deps triton==3.7.1)."
    return None


def case_of(mode: str, shape: Shape = PRESETS["8B"]) -> Case:
    """Four sequences of 4,096 tokens in bf16, or one token to decode."""
    return Case(shape, mode, batch=1 if mode == "decode" else 4, tokens=4096, dtype=torch.bfloat16)


def eager_rows(shape: Shape, variants: Sequence[str]) -> list[dict]:
    """The base itself, and what each variant adds to it."""
    costs = {mode: count(case_of(mode, shape), "base") for mode in ("prefill", "train", "checkpoint", "decode")}
    seconds = {mode: f"{1e3 * sum(part.seconds.total() for part in pair):.0f} ms" for mode, pair in costs.items()}
    case = case_of("train", shape)
    per_d = shape.hidden_size * case.tokens_at_once * case.dtype.itemsize * shape.num_sublayers
    forward, backward = costs["train"]
    rows = [
        {
            "": "base itself",
            LAUNCHES: _pair(*(part.launches.total() / shape.num_sublayers for part in (forward, backward))),
            ELEMENTS: _pair(*(part.bytes.total() / per_d for part in (forward, backward))),
            "prefill": seconds["prefill"],
            "training step": seconds["train"],
            "with checkpointing": seconds["checkpoint"],
            "launches of decode": f"{costs['decode'][0].launches.total() / shape.num_sublayers:.1f}",
        }
    ]
    for name in variants:
        modes = [mode for mode in costs if (mode, name) != ("checkpoint", "figure2")]
        over = {mode: overhead(case_of(mode, shape), name) for mode in modes}
        ratios = {mode: f"+{100 * (cost.ratio - 1):.1f} %" for mode, cost in over.items()}
        train = over["train"]
        rows.append(
            {
                "": LABELS[name],
                LAUNCHES: _pair(train.forward, train.backward, "+"),
                ELEMENTS: _pair(train.forward_d, train.backward_d, "+"),
                "prefill": ratios["prefill"],
                "training step": ratios["train"],
                "with checkpointing": ratios.get("checkpoint", ""),
                "launches of decode": f"+{over['decode'].forward:.1f}",
            }
        )
    return rows


def _pair(forward: float, backward: float, sign: str = "") -> str:
    return f"{sign}{forward:.1f} / {sign}{backward:.1f}"


def compiled_rows(variants: Sequence[str] = ("block", "block-sum")) -> list[dict]:
    """Kernels per sublayer of compiled code beyond the base's."""
    from .compiled_launches import extra_kernels  # only here: it needs internals of the compiler

    rows = []
    for name in variants:
        prefill, decode, train = (extra_kernels(case_of(mode), name) for mode in ("prefill", "decode", "train"))
        rows.append(
            {
                "compiled, kernels a sublayer": LABELS[name],
                "prefill": f"+{prefill.forward:.1f}",
                "decode": f"+{decode.forward:.1f}",
                "training, forward / backward": _pair(train.forward, train.backward, "+"),
            }
        )
    return rows


def launches_markdown() -> str:
    """The tables of docs/performance.md; the compiled one only where Triton is installed."""
    parts = [
        "8B (D 4096, 64 sublayers):",
        format_markdown(eager_rows(PRESETS["8B"], list(LABELS))),
        "135M (D 576, 60 sublayers):",
        format_markdown(eager_rows(PRESETS["135M"], ["block", "block-sum", "full"])),
        why_not_compiled() or format_markdown(compiled_rows()),
    ]
    return "\n\n".join(parts) + "\n"
