# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""`attnres-inspect`: what a model's depth attention does on a text, and how its layers train."""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from modeling_attnres import AttnResConfig
from modeling_attnres.command_line import DTYPES, Result, ToolParser, require, run_tool, whole_number

from .depth_weights import mean_depth_weights, save_depth_heatmap
from .dynamics import LayerDynamics, measure_dynamics, save_dynamics
from .model_argument import ModelError, check_model, check_weights
from .outputs import outputs


class NotFiniteError(ValueError):
    """A model counts to infinity or NaN."""


def build_parser() -> ToolParser:
    parser = ToolParser(
        prog="attnres-inspect",
        description="Depth-weight heatmaps (token mixers and feed-forwards apart), output magnitude and gradient norm per "
        "decoder layer, as PNG and CSV. Several models, PreNorm ones among them, are drawn side by side.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="checkpoint folder or Hub name, AttnRes or PreNorm")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="the models' names, in the order of MODEL")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="plain text, UTF-8")
    parser.add_shared("--output", required=True, help="folder for pictures and tables")
    parser.add_argument(
        "--sequences", type=whole_number(1), default=4, help="read from the text (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=whole_number(2), default=256, help="of each sequence (default: %(default)s)")
    parser.add_shared("--dtype", default="float32", help="of weights and activations (default: %(default)s)")
    parser.add_shared("--device", default="cpu")
    parser.add_shared("--trust-remote-code")
    parser.add_shared("--json", help="print the numbers of summary.json, and nothing else")
    return parser


def read_text(path: Path) -> str:
    """
    Raises:
        ValueError: if there is no such file, or it is no text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"`--text` must be a file that can be read, got {path} ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"`--text` must be text in UTF-8, got {path} ({error}).") from error
    if "\0" in text:
        raise ValueError(f"`--text` must be text in UTF-8, got {path}, which has zero bytes.")
    return text


def check_names(names: list[str], models: list[str]):
    """Raises `ValueError` unless every model has a name of its own that can be a part of a file's name."""
    if len(names) != len(models) or len(set(names)) != len(names):
        raise ValueError(f"`--names` must give each of the {len(models)} models its own name, got {names}.")
    if odd := [name for name in names if not name.strip() or any(sign in name for sign in "/\\\0")]:
        raise ValueError(f"`--names` must be usable in names of files, got {odd[0]!r}.")


def read_sequences(
    tokenizer, path: Path, sequences: int, tokens: int, config: PreTrainedConfig | None = None
) -> torch.Tensor:
    """The first `sequences * tokens` tokens of a text, as `[sequences, tokens]`.

    Args:
        config: of the model that shall read them.

    Raises:
        ValueError: if the text is shorter, no tokens are asked for, or the model cannot read as many or these.
    """
    if sequences < 1 or tokens < 2:
        raise ValueError(f"`--sequences` must be at least 1 and `--tokens` at least 2, got {sequences} and {tokens}.")
    ids = tokenizer(read_text(path), add_special_tokens=False)["input_ids"]
    if len(ids) < sequences * tokens:
        raise ValueError(
            f"`--text` must hold --sequences * --tokens = {sequences * tokens} tokens, got {len(ids)} in {path}."
        )
    decoder = config.get_text_config(decoder=True) if config is not None else None
    longest = getattr(decoder, "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise ValueError(f"`--tokens` must be at most the model's max_position_embeddings, {longest}, got {tokens}.")
    input_ids = torch.tensor(ids[: sequences * tokens]).view(sequences, tokens)
    if decoder is not None and int(input_ids.max()) >= decoder.vocab_size:
        raise ValueError(
            f"The tokenizer must go with the model, whose vocabulary has {decoder.vocab_size} tokens; got the id "
            f"{int(input_ids.max())}."
        )
    return input_ids


def load_tokenizer(source: str, trust_remote_code: bool):
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # its files are parsed by libraries that raise whatever they meet
        raise ModelError(f"MODEL: the tokenizer of {source} does not load: {error}") from error


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


def measure(args: argparse.Namespace, names: list[str]) -> tuple[dict[str, LayerDynamics], dict[str, torch.Tensor]]:
    """Dynamics by model, and depth weights of those that have them."""
    read_text(args.text)  # a wrong text is an earlier error than a wrong model
    configs = [check_model(source, "MODEL", args.trust_remote_code) for source in args.models]
    for source, config in zip(args.models, configs):
        check_weights(source, config, "MODEL", args.trust_remote_code)
    tokenizers = [load_tokenizer(source, args.trust_remote_code) for source in args.models]
    # All of them are read before the first model, which may take long, runs.
    inputs = [
        read_sequences(tokenizer, args.text, args.sequences, args.tokens, config)
        for tokenizer, config in zip(tokenizers, configs)
    ]
    dynamics, weights = {}, {}
    for name, source, input_ids in zip(names, args.models, inputs):
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=DTYPES[args.dtype], trust_remote_code=args.trust_remote_code
        )
        dynamics[name], matrix = inspect_model(model.to(args.device), input_ids.to(args.device))
        if matrix is not None:
            weights[name] = matrix
        if not all(map(math.isfinite, (*dynamics[name].output_magnitude, *dynamics[name].gradient_norm))):
            raise NotFiniteError(
                f"MODEL: magnitudes or gradients of {source} are not finite: its weights are damaged or too large for "
                f"{args.dtype}."
            )
    return dynamics, weights


def run(args: argparse.Namespace) -> Result:
    """Inspects every model, writes pictures and tables, and gives the numbers that sum them up, by model."""
    logging.set_verbosity_error()
    require("eval", "matplotlib")
    names = args.names or [Path(model).resolve().name for model in args.models]
    check_names(names, args.models)
    with outputs() as making:
        folder = making.folder(args.output, "--output")
        dynamics, weights = measure(args, names)
        save_dynamics(dynamics, folder / "dynamics.png")
        if weights:
            save_depth_heatmap(weights, folder / "depth_weights.png")
        summary = {
            name: {"magnitude_ratio": measured.magnitude_ratio, "gradient_variation": measured.gradient_variation}
            for name, measured in dynamics.items()
        }
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return Result(describe(summary, args.output), summary)


def describe(summary: dict[str, dict[str, float]], output: Path) -> str:
    """The numbers as lines for a terminal."""
    lines = [f"{'model':24}  output magnitude, max/min  gradient norm, coefficient of variation"]
    lines += [
        f"{name:24}  {figures['magnitude_ratio']:25.2f}  {figures['gradient_variation']:39.3f}"
        for name, figures in summary.items()
    ]
    return "\n".join([*lines, f"-> {output}"])


def main(argv: list[str] | None = None) -> int:
    """Entry point of `attnres-inspect`; returns the exit code, see [`modeling_attnres.command_line`]."""
    parser = build_parser()
    return run_tool(parser.prog, run, parser.parse_args(argv), check_errors=(NotFiniteError,))


if __name__ == "__main__":
    sys.exit(main())
