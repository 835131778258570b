# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What [`test_sequence_sharding`] runs on several ranks: tensor parallelism, plain and with a sharded sequence."""

import datetime
import functools
import importlib.util
import os
import re
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers.distributed import DistributedConfig
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_backbones import tiny_inputs, tiny_model

from modeling_attnres import AttnResForCausalLM, BlockSummaries
from modeling_attnres.parallel import sequence_parallel_plan


CASES = {
    "llama-2-mean": ("llama", 2, "mean"),
    "mixtral-3-sum": ("mixtral", 3, "sum"),
    "qwen3_moe-1-mean": ("qwen3_moe", 1, "mean"),
}
DOCS = Path(__file__).parents[2] / "docs" / "scaling.md"
GENERATION = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
DEPTH = ("model.depth_attention.query", "model.depth_attention.key_norm")
SLOW_CASES = (
    *("deepseek_v3", "kimi_k3_text", "kimi_linear", "mistral", "olmoe"),
    *("qwen2", "qwen3", "qwen3_next", "smollm3"),
)
SAVED_BY_RANK = {"plain-by-rank": False, "sharded-by-rank": True}  # whether the sequence was sharded
SAVES_BY_RANK = importlib.util.find_spec("transformers.distributed.checkpoint") is not None
SAVED = (*(SAVED_BY_RANK if SAVES_BY_RANK else ()), "sharded-gathered")
TOKENS = 13  # no multiple of the number of ranks


def start(folder: Path) -> int:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    os.chdir(folder)
    return dist.get_rank()


@functools.cache
def reference(case: str):
    """The model in one process (every rank builds the same), and the checkpoint that the ranks load."""
    model = tiny_model(*CASES.get(case, (case, 3, "sum")), num_key_value_heads=4)
    if dist.get_rank() == 0 and not Path(case).exists():
        model.save_pretrained(case)
    dist.barrier()
    return model


@functools.cache
def load(case: str, sharded: bool):
    if not sharded:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the short form goes, the documented one is tested too
            return AttnResForCausalLM.from_pretrained(case, tp_plan="auto")
    plan = sequence_parallel_plan(reference(case).config)
    distributed = DistributedConfig(tp_size=dist.get_world_size(), tp_plan=plan)
    return AttnResForCausalLM.from_pretrained(case, distributed_config=distributed)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def largest_difference(ones, others) -> float:
    return max((whole(one) - whole(other)).abs().max().item() for one, other in zip(ones, others, strict=True))


