"""A real pretrained model, SmolLM2-135M-Instruct: the fixture `gguf_file`."""

import pytest
import torch
from tiny_checkpoints import load, logits_with_and_without_cache
from transformers import AutoTokenizer

from modeling_attnres import AttnResForCausalLM
from modeling_attnres.conversion import convert
from modeling_attnres.conversion.gguf import unpack_gguf


PROMPT = "The capital of France is"


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def smollm2(request, gguf_file, tmp_path_factory):
    """The file, the source's logits with and without cache, and the dtype of all."""
    folder = tmp_path_factory.mktemp("plain")
    unpack_gguf(gguf_file, folder, request.param)
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPT + " Paris, and it has many museums.", return_tensors="pt")
    return folder, logits_with_and_without_cache(load(folder, request.param), tokens.input_ids), tokens, request.param


@pytest.mark.slow
@pytest.mark.parametrize("sublayers_per_block", [1, 2, 12])
def test_real_weights_convert_without_changing_a_bit(tmp_path, gguf_file, smollm2, sublayers_per_block):
    _, expected, tokens, dtype = smollm2
    report = convert(
        gguf_file, tmp_path / "out", sublayers_per_block=sublayers_per_block, dtype=dtype, check_text=PROMPT
    )
    assert report.max_logit_difference == 0.0
    assert (report.num_sublayers, report.parameters_added) == (60, 2 * 60 * 576)
    model = load(tmp_path / "out", dtype, AttnResForCausalLM)
    found = logits_with_and_without_cache(model, tokens.input_ids)
    assert expected.abs().max() > 15
    assert (found.float() - expected.float()).abs().max() == 0.0

    model.train()
    model(**tokens, labels=tokens.input_ids).loss.backward()
    norms = model.model.depth_attention.query.grad.float().norm(dim=-1)
    assert norms.shape == (60,)
    assert norms.min() > 0


@pytest.mark.slow
def test_real_model_talks_sense(tmp_path, gguf_file):
    convert(gguf_file, tmp_path / "out", num_blocks=8, check=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AttnResForCausalLM.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
