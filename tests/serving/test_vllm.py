# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Tokens served by vLLM's Transformers backend, from the checkpoint's own code, against `generate`.

They run in the environment of `make test-vllm`. "Equal" is equal token ids, all of them, greedy and in fp32; the models
are such that no answer hangs on rounding (see `served_models`).
"""

import json
import re
import shutil
import statistics

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from served_models import answered_model, expected_answers, generated, prompts_in_two_rounds, save, served_model
from tiny_backbones import VOCAB_SIZE
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_processes import serve, serve_in_turn

from modeling_attnres import AttnResForCausalLM, attnres_lora_config
from modeling_attnres.conversion import convert
from modeling_attnres.conversion.gguf import unpack_gguf


pytestmark = pytest.mark.vllm

BACKBONES = ("llama", "qwen3", "qwen3_moe")
FORMS = ("mean", "sum")
ROUNDS = prompts_in_two_rounds(VOCAB_SIZE)
# Prompts are read 48 tokens at a time, beside whatever decodes; blocks of 32 tokens are found again.
ENGINE = {"max_model_len": 320, "max_num_batched_tokens": 48, "block_size": 32, "enforce_eager": True}
SOME = (("llama", 3, "sum"), ("qwen3", 4, "mean"), ("qwen3_moe", 1, "sum"))


def job(model: str, **overrides) -> dict:
    return {"model": model, "engine": {**ENGINE, **overrides}, "rounds": ROUNDS, "max_tokens": 16}


def count_equal(answers, expected) -> int:
    """How many sequences were compared; fails on the first that differs, and on code that is not the checkpoint's."""
    count = 0
    for answer, rounds in zip(answers, expected, strict=True):
        assert "error" not in answer, answer
        assert answer["module"].startswith("transformers_modules.")
        for served, wanted in zip(answer["rounds"], rounds, strict=True):
            assert served["tokens"] == wanted
            count += len(wanted)
    return count


@pytest.mark.parametrize("model_type", BACKBONES)
def test_served_tokens_equal_those_of_generate(model_type, tmp_path):
    jobs, expected = [], []
    for sublayers_per_block in (1, 3, 4):
        for depth_weights in FORMS:
            model, answers = answered_model(model_type, sublayers_per_block, depth_weights, rounds=ROUNDS)
            jobs.append(job(save(model, tmp_path / f"{sublayers_per_block}-{depth_weights}")))
            expected.append(answers)
            model.model.depth_attention.query.data.zero_()
            assert generated(model, ROUNDS[0])[0] != answers[0]  # the queries count
    answers, _ = serve(tmp_path, jobs, seconds=400)
    assert count_equal(answers, expected) == 6 * sum(map(len, ROUNDS))
    for answer in answers:
        assert not any(answer["rounds"][0]["cached"])
        assert sum(cached >= 32 for cached in answer["rounds"][1]["cached"]) >= 6  # prefixes found again


def some_models(folder, **overrides) -> tuple[list, list]:
    """The models of `SOME`, their folders, and what `generate` answers."""
    models, answers = zip(*(answered_model(*arguments, rounds=ROUNDS, **overrides) for arguments in SOME))
    return [save(model, folder / model.config.text_config.model_type) for model in models], list(answers)


def test_compiled(tmp_path):
    folders, expected = some_models(tmp_path, num_hidden_layers=2, mlp_only_layers=[1])
    answers, _ = serve(tmp_path, [job(folder, enforce_eager=False) for folder in folders], seconds=580)
    assert count_equal(answers, expected) == 3 * sum(map(len, ROUNDS))
    assert all(answer["compiled"] for answer in answers), answers


def test_tensor_parallel(tmp_path):
    folders, expected = some_models(tmp_path)
    answers, _ = serve(tmp_path, [job(folder, tensor_parallel_size=2) for folder in folders], seconds=580)
    assert count_equal(answers, expected) == 3 * sum(map(len, ROUNDS))


@pytest.mark.parametrize(("model_type", "seeds"), [("llama", (2, 3)), ("qwen3", (0, 1))])
def test_a_lora_adapter(model_type, seeds, tmp_path):
    """Trained on the model, or on the PreNorm model that it was converted from: that one has the names on disk."""
    model = served_model(model_type, 3, "sum")
    base = save(model, tmp_path / "base")
    dense = AutoModelForCausalLM.from_config(model.config.text_config)
    plain = expected_answers(model, ROUNDS)
    jobs, expected = [], []
    for seed, trained_on in zip(seeds, (model, dense), strict=True):
        adapter = tmp_path / f"adapter-{seed}"
        save_random_adapter(trained_on, adapter, seed)
        adapted = PeftModel.from_pretrained(AttnResForCausalLM.from_pretrained(base), adapter).eval()
        expected.append(expected_answers(adapted, ROUNDS))
        assert expected[-1] != plain
        jobs.append({**job(base, max_lora_rank=8), "adapter": str(adapter)})
    answers, _ = serve(tmp_path, jobs, seconds=400)
    assert count_equal(answers, expected) == 2 * sum(map(len, ROUNDS))


