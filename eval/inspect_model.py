# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""`attnres-inspect`: what a model's depth attention does on a text, and how its layers train."""

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from modeling_attnres import AttnResConfig
from modeling_attnres.command_line import DTYPES, Result, ToolParser, require, run_tool, whole_number

from .ablation import ABLATIONS, Connection, check_ablation, check_gates
from .causal import causal_effects, causal_estimates
from .causal_report import CausalMap, correlations, draw_map, write_table
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
        "decoder layer, as PNG and CSV. Several models, PreNorm ones among them, are drawn side by side. With --causal "
        "also what every depth connection is worth.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="checkpoint folder or Hub name, AttnRes or PreNorm")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="the models' names, in the order of MODEL")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="plain text, UTF-8")
    parser.add_shared("--output", required=True, help="folder for pictures and tables")
    parser.add_argument(
        "--sequences", type=whole_number(1), default=4, help="read from the text (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=whole_number(2), default=256, help="of each sequence (default: %(default)s)")
    parser.add_argument(
        "--causal", action="store_true", help="the change in loss when each depth connection is removed, exactly"
    )
    parser.add_argument(
        "--estimate", action="store_true", help="the same to first order, from one forward and one backward"
    )
    parser.add_argument(
        "--ablate",
        choices=ABLATIONS,
        help="what --causal and --estimate do to a weight: 'remove' sets it to 0 and renormalises the rest (default), "
        "'plain' sets it to the plain residual stream's 1 (models of depth weights 'sum')",
    )
    parser.add_argument(
        "--connections",
        nargs="+",
        type=connection,
        metavar="SUBLAYER:SOURCE",
        help="those that --causal removes (default: all); sublayers from 0, the output mix last; source 0 is the "
        "embedding, then the blocks in order",
    )
    parser.add_shared("--dtype", default="float32", help="of weights and activations (default: %(default)s)")
    parser.add_shared("--device", default="cpu")
    parser.add_shared("--trust-remote-code")
    parser.add_shared("--json", help="print the numbers of summary.json, and nothing else")
    return parser


def connection(text: str) -> Connection:
    """The `type` of an option that names depth connections."""
    sublayer, _, source = text.partition(":")
    if not (sublayer.isdecimal() and source.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be SUBLAYER:SOURCE, such as 5:0, got {text!r:.60}")
    return int(sublayer), int(source)


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


def causal_map(model: PreTrainedModel, input_ids: torch.Tensor, weights: torch.Tensor, args) -> CausalMap:
    """What the options ask for of the connections of a model with mean depth weights `[L + 1, N + 1]`."""
    ablate = args.ablate or "remove"
    if model.config.depth_weights == "sum":  # their share of the mix, times the number of its sources
        weights = weights * weights.isfinite().sum(-1, keepdim=True)
    # Rounded as in the table, so that weights which are equal have equal ranks.
    found = CausalMap(weights.cpu().round(decimals=6), None, None, ablate, None)
    training = model.training
    model.eval()
    if args.causal:
        effects, loss = causal_effects(model, input_ids, ablate=ablate, wanted=args.connections)
        found = replace(found, effects=effects, loss=loss)
    if args.estimate:
        found = replace(found, estimates=causal_estimates(model, input_ids, ablate=ablate))
    model.train(training)
    return found


def check_causal(args: argparse.Namespace, configs: list[PreTrainedConfig]):
    """Raises `ValueError` unless the models have what `--causal` and `--estimate` measure."""
    if not args.causal and args.connections is not None:
        raise ValueError("`--connections` goes with --causal, which is not given.")
    if not args.causal and not args.estimate:
        if args.ablate is not None:
            raise ValueError(f"`--ablate` goes with --causal or --estimate, got --ablate {args.ablate} alone.")
        return
    for source, config in zip(args.models, configs):
        try:
            check_ablation(config, args.ablate or "remove")
            for wanted in args.connections or ():
                check_gates(config, {wanted: 0.0}, args.ablate or "remove")
        except ValueError as error:
            raise ModelError(f"MODEL {source}: {error}") from error


@dataclass
class Measured:
    """What was measured, by the models' names; depth weights and causal maps of those that have them."""

    dynamics: dict[str, LayerDynamics]
    weights: dict[str, torch.Tensor]
    causal: dict[str, CausalMap]


def measure(args: argparse.Namespace, names: list[str]) -> Measured:
    """Loads one model after the other and measures it."""
    read_text(args.text)  # a wrong text is an earlier error than a wrong model
    configs = [check_model(source, "MODEL", args.trust_remote_code) for source in args.models]
    check_causal(args, configs)
    for source, config in zip(args.models, configs):
        check_weights(source, config, "MODEL", args.trust_remote_code)
    tokenizers = [load_tokenizer(source, args.trust_remote_code) for source in args.models]
    # All of them are read before the first model, which may take long, runs.
    inputs = [
        read_sequences(tokenizer, args.text, args.sequences, args.tokens, config)
        for tokenizer, config in zip(tokenizers, configs)
    ]
    found = Measured({}, {}, {})
    for name, source, input_ids in zip(names, args.models, inputs):
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=DTYPES[args.dtype], trust_remote_code=args.trust_remote_code
        )
        model, input_ids = model.to(args.device), input_ids.to(args.device)
        found.dynamics[name], matrix = inspect_model(model, input_ids)
        dynamics = found.dynamics[name]
        if not all(map(math.isfinite, (*dynamics.output_magnitude, *dynamics.gradient_norm))):
            raise NotFiniteError(
                f"MODEL: magnitudes or gradients of {source} are not finite: its weights are damaged or too large for "
                f"{args.dtype}."
            )
        if matrix is not None:
            found.weights[name] = matrix
        if args.causal or args.estimate:
            found.causal[name] = causal_map(model, input_ids, matrix, args)
    return found


def save(found: Measured, folder: Path) -> dict[str, dict]:
    """Writes pictures, tables and `summary.json`, whose numbers it gives back."""
    save_dynamics(found.dynamics, folder / "dynamics.png")
    if found.weights:
        save_depth_heatmap(found.weights, folder / "depth_weights.png")
    summary = {
        name: {"magnitude_ratio": measured.magnitude_ratio, "gradient_variation": measured.gradient_variation}
        for name, measured in found.dynamics.items()
    }
    for name, causal in found.causal.items():
        # A single model's files have no name to tell them apart by.
        stem = "causal" if len(found.causal) == 1 else f"causal-{name.replace(' ', '-')}"
        write_table(causal, folder / f"{stem}.csv")
        draw_map(causal, name, folder / f"{stem}.png")
        of_ranks = {pair: value and asdict(value) for pair, value in correlations(causal).items()}
        summary[name]["causal"] = {"ablate": causal.ablate, "loss": causal.loss, "rank_correlation": of_ranks}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def run(args: argparse.Namespace) -> Result:
    """Inspects every model, writes pictures and tables, and gives the numbers that sum them up, by model."""
    logging.set_verbosity_error()
    require("eval", "matplotlib")
    names = args.names or [Path(model).resolve().name for model in args.models]
    check_names(names, args.models)
    with outputs() as making:
        folder = making.folder(args.output, "--output")
        summary = save(measure(args, names), folder)
    return Result(describe(summary, args.output), summary)


def describe(summary: dict[str, dict], output: Path) -> str:
    """The numbers as lines for a terminal."""
    lines = [f"{'model':24}  output magnitude, max/min  gradient norm, coefficient of variation"]
    lines += [
        f"{name:24}  {figures['magnitude_ratio']:25.2f}  {figures['gradient_variation']:39.3f}"
        for name, figures in summary.items()
    ]
    for name, figures in summary.items():
        for pair, found in figures.get("causal", {}).get("rank_correlation", {}).items():
            title = f"{name}: rank correlation of {' and '.join(pair.split('_'))}"
            if found is None:
                lines.append(f"{title}: none, one of them is the same everywhere")
            else:
                interval = f"95 % CI {found['low']:+.3f} to {found['high']:+.3f}, {found['pairs']} connections"
                lines.append(f"{title}: {found['value']:+.3f} ({interval})")
    return "\n".join([*lines, f"-> {output}"])


def main(argv: list[str] | None = None) -> int:
    """Entry point of `attnres-inspect`; returns the exit code, see [`modeling_attnres.command_line`]."""
    parser = build_parser()
    return run_tool(parser.prog, run, parser.parse_args(argv), check_errors=(NotFiniteError,))


if __name__ == "__main__":
    sys.exit(main())