def gradients(model, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Accumulated over the batches, by parameter."""
    model.zero_grad()
    for batch in batches:
        model(batch, labels=batch, use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def compare(one, other, micro_batches: int) -> dict:
    """How far two models are apart in logits, gradients and generated tokens."""
    ids = tiny_inputs(2, TOKENS)
    found = {"logits": largest_difference([one(ids).logits], [other(ids).logits])}
    batches = [tiny_inputs(2, TOKENS - turn, seed=turn) for turn in range(micro_batches)]
    expected, gradient = gradients(one, batches), gradients(other, batches)
    found["gradients"] = largest_difference(expected.values(), gradient.values())
    found["depth_gradients"] = largest_difference([expected[n] for n in DEPTH], [gradient[n] for n in DEPTH])
    found["depth_gradient_size"] = min(expected[name].abs().max().item() for name in DEPTH)
    found["same_tokens"] = torch.equal(one.generate(ids, **GENERATION), other.generate(ids, **GENERATION))
    return found


def two_ranks(folder: Path) -> dict:
    start(folder)
    # One micro-batch under the plain plan: the library's sum of partial gradients counts earlier ones several times.
    plain = {case: compare(reference(case), load(case, sharded=False), micro_batches=1) for case in CASES}
    return {
        "plain": plain,
        "sharded": sharded_sequence(),
        "collectives": collectives(),
        "documented": documented(),
        "refusals": refusals(),
        "saved": save(),
        "gradient_checkpointing": gradient_checkpointing(),
    }


def every_backbone(folder: Path) -> dict:
    """The other backbones that have a plan, also those whose token mixers or experts it leaves whole."""
    start(folder)
    return {case: compare(reference(case), load(case, sharded=True), micro_batches=2) for case in SLOW_CASES}


def sharded_sequence() -> dict:
    found = {}
    for case in CASES:
        model, sharded = reference(case), load(case, sharded=True)
        found[case] = compare(model, sharded, micro_batches=2)
        found[case] |= {"bytes": summary_bytes(model), "sharded_bytes": summary_bytes(sharded)}
    found["outputs"] = compare_outputs(model, sharded)
    found["lengths"] = {tokens: prefill_difference(model, sharded, tokens) for tokens in (1, 2, 3, 12)}
    found["chunked"] = torch.equal(
        model.generate(tiny_inputs(), **GENERATION),
        sharded.generate(tiny_inputs(), prefill_chunk_size=5, **GENERATION),
    )
    with torch.no_grad():
        tuples = [part.model(tiny_inputs(), use_cache=False, return_dict=False) for part in (model, sharded)]
    found["base_model"] = largest_difference(*tuples)
    return found


def four_ranks(folder: Path) -> dict:
    """More ranks than tokens, and shards that are padding alone."""
    start(folder)
    model, sharded = reference("llama-2-mean"), load("llama-2-mean", sharded=True)
    found = {"lengths": {tokens: prefill_difference(model, sharded, tokens) for tokens in (1, 5)}}
    return found | compare(model, sharded, micro_batches=1) | {"sharded_bytes": summary_bytes(sharded, tokens=16)}


def summary_bytes(model, tokens: int = TOKENS) -> int:
    summaries = BlockSummaries()
    with torch.no_grad():
        model(tiny_inputs(2, tokens), block_summaries=summaries)
    return summaries.sources.nbytes


def prefill_difference(one, other, tokens: int) -> float:
    ids = tiny_inputs(3, tokens)
    with torch.no_grad():
        return largest_difference([one(ids).logits], [other(ids).logits])


def compare_outputs(one, other) -> dict:
    """What a forward returns beside the logits, with padding on the left of one row."""
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[0, :4] = 0
    wanted = {"output_hidden_states": True, "output_depth_weights": True, "output_block_summaries": True}
    with torch.no_grad():
        first, second = (model(tiny_inputs(2, TOKENS), attention_mask=mask, **wanted) for model in (one, other))
    found = {"block_summaries": largest_difference([first.block_summaries], [second.block_summaries])}
    for name in ("hidden_states", "depth_weights"):
        found[name] = largest_difference(first[name], second[name])
    return found


def collectives() -> dict:
    found = {}
    for name, sharded in (("plain", False), ("sharded", True)):
        # With gradients, where every collective goes through DTensor: without them the library calls some directly.
        with CommDebugMode() as counter:
            load("llama-2-mean", sharded)(tiny_inputs(2, TOKENS), use_cache=False)
        found[name] = {str(name): count for name, count in counter.get_comm_counts().items()}
    return found


def gradient_checkpointing() -> dict:
    model, sharded = reference("mixtral-3-sum"), load("mixtral-3-sum", sharded=True)
    expected = gradients(model, [tiny_inputs(2, 12)])
    sharded.gradient_checkpointing_enable()
    sharded.train()
    found = {"gradients": largest_difference(expected.values(), gradients(sharded, [tiny_inputs(2, 12)]).values())}
    try:
        sharded(tiny_inputs(2, TOKENS))
    except ValueError as error:
        found["odd_length"] = str(error)
    return found


def documented() -> dict:
    """The Python of docs/scaling.md, beside the checkpoint that it names."""
    model, scope = reference("llama-2-mean"), {}
    if dist.get_rank() == 0:
        model.save_pretrained("my-attnres-model")
    dist.barrier()
    for code in re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(code, DOCS.name, "exec"), scope)
    with torch.no_grad():
        logits = [parallel(tiny_inputs()).logits for parallel in (scope["model"], scope["sharded"])]
        return {"differences": [largest_difference([model(tiny_inputs()).logits], [found]) for found in logits]}


def refusals() -> dict:
    too_many = DistributedConfig(tp_size=4, tp_plan="auto")
    wrong = {
        "too_many_ranks": {"distributed_config": too_many},
        "unknown_module": {"distributed_config": DistributedConfig(tp_size=2, tp_plan={"model.nothing": "colwise"})},
        "unknown_style": {
            "distributed_config": DistributedConfig(tp_size=2, tp_plan={"model.norm": "attnres_nothing"})
        },
        "both_arguments": {"distributed_config": too_many, "tp_plan": "auto"},
    }
    found = {}
    for name, arguments in wrong.items():
        try:
            AttnResForCausalLM.from_pretrained("llama-2-mean", **arguments)
        except (RuntimeError, ValueError) as error:
            found[name] = str(error)
    return found


def save() -> list[str]:
    """Checkpoints of two tensor-parallel ranks: rank by rank, and gathered into the usual files."""
    for name in SAVED[:-1]:
        load("mixtral-3-sum", SAVED_BY_RANK[name]).save_pretrained(name, distributed_checkpoint=True)
    load("mixtral-3-sum", sharded=True).save_pretrained("sharded-gathered")
    return [name for name in SAVED if Path(name).exists()]


def load_saved(folder: Path) -> dict:
    start(folder)
    world_size, model = dist.get_world_size(), reference("mixtral-3-sum")
    distributed = DistributedConfig(tp_size=world_size, tp_plan="auto") if world_size > 1 else None
    loaded = {name: AttnResForCausalLM.from_pretrained(name, distributed_config=distributed) for name in SAVED}
    return {name: largest_difference(model.parameters(), other.parameters()) for name, other in loaded.items()}


def load_on_one(folder: Path) -> dict:
    return load_saved(folder)


def load_on_four(folder: Path) -> dict:
    return load_saved(folder)


def killed_rank(folder: Path) -> dict:
    """Rank 1 dies after the first forward; what the other one then sees, and after how many seconds."""
    rank, sharded = start(folder), load("llama-2-mean", sharded=True)
    with torch.no_grad():
        sharded(tiny_inputs(2, TOKENS))
        if rank == 1:
            os._exit(9)
        began = time.monotonic()
        try:
            sharded(tiny_inputs(2, TOKENS))
        except RuntimeError as error:
            return {"error": str(error), "seconds": time.monotonic() - began}
    return {}


killed_rank.exit_codes = {1: 9}


SCENARIOS = (
    (two_ranks, 2),
    (load_on_one, 1),
    (load_on_four, 4),
    (four_ranks, 4),
    (killed_rank, 2),
)
SLOW_SCENARIOS = ((every_backbone, 2),)
