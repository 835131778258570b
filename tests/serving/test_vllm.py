"""Tokens served by vLLM's Transformers backend, from the checkpoint's own code, against `generate`.

They run in the environment of `make test-vllm`. "Equal" is equal token ids, all of them, greedy and in fp32; the models
are such that no answer hangs on rounding (see `served_models`).
"""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from served_models import expected_answers, prompts_in_two_rounds, save, served_model
from tiny_backbones import VOCAB_SIZE
from transformers import AutoModelForCausalLM
from vllm_processes import serve

from modeling_attnres import AttnResForCausalLM


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
            model = served_model(model_type, sublayers_per_block, depth_weights)
            jobs.append(job(save(model, tmp_path / f"{sublayers_per_block}-{depth_weights}")))
            expected.append(expected_answers(model, ROUNDS))
            model.model.depth_attention.query.data.zero_()
            assert expected_answers(model, [ROUNDS[0][-1:]])[0] != expected[-1][0][-1:]  # the queries count
    answers, _ = serve(tmp_path, jobs, seconds=400)
    assert count_equal(answers, expected) == 6 * sum(map(len, ROUNDS))
    for answer in answers:
        assert not any(answer["rounds"][0]["cached"])
        assert sum(cached >= 32 for cached in answer["rounds"][1]["cached"]) >= 6  # prefixes found again


def some_models(folder, **overrides) -> tuple[list, list]:
    """The models of `SOME`, their folders, and what `generate` answers."""
    models = [served_model(*arguments, **overrides) for arguments in SOME]
    folders = [save(model, folder / model.config.text_config.model_type) for model in models]
    return folders, [expected_answers(model, ROUNDS) for model in models]


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
