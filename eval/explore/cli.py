# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""`attnres-explore`: a local page where a model's depth attention is looked at, and weakened, by hand."""

import argparse
import ipaddress
import math
import os
import socket
import sys
import threading
from pathlib import Path

from transformers import AutoModelForCausalLM
from transformers.utils import logging

from modeling_attnres.command_line import DTYPES, Result, ToolParser, require, run_tool, whole_number

from ..ablation import check_ablation
from ..inspect_model import load_tokenizer
from ..model_argument import ModelError, check_model, check_weights
from .explorer import Explorer


MAX_TOKENS = 256


def build_parser() -> ToolParser:
    parser = ToolParser(
        prog="attnres-explore",
        description="Serves a page to this machine alone: which sources each sublayer reads, token by token, and what a "
        "model predicts when connections are weakened. Stop it with Ctrl-C.",
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or Hub name of an AttnRes model")
    parser.add_argument(
        "--host", type=local_host, default="127.0.0.1", help="an address of this machine alone (default: %(default)s)"
    )
    parser.add_argument("--port", type=whole_number(1, 65535), default=7860, help="default: %(default)s")
    parser.add_argument(
        "--max-tokens",
        type=whole_number(2),
        help=f"how long a text may be (default: {MAX_TOKENS}, or less where the model reads less)",
    )
    parser.add_shared("--dtype", default="float32", help="of weights and activations (default: %(default)s)")
    parser.add_shared("--device", default="cpu")
    parser.add_shared("--trust-remote-code")
    return parser


def local_host(text: str) -> str:
    """An address that no other machine reaches: the page asks nobody for a password."""
    try:
        is_local = text == "localhost" or ipaddress.ip_address(text).is_loopback
    except ValueError:
        is_local = False
    if not is_local:
        raise argparse.ArgumentTypeError(
            f"must be an address of this machine alone, such as 127.0.0.1 or ::1, got {text!r:.60}; from elsewhere, "
            "reach the page through an SSH tunnel"
        )
    return text


def check_port(host: str, port: int):
    """Raises `ValueError` unless `port` is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            raise ValueError(f"--port must be free on {host}, got {port} ({error.strerror}).") from error


def load_explorer(args: argparse.Namespace) -> Explorer:
    """The model and the tokenizer that were named, ready to be explored.

    Raises:
        ModelError: if they cannot be loaded, or have nothing to explore.
    """
    config = check_model(args.model, "MODEL", args.trust_remote_code)
    try:
        check_ablation(config)
    except ValueError as error:
        raise ModelError(f"MODEL {args.model}: {error}") from error
    longest = getattr(config, "max_position_embeddings", None) or math.inf
    max_tokens = args.max_tokens or min(MAX_TOKENS, longest)
    if max_tokens > longest:
        raise ValueError(f"--max-tokens must be at most what the model reads, {longest}, got {max_tokens}.")
    check_weights(args.model, config, "MODEL", args.trust_remote_code)
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=DTYPES[args.dtype], trust_remote_code=args.trust_remote_code
    )
    return Explorer(model.to(args.device), tokenizer, max_tokens)


def run(args: argparse.Namespace) -> Result:
    """Serves the page until it is interrupted."""
    require("explore", "gradio")
    check_port(args.host, args.port)
    logging.set_verbosity_error()
    explorer = load_explorer(args)
    # Read when Gradio is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from .page import Page, served

    page = Page(explorer, Path(args.model).resolve().name)
    try:
        with served(page.blocks, args.host, args.port) as address:
            print(f"{address} (Ctrl-C ends it)", flush=True)
            threading.Event().wait()
    finally:
        explorer.close()
    return Result("", None)


def main(argv: list[str] | None = None) -> int:
    """Entry point of `attnres-explore`; returns the exit code, see [`modeling_attnres.command_line`]."""
    parser = build_parser()
    return run_tool(parser.prog, run, parser.parse_args(argv), interrupted="interrupted; the page is closed.")


if __name__ == "__main__":
    sys.exit(main())
