"""Tokens served by vLLM's Transformers backend, from the checkpoint's own code, against `generate`.

They run in the environment of `make test-vllm`. "Equal" is equal token ids, all of them, greedy and in fp32; the models
are such that no answer hangs on rounding (see `served_models`).
"""

import pytest
from served_models import expected_answers, prompts_in_two_rounds, save, served_model
from tiny_backbones import VOCAB_SIZE
from vllm_processes import serve


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
