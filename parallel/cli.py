# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""`attnres-plan`: what block summaries cost a model at scale, before it runs."""

import argparse
import sys
from dataclasses import asdict
from typing import Any

from modeling_attnres import AttnResConfig, KimiK3TextConfig
from modeling_attnres.command_line import Result, ToolParser, positive_int, positive_number, run_tool
from modeling_attnres.configuration import list_presets, load_preset

from .layout import CACHING
from .plan import (
    BYTES,
    DepthShape,
    Hardware,
    pipeline_transitions,
    predict_overhead,
    summary_memory,
)
from .weights import count_bytes, count_kimi_k3_file, count_weights


KEPT = tuple(reversed(CACHING))  # from the one that keeps nothing to the one that keeps everything


def build_parser() -> ToolParser:
    parser = ToolParser(
        prog="attnres-plan",
        description="Bytes between pipeline stages, memory of the block summaries, and the overhead they predict.",
    )
    model = parser.add_argument_group("the model: a preset, or its shape")
    model.add_argument("--preset", help="name of an AttnRes preset, such as kimi-linear-48b-a3b-block")
    model.add_argument("--num-layers", type=positive_int, help="decoder layers")
    model.add_argument("--hidden-size", type=positive_int, help="D")
    blocks = model.add_mutually_exclusive_group()
    parser.add_shared("--sublayers-per-block", group=blocks, help="two sublayers per decoder layer")
    parser.add_shared("--num-blocks", group=blocks, help="blocks of depth")
    parser.add_shared("--depth-weights", group=model, help="default: the preset's, or mean")
    model.add_argument("--weights", action="store_true", help="also the preset's parameters and bytes by dtype")
    run = parser.add_argument_group("the run")
    parser.add_shared("--tokens", group=run, default=4096, help="of a micro-batch, or a prompt (default: %(default)s)")
    parser.add_shared("--dtype", group=run, default="bfloat16", help="of the block summaries (default: %(default)s)")
    run.add_argument(
        "--pipeline-ranks", type=positive_int, default=1, metavar="P", help="of a pipeline (default: %(default)s)"
    )
    run.add_argument("--virtual-stages", type=positive_int, default=1, metavar="V", help="per pipeline rank")
    run.add_argument(
        "--tensor-parallel", type=positive_int, default=1, metavar="RANKS", help="that the sequence is sharded over"
    )
    run.add_argument("--chunk", type=positive_int, metavar="TOKENS", help="of a chunked prefill")
    hardware = parser.add_argument_group("the hardware (all four for a predicted overhead)")
    hardware.add_argument(
        "--link-bandwidth", type=positive_number, metavar="GB/S", help="between pipeline stages, one way"
    )
    hardware.add_argument("--memory-bandwidth", type=positive_number, metavar="GB/S", help="of a device")
    hardware.add_argument("--flops", type=positive_number, metavar="TFLOP/S", help="that the model reaches")
    hardware.add_argument(
        "--activated-parameters", type=positive_number, metavar="BILLIONS", help="that a token is multiplied with"
    )
    parser.add_shared("--json")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of `attnres-plan`; returns the exit code, see [`modeling_attnres.command_line`]."""
    parser = build_parser()
    return run_tool(parser.prog, run, parser.parse_args(argv))


def run(arguments: argparse.Namespace) -> Result:
    figures = plan(arguments)
    return Result(format_figures(figures), figures)


def plan(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures as plain data: bytes and seconds.

    Raises:
        ValueError: if the arguments do not describe a model, or do not go together.
    """
    config = _preset(arguments)
    shape = _shape(arguments, config)
    ranks, virtual, tokens, dtype = (
        arguments.pipeline_ranks,
        arguments.virtual_stages,
        arguments.tokens,
        arguments.dtype,
    )
    whole = summary_memory(shape, tokens, dtype)
    figures: dict[str, Any] = {
        "model": asdict(shape) | {"num_sublayers": shape.num_sublayers, "num_blocks": shape.num_blocks},
        "summaries": {"whole": whole.total, "sources": whole.sources},
    }
    if arguments.weights:
        figures["weights"] = _weights(config, dtype)
    if arguments.tensor_parallel != 1:
        figures["summaries"]["sharded"] = summary_memory(shape, tokens, dtype, arguments.tensor_parallel).total
    if arguments.chunk is not None:
        chunked = summary_memory(shape, tokens, dtype, arguments.tensor_parallel, arguments.chunk)
        figures["summaries"]["sharded_chunk" if arguments.tensor_parallel != 1 else "chunk"] = chunked.total
    if ranks * virtual != 1:
        tensor = shape.hidden_size * tokens * BYTES[dtype]
        figures["pipeline"] = {"prenorm": {"total": (ranks * virtual - 1) * tensor, "peak": tensor}}
        for caching in KEPT:
            sent = [step.tensors * tensor for step in pipeline_transitions(shape, ranks, virtual, caching)]
            figures["pipeline"][caching] = {"total": sum(sent), "peak": max(sent), "transitions": sent}
    if (hardware := _hardware(arguments)) is not None:
        figures["overhead"] = {}
        for caching in KEPT if ranks * virtual != 1 else KEPT[:1]:
            transitions = pipeline_transitions(shape, ranks, virtual, caching)
            overhead = predict_overhead(
                shape, hardware, arguments.activated_parameters * 1e9, tokens, transitions, dtype
            )
            bounds = {"lowest": overhead.lowest, "highest": overhead.highest}
            figures["overhead"][caching] = asdict(overhead) | bounds
    return figures


