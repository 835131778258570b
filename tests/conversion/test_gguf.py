# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""GGUF files: tiny ones, whole and damaged, and a real pretrained model (the fixture `gguf_file`)."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tiny_checkpoints import load, logits_with_and_without_cache, save_backbone, weights
from tiny_gguf import save_gguf
from tiny_tokenizers import VOCAB_SIZE, byte_level, save_json, texts
from transformers import AutoTokenizer

from modeling_attnres import AttnResForCausalLM
from modeling_attnres.conversion import ConversionError, ParityError, convert
from modeling_attnres.conversion import gguf as gguf_module
from modeling_attnres.conversion.gguf import unpack_gguf
from modeling_attnres.conversion.tokenizer import SAME


PROMPT = "The capital of France is"


# --- Tiny files ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["llama", "qwen2"])
def source(request, tmp_path) -> Path:
    folder = save_backbone(tmp_path / "source", request.param, vocab_size=VOCAB_SIZE, intermediate_size=64)
    save_json(byte_level(), folder)
    return folder


@pytest.fixture
def llama(tmp_path) -> Path:
    return save_backbone(tmp_path / "llama", intermediate_size=64)


def test_a_whole_file_gives_the_models_weights(tmp_path, source):
    file = save_gguf(source, tmp_path / "model.gguf")
    report = convert(file, tmp_path / "out", num_blocks=4)
    assert report.max_logit_difference == 0.0
    found = weights(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in weights(source).items())


def test_the_tokenizer_is_the_files(tmp_path, source):
    file = save_gguf(source, tmp_path / "model.gguf")
    report = convert(file, tmp_path / "out", check=False)
    assert report.tokenizer.startswith(SAME)
    expected = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [found(text).input_ids for text in texts()] == [expected(text).input_ids for text in texts()]
    assert found.chat_template == expected.chat_template == "{{ messages[0].content }}"


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_quantised_files_are_dequantised(tmp_path, llama, dtype):
    file = save_gguf(llama, tmp_path / "model.GGUF", quantise=True)
    report = convert(file, tmp_path / "out", dtype=dtype)
    assert (report.max_logit_difference, report.dtype) == (0.0, dtype or "float32")


def test_scales_of_the_rotary_frequencies_that_scale_nothing(tmp_path, llama):
    file = save_gguf(llama, tmp_path / "model.gguf", beside={"rope_freqs.weight": np.ones(4, dtype=np.float32)})
    assert convert(file, tmp_path / "out").max_logit_difference == 0.0


def yarn(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)


UNREAD = "Transformers has no place for all of its tensors in a 'llama' model and would leave them out: "
REFUSED = {
    "one tensor missing": (
        {"without": ("blk.1.attn_q.weight",)},
        r"1 tensors of its model are missing: model\.layers\.1\.self_attn\.q_proj\.weight\.",
    ),
    "several missing": (
        {"without": ("output_norm.weight", "blk.0.ffn_up.weight")},
        r"2 tensors of its model are missing: model\.layers\.0\.mlp\.up_proj\.weight, model\.norm\.weight\.",
    ),
    "a bias too many": (
        {"beside": {"blk.2.attn_q.bias": np.full(32, 0.5, dtype=np.float32)}},
        f"{UNREAD}blk.2.attn_q.bias",
    ),
    "another shape": (
        {"replaced": {"output_norm.weight": np.ones(31, dtype=np.float32)}},
        r"1 tensors have other shapes than .*: model\.norm\.weight is \[31\], \[32\] is due",
    ),
    "rotary scales": (
        {"beside": {"rope_freqs.weight": np.array([1, 1, 4, 8], dtype=np.float32)}},
        f"{UNREAD}rope_freqs.weight",
    ),
    "scaled rotary embeddings": (
        {"metadata": yarn},
        r"`llama\.rope\.scaling\.type` is 'yarn', which Transformers does not",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_would_lose_or_invent_something_are_refused(tmp_path, llama, case):
    options, message = REFUSED[case]
    file = save_gguf(llama, tmp_path / "model.gguf", **options)
    with pytest.raises(ConversionError, match=message):
        convert(file, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "model.gguf"}


@pytest.mark.parametrize("part", [0, 1, 2])
def test_parts_of_a_split_file_are_refused_whatever_their_name(tmp_path, llama, part):
    save_gguf(llama, tmp_path / "model.gguf", tensors_per_file=15)
    parts = sorted(tmp_path.glob("model-*.gguf"))
    assert len(parts) == 3
    renamed = parts[part].rename(tmp_path / "whole.gguf")
    with pytest.raises(
        ConversionError, match=rf"part {part + 1} of 3 of a split GGUF file, with \d+ of 39 tensors; join"
    ):
        convert(renamed, tmp_path / "out")


@pytest.mark.parametrize("length", [0, 3, 100, 1500, -5000, -40])
def test_cut_files_are_refused_in_a_sentence(tmp_path, llama, length):
    file = save_gguf(llama, tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ConversionError, match=r"model\.gguf: not a sound GGUF file \(.*\)\.") as refusal:
        convert(file, tmp_path / "out")
    assert "\n" not in str(refusal.value)


def test_a_folder_of_gguf_files_is_no_checkpoint(tmp_path, llama):
    (tmp_path / "folder").mkdir()
    save_gguf(llama, tmp_path / "folder" / "a.gguf")
    with pytest.raises(ConversionError, match=r"holds GGUF files; give one of them as `source`: a\.gguf"):
        convert(tmp_path / "folder", tmp_path / "out")


def test_the_check_reads_the_file_not_what_was_unpacked(tmp_path, llama, monkeypatch):
    """A fault of the unpacking must not be on both sides of the comparison."""
    unpack = gguf_module.unpack_gguf

    def unpack_and_damage(file, folder, dtype):
        unpack(file, folder, dtype)
        model = load(folder, torch.float32)
        model.model.layers[1].mlp.up_proj.weight.data.mul_(1.01)
        model.save_pretrained(folder)

    monkeypatch.setattr("modeling_attnres.conversion.fetch.unpack_gguf", unpack_and_damage)
    with pytest.raises(ParityError, match="The result's logits differ from the source's by up to"):
        convert(save_gguf(llama, tmp_path / "model.gguf"), tmp_path / "out")


# --- Real weights ----------------------------------------------------------------------------------------------------


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
