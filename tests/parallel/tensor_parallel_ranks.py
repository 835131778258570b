"""What [`test_sequence_sharding`] runs on several ranks: tensor parallelism, plain and with a sharded sequence."""

import datetime
import os
import re
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers.distributed import DistributedConfig
from transformers.utils import logging


sys.path.insert(0, str(Path(__file__).parents[1]))
from ranks import main
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
SAVED = ("plain-by-rank", "sharded-by-rank", "sharded-gathered")
TOKENS = 13  # no multiple of the number of ranks


def start() -> int:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    return dist.get_rank()


def reference(folder: Path, case: str):
    """The model in one process (every rank builds the same), and the checkpoint that the ranks load."""
    model = tiny_model(*CASES[case], num_key_value_heads=4)
    if dist.get_rank() == 0 and not (folder / case).exists():
        model.save_pretrained(folder / case)
    dist.barrier()
    return model


def load(folder: Path, case: str, model, sharded: bool):
    plan = sequence_parallel_plan(model.config) if sharded else "auto"
    distributed = DistributedConfig(tp_size=dist.get_world_size(), tp_plan=plan)
    return AttnResForCausalLM.from_pretrained(folder / case, distributed_config=distributed)


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


def plain_tensor_parallel(folder: Path) -> dict:
    start()
    found = {}
    for case in CASES:
        model = reference(folder, case)
        # One micro-batch: the library's own sum of partial gradients counts earlier ones several times.
        found[case] = compare(model, load(folder, case, model, sharded=False), micro_batches=1)
    return found


def sharded_sequence(folder: Path) -> dict:
    start()
    found = {}
    for case in CASES:
        model = reference(folder, case)
        sharded = load(folder, case, model, sharded=True)
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
    start()
    model = reference(folder, "llama-2-mean")
    sharded = load(folder, "llama-2-mean", model, sharded=True)
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


def collectives_of_a_prefill(folder: Path) -> dict:
    start()
    model = reference(folder, "llama-2-mean")
    found = {}
    for name, sharded in (("plain", False), ("sharded", True)):
        parallel = load(folder, "llama-2-mean", model, sharded)
        # With gradients, where every collective goes through DTensor: without them the library calls some directly.
        with CommDebugMode() as collectives:
            parallel(tiny_inputs(2, TOKENS), use_cache=False)
        found[name] = {str(name): count for name, count in collectives.get_comm_counts().items()}
    return found


def gradient_checkpointing(folder: Path) -> dict:
    start()
    model = reference(folder, "mixtral-3-sum")
    sharded = load(folder, "mixtral-3-sum", model, sharded=True)
    expected = gradients(model, [tiny_inputs(2, 12)])
    sharded.gradient_checkpointing_enable()
    sharded.train()
    found = {"gradients": largest_difference(expected.values(), gradients(sharded, [tiny_inputs(2, 12)]).values())}
    try:
        sharded(tiny_inputs(2, TOKENS))
    except ValueError as error:
        found["odd_length"] = str(error)
    return found


def documented(folder: Path) -> dict:
    """The Python of docs/scaling.md, in a folder that holds the checkpoint it names."""
    start()
    model = reference(folder, "llama-2-mean")
    folder = folder / "documented"
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "my-attnres-model")
    dist.barrier()
    os.chdir(folder)
    scope = {}
    for code in re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(code, DOCS.name, "exec"), scope)
    with torch.no_grad():
        logits = [parallel(tiny_inputs()).logits for parallel in (scope["model"], scope["sharded"])]
        return {"differences": [largest_difference([model(tiny_inputs()).logits], [found]) for found in logits]}


def refusals(folder: Path) -> dict:
    start()
    reference(folder, "llama-2-mean")
    plans = {
        "too_many_ranks": DistributedConfig(tp_size=4, tp_plan="auto"),
        "unknown_module": DistributedConfig(tp_size=2, tp_plan={"model.nothing": "colwise"}),
        "unknown_style": DistributedConfig(tp_size=2, tp_plan={"model.backbone.norm": "attnres_nothing"}),
    }
    found = {}
    for name, distributed in plans.items():
        try:
            AttnResForCausalLM.from_pretrained(folder / "llama-2-mean", distributed_config=distributed)
        except (RuntimeError, ValueError) as error:
            found[name] = str(error)
    try:
        AttnResForCausalLM.from_pretrained(
            folder / "llama-2-mean", distributed_config=plans["too_many_ranks"], tp_plan="auto"
        )
    except ValueError as error:
        found["both_arguments"] = str(error)
    return found


def checkpoint_of_two(folder: Path) -> dict:
    """Saved by two tensor-parallel ranks: rank by rank, and gathered into the usual files."""
    start()
    model = reference(folder, "mixtral-3-sum")
    for sharded in (False, True):
        parallel = load(folder, "mixtral-3-sum", model, sharded)
        name = "sharded" if sharded else "plain"
        parallel.save_pretrained(folder / f"{name}-by-rank", distributed_checkpoint=True)
    parallel.save_pretrained(folder / "sharded-gathered")
    return {}


def load_checkpoint_of_two(folder: Path) -> dict:
    start()
    world_size, found = dist.get_world_size(), {}
    model = reference(folder, "mixtral-3-sum")
    for name in SAVED:
        distributed = DistributedConfig(tp_size=world_size, tp_plan="auto") if world_size > 1 else None
        loaded = AttnResForCausalLM.from_pretrained(folder / name, distributed_config=distributed)
        found[name] = largest_difference(model.parameters(), loaded.parameters())
    return found


def load_on_one(folder: Path) -> dict:
    return load_checkpoint_of_two(folder)


def load_on_four(folder: Path) -> dict:
    return load_checkpoint_of_two(folder)


def killed_rank(folder: Path) -> dict:
    """Rank 1 dies after the first forward; what the other one then sees, and after how many seconds."""
    rank = start()
    model = reference(folder, "llama-2-mean")
    sharded = load(folder, "llama-2-mean", model, sharded=True)
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


if __name__ == "__main__":
    main(
        (plain_tensor_parallel, 2),
        (sharded_sequence, 2),
        (collectives_of_a_prefill, 2),
        (gradient_checkpointing, 2),
        (documented, 2),
        (refusals, 2),
        (checkpoint_of_two, 2),
        (load_on_one, 1),
        (load_on_four, 4),
        (four_ranks, 4),
        (killed_rank, 2),
    )
