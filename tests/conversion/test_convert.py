# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import json
import shutil

import pytest
import torch
from fresh_process import LOADER, load_results, run_python
from hub_server import File, HubServer, Repository
from safetensors.torch import save_file
from tiny_backbones import BACKBONES, NUM_SUBLAYERS, randomize_depth_attention, tiny_inputs
from tiny_checkpoints import (
    edit_json,
    load,
    logits_with_and_without_cache,
    same_files,
    save_backbone,
    save_tokenizer,
    weights,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, ViTConfig

from modeling_attnres import AttnResConfig, AttnResForCausalLM, UnsupportedBackboneError
from modeling_attnres.conversion import CheckpointError, ConversionError, ParityError, convert
from modeling_attnres.conversion import parity as parity_module


QUERY, KEY_NORM = "model.depth_attention.query", "model.depth_attention.key_norm"


# --- Lossless --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model_type", BACKBONES)
def test_every_backbone_converts_without_changing_a_bit(tmp_path, model_type, dtype):
    source = save_backbone(tmp_path / "source", model_type, dtype)
    expected = logits_with_and_without_cache(load(source, dtype))
    assert expected.abs().max() > 0.1
    for sublayers_per_block in (1, 2, 6, NUM_SUBLAYERS):
        out = tmp_path / f"out{sublayers_per_block}"
        convert(source, out, sublayers_per_block=sublayers_per_block, check=False)
        result = load(out, dtype, AttnResForCausalLM)
        assert result.config.sublayers_per_block == sublayers_per_block
        assert torch.equal(logits_with_and_without_cache(result), expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_size", ["50GB", "30KB"], ids=["one file", "shards"])
def test_weights_are_the_sources_and_two_more(tmp_path, tied, max_shard_size):
    source = save_backbone(tmp_path / "source", max_shard_size=max_shard_size, tie_word_embeddings=tied)
    report = convert(source, tmp_path / "out", num_blocks=4)
    assert report.max_logit_difference == 0.0
    before, after = weights(source), weights(tmp_path / "out")
    assert after.keys() - before.keys() == {QUERY, KEY_NORM}
    assert ("lm_head.weight" in after) == (not tied)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(after[QUERY], torch.zeros(NUM_SUBLAYERS, 32))
    assert torch.equal(after[KEY_NORM], torch.ones(NUM_SUBLAYERS, 32))
    assert report.parameters_added == 2 * NUM_SUBLAYERS * 32
    assert report.num_parameters == sum(tensor.numel() for tensor in after.values())


def test_the_check_reports_what_it_compared(tmp_path, llama):
    save_tokenizer(llama)
    report = convert(llama, tmp_path / "out", check_text="depth attends over blocks")
    assert report.parity.keys() == {"fixed token ids", "given text"}
    assert [row["tokens"] for row in report.parity.values()] == [48, 4]
    for row in report.parity.values():
        assert (row["max_logit_difference"], row["kl_divergence"], row["top1_agreement"]) == (0.0, 0.0, 1.0)
        assert row["max_logit"] > 0.1
    assert json.loads((tmp_path / "out" / "conversion_report.json").read_text()) == report.to_dict()


def test_a_text_that_the_model_cannot_read_whole(tmp_path, llama):
    save_tokenizer(llama)
    with pytest.raises(ConversionError, match=r"`check_text` must have at most as many .*, 128, got 129"):
        convert(llama, tmp_path / "out", check_text="depth " * 129)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_mean_weights_are_close_and_say_how_close(tmp_path, llama):
    report = convert(llama, tmp_path / "out", depth_weights="mean")
    assert AttnResConfig.from_pretrained(tmp_path / "out").depth_weights == "mean"
    assert 0 < report.max_logit_difference < 0.1


def test_a_large_model_is_compared_one_submodule_at_a_time(tmp_path, monkeypatch):
    # A mixture of experts: the library rearranges its weights, so reading them from disk takes another path.
    source = save_backbone(tmp_path / "source", "mixtral", torch.bfloat16)
    monkeypatch.setattr(parity_module, "WHOLE_MODEL_BYTES", 1000)
    report = convert(source, tmp_path / "out", dtype="float32")
    assert report.max_logit_difference == 0.0
    assert "one submodule at a time from disk" in report.check


def test_no_check_says_so(tmp_path, llama):
    report = convert(llama, tmp_path / "out", check=False)
    assert report.check == "Skipped on request (`--no-check`)."
    assert report.max_logit_difference is None
    assert "Skipped on request" in (tmp_path / "out" / "README.md").read_text()


def test_a_result_that_computes_something_else_is_not_written(tmp_path, llama, monkeypatch):
    original = parity_module.compare_logits
    monkeypatch.setitem(convert.__globals__, "compare_logits", lambda source, result: original(source, result + 1e-3))
    with pytest.raises(ParityError, match=r"differ from the source's by up to 0\.001"):
        convert(llama, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


# --- What comes along ------------------------------------------------------------------------------------------------


def test_tokenizer_generation_config_and_card_come_along(tmp_path, llama):
    save_tokenizer(llama)
    GenerationConfig(temperature=0.25, do_sample=True, eos_token_id=[2, 5]).save_pretrained(llama)
    (llama / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# Source\n")
    (llama / "LICENSE").write_text("a licence")
    convert(llama, tmp_path / "out", num_blocks=4)
    out = tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("depth attends over blocks").input_ids == [1, 2, 3, 4]
    assert same_files(llama, out, ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"))
    assert AttnResForCausalLM.from_pretrained(out).generation_config.eos_token_id == [2, 5]
    card = (out / "README.md").read_text()
    assert card.startswith("---\n")
    for line in ("license: apache-2.0", "library_name: transformers", "pipeline_tag: text-generation", "- attnres"):
        assert line in card.split("---")[1]
    assert "4 of 2 sublayers" in card
    assert "| fixed token ids | 48 | 0 |" in card


def test_tokenizer_whose_class_follows_from_the_model_type(tmp_path):
    source = save_backbone(tmp_path / "source", "qwen2")
    save_tokenizer(source)
    edit_json(source / "tokenizer_config.json", tokenizer_class=None)
    expected = AutoTokenizer.from_pretrained(source)("depth attends over blocks").input_ids
    convert(source, tmp_path / "out", check=False)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("depth attends over blocks").input_ids == expected


def test_code_of_the_source_is_not_carried_along(tmp_path, llama):
    edit_json(llama / "config.json", auto_map={"AutoModelForCausalLM": "modeling_other.Other"})
    assert convert(llama, tmp_path / "out").max_logit_difference == 0.0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "modeling_other" not in json.dumps(config)
    heads = ("CausalLM", "QuestionAnswering", "SequenceClassification", "TokenClassification")
    assert config["auto_map"] == {
        "AutoConfig": "configuration_attnres.AttnResConfig",
        "AutoModel": "modeling_attnres.AttnResModel",
        **{f"AutoModelFor{head}": f"modeling_attnres.AttnResFor{head}" for head in heads},
    }
    assert config["architectures"] == ["AttnResForCausalLM"]


def test_result_loads_where_the_package_is_not_installed(tmp_path, llama):
    convert(llama, tmp_path / "out", num_blocks=4)
    tokens = tiny_inputs()
    job = {
        "source": str(tmp_path / "out"),
        "auto_class": "AutoModelForCausalLM",
        "inputs": tokens.tolist(),
        "again": str(tmp_path / "again"),
        "results": str(tmp_path / "results.safetensors"),
    }
    (tmp_path / "jobs.json").write_text(json.dumps([job]))
    run_python(LOADER, tmp_path / "jobs.json", folder=tmp_path)
    found = load_results(tmp_path / "results.safetensors")
    with torch.no_grad():
        expected = AttnResForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits
    torch.testing.assert_close(found["first"]["logits"], expected, rtol=0, atol=1e-6)
    assert torch.equal(found["again"]["logits"], found["first"]["logits"])


def test_source_on_the_hub(tmp_path, llama):
    save_tokenizer(llama)
    files = {path.name: File(path.read_bytes(), path.suffix == ".safetensors") for path in llama.iterdir()}
    files["pytorch_model.bin"] = File(b"the same weights once more, not to be downloaded", True)
    with HubServer() as server:
        repository = server.repositories["user/llama"] = Repository()
        repository.commits.append(("0" * 40, files))
        run_python(
            "-c",
            "from modeling_attnres.conversion.cli import main; main(['user/llama', 'out', '--num-blocks', '4'])",
            folder=tmp_path,
            HF_ENDPOINT=server.url,
            HF_HUB_DISABLE_XET="1",
        )
        assert not any("pytorch_model.bin" in request for request in server.requests if "/resolve/" in request)
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert report["base_model"] == "user/llama"
    assert report["parity"]["fixed token ids"]["max_logit_difference"] == 0.0
    assert "base_model: user/llama" in (tmp_path / "out" / "README.md").read_text()
    assert same_files(llama, tmp_path / "out", ("tokenizer.json",))


# --- Options ---------------------------------------------------------------------------------------------------------


def test_dtype_casts_what_the_backbone_does_not_keep_in_fp32(tmp_path):
    source = save_backbone(tmp_path / "source", "deepseek_v3")
    report = convert(source, tmp_path / "out", dtype="bfloat16")
    assert (report.dtype, report.max_logit_difference) == ("bfloat16", 0.0)
    dtypes = {name: tensor.dtype for name, tensor in weights(tmp_path / "out").items()}
    assert {dtype for name, dtype in dtypes.items() if "e_score_correction_bias" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "e_score_correction_bias" not in name} == {torch.bfloat16}
    config = AttnResConfig.from_pretrained(tmp_path / "out")
    assert config.dtype == config.text_config.dtype == torch.bfloat16


def test_new_tensors_take_the_models_dtype(tmp_path):
    source = save_backbone(tmp_path / "source", dtype=torch.bfloat16)
    edit_json(source / "config.json", dtype=None)  # then the weights say it
    assert convert(source, tmp_path / "out").dtype == "bfloat16"
    assert weights(tmp_path / "out")[QUERY].dtype == torch.bfloat16


def test_dry_run_tells_the_plan_and_writes_nothing(tmp_path, llama):
    report = convert(llama, tmp_path / "out", num_blocks=4, dtype="bfloat16", dry_run=True)
    assert (report.num_blocks, report.sublayers_per_block, report.written) == (4, 2, False)
    assert report.weight_bytes == 2 * report.num_parameters
    assert report.check == "Dry run: nothing was written."
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_overwrite_replaces_a_model_folder(tmp_path, llama):
    convert(llama, tmp_path / "out", num_blocks=4, check=False)
    (tmp_path / "out" / "stale.txt").write_text("of the model before")
    with pytest.raises(ConversionError, match="`out` exists"):
        convert(llama, tmp_path / "out", num_blocks=2)
    assert (tmp_path / "out" / "stale.txt").exists()
    convert(llama, tmp_path / "out", num_blocks=2, overwrite=True, check=False)
    assert AttnResConfig.from_pretrained(tmp_path / "out").num_blocks == 2
    assert not (tmp_path / "out" / "stale.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "out"}


def test_overwrite_refuses_what_is_no_model_folder(tmp_path, llama):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConversionError, match="not a model folder"):
        convert(llama, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("place", ["itself", "inside", "around"])
def test_out_and_source_must_not_overlap(tmp_path, place):
    source = save_backbone(tmp_path / "around" / "source")
    out = {"itself": source, "inside": source / "out", "around": tmp_path / "around"}[place]
    with pytest.raises(ConversionError, match="must not"):
        convert(source, out, overwrite=True)
    assert len(weights(source)) == 39


def test_keys_are_dropped_only_by_name(tmp_path, llama):
    tensors = weights(llama)
    save_file({**tensors, "model.layers.0.self_attn.gate.weight": torch.ones(4)}, llama / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unknown: model\.layers\.0\.self_attn\.gate\.weight"):
        convert(llama, tmp_path / "out")
    report = convert(llama, tmp_path / "out", drop_keys=(r"\.gate\.weight$",))
    assert report.dropped_keys == ["model.layers.0.self_attn.gate.weight"]
    assert weights(tmp_path / "out").keys() == tensors.keys() | {QUERY, KEY_NORM}


def test_pickled_weights_that_load_safely_convert(tmp_path, llama):
    tensors = weights(llama)
    torch.save(tensors, llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    assert convert(llama, tmp_path / "out").max_logit_difference == 0.0
    assert weights(tmp_path / "out").keys() == tensors.keys() | {QUERY, KEY_NORM}


# --- AttnRes sources -------------------------------------------------------------------------------------------------


@pytest.fixture
def converted(tmp_path, llama):
    convert(llama, tmp_path / "attnres", num_blocks=4, check=False)
    return tmp_path / "attnres"


@pytest.fixture
def trained(tmp_path, converted):
    model = AttnResForCausalLM.from_pretrained(converted)
    randomize_depth_attention(model)
    model.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "kimi_linear"])
def test_back_to_prenorm_gives_the_source_back(tmp_path, model_type):
    source = save_backbone(tmp_path / "source", model_type, max_shard_size="30KB")
    convert(source, tmp_path / "attnres", check=False)
    report = convert(tmp_path / "attnres", tmp_path / "back", to="prenorm")
    assert (report.target, report.max_logit_difference) == ("prenorm", 0.0)
    assert same_files(source, tmp_path / "back", ("*.safetensors", "config.json", "generation_config.json"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")


def test_trained_queries_are_not_thrown_away(tmp_path, trained):
    with pytest.raises(ConversionError, match=r"no place for trained queries: 8 of 8 are not zero .*would be lost"):
        convert(trained, tmp_path / "back", to="prenorm")


def test_mean_weights_have_no_exact_prenorm_model(tmp_path, llama):
    convert(llama, tmp_path / "mean", depth_weights="mean", check=False)
    with pytest.raises(ConversionError, match="Only a model with `depth_weights='sum'`"):
        convert(tmp_path / "mean", tmp_path / "back", to="prenorm")


@pytest.mark.parametrize("sublayers_per_block", [1, 3, NUM_SUBLAYERS])
def test_zero_queries_can_be_re_blocked_exactly(tmp_path, converted, sublayers_per_block):
    report = convert(converted, tmp_path / "out", sublayers_per_block=sublayers_per_block)
    assert (report.max_logit_difference, report.parameters_added) == (0.0, 0)
    assert AttnResConfig.from_pretrained(tmp_path / "out").sublayers_per_block == sublayers_per_block


@pytest.mark.parametrize("change", [{"num_blocks": 2}, {"depth_weights": "mean"}])
def test_trained_queries_keep_their_blocks(tmp_path, trained, change):
    with pytest.raises(ConversionError, match=r"cannot change from .* the queries are trained"):
        convert(trained, tmp_path / "out", **change)


def test_a_trained_model_can_be_cast(tmp_path, trained):
    report = convert(trained, tmp_path / "out", dtype="bfloat16")
    assert (report.max_logit_difference, report.queries_are_zero) == (0.0, False)
    assert torch.equal(weights(tmp_path / "out")[QUERY], weights(trained)[QUERY].bfloat16())


def test_unchanged_conversion_keeps_every_bit(tmp_path, trained):
    convert(trained, tmp_path / "out")
    before, after = weights(trained), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_blocks": 0}, "`num_blocks` must be an integer from 1 to the 8 sublayers"),
        ({"sublayers_per_block": 9}, "`sublayers_per_block` must be an integer from 1 to the 8 sublayers"),
        ({"num_blocks": 2, "sublayers_per_block": 2}, "not both: got num_blocks=2 and sublayers_per_block=2"),
        ({"depth_weights": "max"}, "`depth_weights` must be one of"),
        ({"dtype": "int8"}, "`dtype` must be one of float32, bfloat16, float16, got 'int8'"),
        ({"dtype": torch.int8}, "`dtype` must be one of"),
        ({"to": "gguf"}, "`to` must be one of attnres, prenorm, kimi_k3, fla, got 'gguf'"),
        ({"dialect": "klingon"}, "`dialect` must be one of"),
        ({"to": "prenorm", "num_blocks": 2}, "keeps the source's blocks"),
        ({"to": "prenorm"}, "the source is a PreNorm model already"),
        ({"to": "fla"}, "convert the PreNorm model first"),
        ({"drop_keys": ("(",)}, "`drop_keys` must be regular expressions"),
        ({"check_text": "text"}, "`check_text` needs the source's tokenizer"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_arguments_are_checked_before_anything_is_written(tmp_path, llama, options, message):
    with pytest.raises(ConversionError, match=message):
        convert(llama, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


@pytest.mark.parametrize("model_type", ["gemma2", "granite", "cohere"])
def test_backbones_outside_the_contract_are_refused_by_the_model(tmp_path, model_type):
    config = AutoConfig.for_model(
        model_type, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    with pytest.raises(UnsupportedBackboneError, match=f"'{model_type}' cannot carry depth attention"):
        convert(tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_models_that_are_no_decoders_are_refused(tmp_path, llama):
    ViTConfig().save_pretrained(llama)
    with pytest.raises((UnsupportedBackboneError, ConversionError)):
        convert(llama, tmp_path / "out")


def test_quantised_weights_are_refused(tmp_path, llama):
    edit_json(llama / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(
        ConversionError,
        match=r"quantised weights \(gptq, by `quantization_config` of its config\) cannot be converted",
    ):
        convert(llama, tmp_path / "out")


def test_missing_sources_are_named(tmp_path):
    with pytest.raises(ConversionError, match="neither an existing path nor a Hub id"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ConversionError, match=r"got the file .*notes\.txt"):
        convert(tmp_path / "notes.txt", tmp_path / "out")


def test_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConversionError, match="'user/none' is no existing path, and could not be fetched from the Hub"
    ):
        convert("user/none", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_damaged_gguf_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ConversionError, match="not a sound GGUF file"):
        convert(tmp_path / "model.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, r"unknown: model\.layers\.3\."),
        ({"num_hidden_layers": 5}, r"missing: model\.layers\.4\."),
        ({"hidden_size": 64}, r"shape of .*: \[96, 32\], the config says \[96, 64\]"),
        ({"model_type": "nonesuch"}, "model_type 'nonesuch' is unknown to the installed Transformers"),
        ({"num_hidden_layers": "many"}, "not a valid 'llama' config"),
        ({"hidden_size": 33}, "not a valid 'llama' config"),
        ({"num_key_value_heads": 0}, "not a valid 'llama' config, no model can be built from it .ZeroDivisionError"),
    ],
)
def test_config_and_weights_must_agree(tmp_path, llama, changes, message):
    edit_json(llama / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        convert(llama, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_a_model_that_cannot_run_is_not_written(tmp_path):
    source = save_backbone(tmp_path / "source", "mixtral")
    edit_json(source / "config.json", num_experts_per_tok=99)  # of 4
    with pytest.raises(ParityError, match="source: the model does not run"):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_attnres_checkpoint_without_its_depth_tensors(tmp_path, converted):
    shards = sorted(converted.glob("*.safetensors"))
    shutil.copy(shards[0], converted / "model.safetensors")
    for path in (*shards, converted / "model.safetensors.index.json"):
        path.unlink()
    with pytest.raises(CheckpointError, match=f"without {QUERY}, {KEY_NORM}"):
        convert(converted, tmp_path / "out")
