# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Which decoders of the installed Transformers can carry depth attention, as a table; the others with the reason.

    python -m modeling_attnres.conversion.backbone_table --document docs/backbones.md

Without `--document` the table is printed. It says what probing every model type's default configuration has found, which
takes about a minute; nothing in it is written by hand.
"""

import argparse
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass

import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.utils import logging

from modeling_attnres import AttnResConfig
from modeling_attnres.backbone_attnres import backbone_class, judged_backbones
from modeling_attnres.command_line import Result, ToolParser, run_tool
from modeling_attnres.tables import markdown_table
from modeling_attnres.text_files import split_at_marks, write_text


BEGIN, END = "<!-- backbones: begin -->", "<!-- backbones: end -->"
NOT_JUDGED = "cannot be judged"


@dataclass(frozen=True)
class Backbone:
    """A row of the table: what the default configuration of a model type builds.

    Attributes:
        model_type: in `config.json`.
        architecture: the language model's class, which `config.json` names too.
        experts: `"yes"`, `"if configured"` or `""`.
        token_mixers: kinds, in alphabetical order.
        remarks: what else there is to know.
    """

    model_type: str
    architecture: str
    experts: str
    token_mixers: tuple[str, ...]
    remarks: str


def describe_backbone(model_type: str) -> Backbone:
    """The row of a model type that can be a backbone."""
    config = CONFIG_MAPPING[model_type]()
    with torch.device("meta"):
        model = backbone_class(config)(config)
    built = any("experts" in name.split(".") for name, _ in model.named_modules())
    configurable = any("expert" in name for name in config.to_dict())
    return Backbone(
        model_type,
        MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__,
        "yes" if built else "if configured" if configurable else "",
        tuple(sorted(_token_mixers(config))),
        "comes with this package" if type(config).__module__.startswith("modeling_attnres") else "",
    )


def _token_mixers(config: PreTrainedConfig) -> set[str]:
    """Kinds of token mixers, as the config names them for its layers."""
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    types = getattr(config, "layer_types", None) or ["sliding_attention" if windowed else "full_attention"]
    latent = "latent " if getattr(config, "kv_lora_rank", None) else ""
    return {("" if name == "linear_attention" else latent) + name.replace("_", " ") for name in types}


def find_backbones() -> tuple[list[Backbone], dict[str, list[str]], list[str]]:
    """Rows of what is supported, refused model types by reason, and model types that were not judged."""
    rows, refused, unjudged = [], defaultdict(list), []
    for model_type, problem in judged_backbones().items():
        if model_type == AttnResConfig.model_type:
            continue
        if problem is None:
            rows.append(describe_backbone(model_type))
        elif NOT_JUDGED in problem:
            unjudged.append(model_type)  # with reasons that change with what else is installed
        else:
            refused[problem.split(": ", 1)[1].rstrip(".")].append(model_type)
    return rows, dict(sorted(refused.items())), unjudged


def to_markdown(rows: list[Backbone], refused: dict[str, list[str]], unjudged: list[str]) -> str:
    """The table, and the lists of what is refused and what was not judged."""
    supported = [
        (f"`{row.model_type}`", f"`{row.architecture}`", row.experts, ", ".join(row.token_mixers), row.remarks)
        for row in rows
    ]
    # Some reasons quote a class, which Markdown would take for HTML.
    reasons = [(reason.replace("<", "&lt;"), _names(names)) for reason, names in refused.items()]
    parts = [
        f"Transformers {transformers.__version__}: {len(rows)} supported, {sum(map(len, refused.values()))} refused.",
        markdown_table(("model type", "class", "mixture of experts", "token mixers", "remarks"), supported),
        "## Refused",
        markdown_table(("reason", "model types"), reasons),
        "## Not judged",
        f"Their default configuration does not build a model; that of a checkpoint may:\n{_names(unjudged)}.",
    ]
    return "\n\n".join(parts) + "\n"


def _names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def build_parser() -> ToolParser:
    parser = ToolParser(
        prog="python -m modeling_attnres.conversion.backbone_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_shared("--document")
    parser.add_shared("--json")
    return parser


def run(arguments: argparse.Namespace) -> Result:
    logging.set_verbosity_error()
    document = arguments.document
    parts = split_at_marks(document, BEGIN, END) if document is not None else None
    rows, refused, unjudged = find_backbones()
    text = table = to_markdown(rows, refused, unjudged)
    if parts is not None:
        write_text(document, f"{parts[0]}\n{table}{parts[2]}")
        text = f"wrote {document}"
    return Result(text, {"supported": [asdict(row) for row in rows], "refused": refused, "not judged": unjudged})


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, see [`modeling_attnres.command_line`]."""
    parser = build_parser()
    return run_tool(parser.prog, run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
