# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Runs vLLM in a process of its own: `python vllm_worker.py jobs.json answers.json`. See `serve` in `vllm_processes.py`.

A job is a dict:
    model: folder of a checkpoint.
    engine: arguments of `vllm.LLM`.
    adapter: folder of a LoRA adapter to answer with, or absent.
    rounds: `[round][prompt][token id]`. The prompts of a round are asked together, the rounds one after another.
    max_tokens: new tokens per prompt.
    paced: whether to wait for a line on standard input before each round.

Each answer is `{"module": where the model's class is from, "compiled": graphs compiled so far, "rounds": [...]}`, a round
being `{"cpu": seconds of this process, "tokens": one list per prompt, "cached": prefix hits in tokens, per prompt}`;
or `{"error": ...}`, after which no further job is run.
"""

import json
import os
import sys
import time
from pathlib import Path


def build(job: dict):
    from vllm import LLM

    fixed = {"model_impl": "transformers", "skip_tokenizer_init": True, "dtype": "float32", "max_num_seqs": 16}
    return LLM(job["model"], trust_remote_code=True, enable_lora="adapter" in job, **{**fixed, **job["engine"]})


def ask(llm, job: dict, index: int) -> dict:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    lora = LoRARequest("adapter", 1, job["adapter"]) if "adapter" in job else None
    greedy = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in job["rounds"][index]]
    start = time.process_time()
    outputs = llm.generate(prompts, greedy, lora_request=lora, use_tqdm=False)
    return {
        "cpu": time.process_time() - start,
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "cached": [output.num_cached_tokens for output in outputs],
    }


def module_of(model) -> str:
    return type(model.model).__module__


def describe(llm) -> dict:
    from vllm.compilation.counter import compilation_counter

    (module,) = set(llm.apply_model(module_of))
    return {"module": module, "compiled": compilation_counter.num_aot_compiles}


def run(jobs: list[dict], answers: list[dict], rounds_folder: Path):
    for job in jobs:
        llm = build(job)
        rounds = []
        for index in range(len(job["rounds"])):
            if job.get("paced"):
                sys.stdin.readline()
            rounds.append(ask(llm, job, index))
            if job.get("paced"):
                (rounds_folder / f"round-{index}").touch()
        answers.append({**describe(llm), "rounds": rounds})
        del llm


def main():
    jobs, answers = json.loads(Path(sys.argv[1]).read_text()), []
    try:
        run(jobs, answers, Path(sys.argv[2]).parent)
    except Exception as error:
        answers.append({"error": f"{type(error).__name__}: {error}"})
        raise
    finally:
        unfinished = Path(sys.argv[2] + ".unfinished")
        unfinished.write_text(json.dumps(answers))
        os.replace(unfinished, sys.argv[2])


if __name__ == "__main__":
    main()