def save_random_adapter(model, folder, seed: int):
    torch.manual_seed(seed)
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder)
    adapted.unload()


@pytest.fixture(scope="module")
def smollm2(gguf_file, tmp_path_factory):
    """Folders of SmolLM2-135M-Instruct: as it is, and converted."""
    folder = tmp_path_factory.mktemp("smollm2")
    unpack_gguf(gguf_file, folder / "plain", torch.float32)
    convert(folder / "plain", folder / "converted", num_blocks=8, check=False)
    return str(folder / "plain"), str(folder / "converted")


TEXTS = [
    "Why is the sky blue?",
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time there was a",
    "Dear Sir or Madam,",
    "One, two, three, four,",
    "2",
    "Water boils at " * 40,
]


def test_converted_smollm2(smollm2, tmp_path):
    _, converted = smollm2
    tokenizer = AutoTokenizer.from_pretrained(converted)
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    model = AttnResForCausalLM.from_pretrained(converted).eval()
    rounds = [prompts, prompts[::-1]]
    answers, _ = serve(tmp_path, [{**job(converted), "rounds": rounds}], seconds=500)
    assert count_equal(answers, [expected_answers(model, rounds)]) == 2 * len(TEXTS)
    assert "Paris" in tokenizer.decode(answers[0]["rounds"][0]["tokens"][1])


# Batches; what a decode step may cost in CPU time beside the plain model's on a machine that does other work as well.
TIMED_BATCHES, MOST_COST = (1, 8), 1.15
DECODED, TIMED_ROUNDS, WARM_UP = 24, 13, 2


def test_decode_cost_beside_the_plain_model(smollm2, tmp_path, capsys):
    """Processes take turns; each round's prompts are new, and short beside what is decoded."""
    plain, converted = smollm2
    mean = shutil.copytree(converted, tmp_path / "mean")
    config = json.loads((mean / "config.json").read_text())
    (mean / "config.json").write_text(json.dumps({**config, "depth_weights": "mean"}))
    generator = torch.Generator().manual_seed(3)
    rounds = [
        torch.randint(1000, 40_000, (batch, 4), generator=generator).tolist()
        for batch in TIMED_BATCHES
        for _ in range(TIMED_ROUNDS)
    ]
    folders = {"plain": plain, "sum": converted, "mean": str(mean)}
    jobs = [{**job(folder), "rounds": rounds, "max_tokens": DECODED} for folder in folders.values()]
    answers = dict(zip(folders, serve_in_turn(tmp_path, jobs, seconds=300)))
    lines, ratios = [], []
    for position, batch in enumerate(TIMED_BATCHES):
        part = slice(position * TIMED_ROUNDS + WARM_UP, (position + 1) * TIMED_ROUNDS)
        seconds = {name: [round_["cpu"] for round_ in answer["rounds"][part]] for name, answer in answers.items()}
        base = 1000 * statistics.median(seconds["plain"]) / DECODED
        for form in FORMS:
            quotients = [one / other for one, other in zip(seconds[form], seconds["plain"])]
            low, ratio, high = statistics.quantiles(quotients, n=4)
            ratios.append(ratio)
            lines.append(f'batch {batch}, "{form}": {ratio:.3f} [{low:.3f}, {high:.3f}] of {base:.1f} ms')
    with capsys.disabled():
        print("\nCPU time per decode step under vLLM, ratio to plain [quartiles], 1 thread, fp32:", *lines, sep="\n  ")
    assert max(ratios) < MOST_COST


def test_pipeline_parallel_is_refused_before_weights_are_read(tmp_path):
    folder = save(served_model("llama", 3, "sum"), tmp_path / "model")
    (answer,), log = serve(tmp_path, [job(folder, pipeline_parallel_size=2)], seconds=200)
    assert "error" in answer
    assert re.search(
        r"Decoder layer \d must stay a layer of depth attention, .* got PPMissingLayer; for pipeline", log
    )
    assert "Loading weights took" not in log


def test_an_adapter_with_queries_of_its_own_is_refused(tmp_path):
    model = served_model("llama", 3, "sum")
    base, adapter = save(model, tmp_path / "base"), tmp_path / "adapter"
    get_peft_model(model, attnres_lora_config(r=4)).save_pretrained(adapter)
    jobs = [{**job(base, max_lora_rank=8), "adapter": str(adapter)}]
    (answer,), _ = serve(tmp_path, jobs, seconds=200)
    assert "Unsupported modules_to_save: ['depth_attention']" in answer["error"]