def _preset(arguments: argparse.Namespace) -> AttnResConfig | None:
    if arguments.preset is None:
        return None
    names = [name for name in list_presets() if not name.endswith("-prenorm")]
    if arguments.preset not in names:
        raise ValueError(f"`preset` must be one of {', '.join(names)}; got {arguments.preset!r}.")
    wanted = ("sublayers_per_block", "num_blocks", "depth_weights")
    overrides = {name: getattr(arguments, name) for name in wanted if getattr(arguments, name) is not None}
    return load_preset(arguments.preset, **overrides)


def _shape(arguments: argparse.Namespace, config: AttnResConfig | None) -> DepthShape:
    by_hand = {name: getattr(arguments, name) for name in ("num_layers", "hidden_size")}
    if config is not None:
        if given := [name for name, value in by_hand.items() if value is not None]:
            raise ValueError(f"Give `preset` or the shape, not both: got preset={arguments.preset!r} and {given}.")
        return DepthShape(
            config.num_hidden_layers, config.hidden_size, config.sublayers_per_block, config.depth_weights
        )
    if missing := [name for name, value in by_hand.items() if value is None]:
        raise ValueError(f"Give `preset`, or the shape: {', '.join(f'`{name}`' for name in missing)} missing.")
    per_block = arguments.sublayers_per_block
    if per_block is None:
        num_blocks, num_sublayers = arguments.num_blocks or 8, 2 * arguments.num_layers
        if not 1 <= num_blocks <= num_sublayers:
            raise ValueError(f"`num_blocks` must be from 1 to the {num_sublayers} sublayers, got {num_blocks}.")
        per_block = -(-num_sublayers // num_blocks)
    return DepthShape(arguments.num_layers, arguments.hidden_size, per_block, arguments.depth_weights or "mean")


def _weights(config: AttnResConfig | None, dtype: str) -> dict[str, dict]:
    if config is None:
        raise ValueError("`weights` are counted on a model: give `preset`.")
    counted = {"memory": count_weights(config, dtype)}
    if config.backbone_type == KimiK3TextConfig.model_type:
        counted["file"] = count_kimi_k3_file(config)
    return {
        where: {name: {"parameters": count, "bytes": count_bytes(name, count)} for name, count in counts.items()}
        for where, counts in counted.items()
    }


def _hardware(arguments: argparse.Namespace) -> Hardware | None:
    names = ("link_bandwidth", "memory_bandwidth", "flops", "activated_parameters")
    given = [name for name in names if getattr(arguments, name) is not None]
    if not given:
        return None
    if missing := sorted({*names} - {*given}):
        raise ValueError(f"A predicted overhead needs {', '.join(f'`{name}`' for name in missing)} too.")
    return Hardware(
        flops=arguments.flops * 1e12,
        memory_bandwidth=arguments.memory_bandwidth * 1e9,
        link_bandwidth=arguments.link_bandwidth * 1e9,
    )


def format_figures(figures: dict[str, Any]) -> str:
    """The figures as lines of text."""
    model, summaries = figures["model"], figures["summaries"]
    lines = [
        f"{model['num_layers']} decoder layers, L = {model['num_sublayers']} sublayers, S = "
        f"{model['sublayers_per_block']}, N = {model['num_blocks']} blocks, D = {model['hidden_size']}, "
        f"'{model['depth_weights']}'",
        "",
        "block summaries of a prefill, per rank",
        f"  whole            {_bytes(summaries['whole'])} (sources alone {_bytes(summaries['sources']).strip()})",
    ]
    labels = {"sharded": "sharded", "chunk": "one chunk", "sharded_chunk": "sharded chunk"}
    lines += [f"  {label:<16} {_bytes(summaries[name])}" for name, label in labels.items() if name in summaries]
    titles = {"memory": "weights", "file": "weights, as Kimi K3 stores them"}
    for where, counts in figures.get("weights", {}).items():
        lines += ["", titles[where]]
        lines += [
            f"  {name:<16} {entry['parameters']:>17,} parameters {_bytes(entry['bytes'])}"
            for name, entry in counts.items()
        ]
    if "pipeline" in figures:
        lines += ["", "sent per forward between pipeline stages (the backward sends as much)"]
        lines.append(f"  {'sources kept':<16} {'in all':>10} {'at most at once':>18}")
        lines += [
            f"  {name:<16} {_bytes(entry['total'])} {_bytes(entry['peak']):>18}"
            for name, entry in figures["pipeline"].items()
        ]
    if "overhead" in figures:
        lines += ["", "predicted overhead of a forward: transfers hidden, not hidden"]
        for name, entry in figures["overhead"].items():
            label = f"  {name:<16}" if "pipeline" in figures else "  no pipeline     "
            verdict = (
                "" if "pipeline" not in figures else ", can be hidden" if entry["hidden"] else ", cannot be hidden"
            )
            lines.append(f"{label} {entry['lowest']:>9.2%} {entry['highest']:>10.2%}{verdict}")
    return "\n".join(lines)


def _bytes(count: float) -> str:
    units = ["B", "kB", "MB", "GB", "TB"]
    power = 0
    while count >= 1000 and power < len(units) - 1:
        count, power = count / 1000, power + 1
    return f"{count:>7.4g} {units[power]:<2}"


if __name__ == "__main__":
    sys.exit(main())
