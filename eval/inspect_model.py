# Copyright 2026 The modeling-attnres maintainers.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""`attnres-inspect`: what a model's depth attention does on a text, and how its layers train."""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from modeling_attnres import AttnResConfig

from .depth_weights import mean_depth_weights, save_depth_heatmap
from .dynamics import LayerDynamics, measure_dynamics, save_dynamics


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="attnres-inspect",
        description="Depth-weight heatmaps (token mixers and feed-forwards apart), output magnitude and gradient norm per "
        "decoder layer, as PNG and CSV. Several models, PreNorm ones among them, are drawn side by side.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="checkpoint folder or Hub name, AttnRes or PreNorm")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="the models' names, in the order of MODEL")
    parser.add_argument("--text", type=Path, required=True, help="plain text, UTF-8")
    parser.add_argument("--output", type=Path, required=True, help="folder for pictures and tables")
    parser.add_argument("--sequences", type=int, default=4, help="read from the text (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="of each sequence (default: %(default)s)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    return parser


def read_sequences(tokenizer, path: Path, sequences: int, tokens: int) -> torch.Tensor:
    """The first `sequences * tokens` tokens of a text, as `[sequences, tokens]`.

    Raises:
        ValueError: if the text is shorter, or no tokens are asked for.
    """
    if sequences < 1 or tokens < 2:
        raise ValueError(f"`--sequences` must be at least 1 and `--tokens` at least 2, got {sequences} and {tokens}.")
    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    if len(ids) < sequences * tokens:
        raise ValueError(
            f"`--text` must hold --sequences * --tokens = {sequences * tokens} tokens, got {len(ids)} in {path}."
        )
    return torch.tensor(ids[: sequences * tokens]).view(sequences, tokens)


def inspect_model(model: PreTrainedModel, input_ids: torch.Tensor) -> tuple[LayerDynamics, torch.Tensor | None]:
    """The model's dynamics on `input_ids` `[B, T]`, and its mean depth weights `[L + 1, N + 1]` if it is an AttnRes.

    The model's mode is left as it was.
    """
    dynamics = measure_dynamics(model, input_ids)
    if model.config.model_type != AttnResConfig.model_type:
        return dynamics, None
    training = model.training
    matrix = mean_depth_weights(model.eval(), input_ids)
    model.train(training)
    return dynamics, matrix


def run(args: argparse.Namespace) -> dict:
    """Inspects every model, writes pictures and tables, and returns the numbers that sum them up, by model."""
    names = args.names or [Path(model).name for model in args.models]
    if len(names) != len(args.models) or len(set(names)) != len(names):
        raise ValueError(f"`--names` must give each of the {len(args.models)} models its own name, got {names}.")
    dynamics, weights = {}, {}
    for name, source in zip(names, args.models):
        tokenizer = AutoTokenizer.from_pretrained(source)
        input_ids = read_sequences(tokenizer, args.text, args.sequences, args.tokens)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[args.dtype])
        dynamics[name], matrix = inspect_model(model, input_ids)
        if matrix is not None:
            weights[name] = matrix
    save_dynamics(dynamics, args.output / "dynamics.png")
    if weights:
        save_depth_heatmap(weights, args.output / "depth_weights.png")
    summary = {
        name: {"magnitude_ratio": measured.magnitude_ratio, "gradient_variation": measured.gradient_variation}
        for name, measured in dynamics.items()
    }
    (args.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def main(argv: list[str] | None = None) -> int:
    """Entry point of `attnres-inspect`; returns the exit code, 2 for a request that cannot be carried out."""
    args = build_parser().parse_args(argv)
    logging.set_verbosity_error()
    try:
        summary = run(args)
    except (OSError, ValueError) as error:
        print(f"attnres-inspect: error: {error}", file=sys.stderr)
        return 2
    print(f"{'model':24}  output magnitude, max/min  gradient norm, coefficient of variation")
    for name, figures in summary.items():
        print(f"{name:24}  {figures['magnitude_ratio']:25.2f}  {figures['gradient_variation']:39.3f}")
    print(f"-> {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
