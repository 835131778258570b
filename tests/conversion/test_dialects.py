# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import json
import shutil
from pathlib import Path

import pytest
import torch
from published_rule import EPS, published_model
from safetensors.torch import save_file
from tiny_backbones import NUM_LAYERS, tiny_backbone, tiny_inputs, tiny_model
from tiny_checkpoints import edit_json, same_files, weights
from transformers import AutoModelForCausalLM

from modeling_attnres import AttnResForCausalLM
from modeling_attnres.conversion import CheckpointError, ConversionError, DialectError, convert


D = 32
# fla's names of what has another name in the library.
FLA_NAMES = (
    ("model.embed_tokens.", "model.embeddings."),
    (".input_layernorm.", ".attn_norm."),
    (".post_attention_layernorm.", ".mlp_norm."),
    (".self_attn.", ".attn."),
)


def depth_tensors(names: tuple[str, str], output: str) -> dict[str, torch.Tensor]:
    """Random queries and key norms under a dialect's names."""
    generator = torch.Generator().manual_seed(3)
    stems = [f"layers.{layer}.{name}" for layer in range(NUM_LAYERS) for name in names] + [output]
    tensors = {f"model.{stem}_proj.weight": torch.randn(1, D, generator=generator) for stem in stems}
    norms = {f"model.{stem}_norm.weight": 1 + 0.2 * torch.randn(D, generator=generator) for stem in stems}
    return {**tensors, **norms}


K3_NAMES, K3_OUTPUT = ("self_attention_res", "mlp_res"), "output_attn_res"
FLA_DEPTH_NAMES, FLA_OUTPUT = ("attn_res", "mlp_res"), "res"


def save_k3(folder: Path, layers_per_block: int = 2, nested: bool = False):
    """A K3-style checkpoint, as Kimi publishes them; returns the backbone model and the depth tensors."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_backbone("kimi_linear", rms_norm_eps=EPS)).eval()
    model.save_pretrained(folder)
    tensors = depth_tensors(K3_NAMES, K3_OUTPUT)
    stored = {**weights(folder), **tensors}
    config = json.loads((folder / "config.json").read_text()) | {"attn_res_block_size": layers_per_block}
    if nested:
        stored = {f"language_model.{name}": tensor for name, tensor in stored.items()}
        config = {"model_type": "kimi_k3", "text_config": config}
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return model, tensors


def save_fla(folder: Path, block_size: int, model_type: str = "llama", **options):
    """A checkpoint of flash-linear-attention's transformer; returns the library's equal model and depth tensors."""
    torch.manual_seed(0)
    overrides = {"sliding_window": options["window_size"]} if "window_size" in options else {}
    backbone = tiny_backbone(
        model_type, rms_norm_eps=EPS, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    )
    backbone.update({"intermediate_size": 256, **overrides})  # 8/3 of 32, up to a multiple of 256
    model = AutoModelForCausalLM.from_config(backbone).eval()
    model.save_pretrained(folder)
    stored = {}
    for name, tensor in weights(folder).items():
        for ours, theirs in FLA_NAMES:
            name = name.replace(ours, theirs)
        stored[name] = tensor
    tensors = depth_tensors(FLA_DEPTH_NAMES, FLA_OUTPUT)
    save_file({**stored, **tensors}, folder / "model.safetensors")
    config = {
        "model_type": "transformer",
        "attnres_block_size": block_size,
        "hidden_size": D,
        "num_hidden_layers": NUM_LAYERS,
        "num_heads": 4,
        "num_kv_heads": 2,
        "hidden_ratio": 4,
        "norm_eps": EPS,
        "rope_theta": 500.0,
        "vocab_size": backbone.vocab_size,
        "max_position_embeddings": 128,
        "fuse_norm": True,
        **options,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return model, tensors


# --- Reading ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def assert_equal_logits(folder: Path, reference):
    tokens = tiny_inputs()
    expected = reference(tokens, use_cache=False).logits
    result = AttnResForCausalLM.from_pretrained(folder).eval()(tokens, use_cache=False).logits
    assert expected.abs().max() > 0.3
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layers_per_block", [1, 2, 3, 12])
def test_kimi_k3_computes_the_published_rule(tmp_path, layers_per_block):
    model, tensors = save_k3(tmp_path / "k3", layers_per_block)
    report = convert(tmp_path / "k3", tmp_path / "out")
    assert (report.source_kind, report.depth_weights) == ("kimi_k3", "mean")
    assert report.sublayers_per_block == min(2 * layers_per_block, 2 * NUM_LAYERS)
    assert report.unread_keys == [f"model.layers.0.self_attention_res_{part}.weight" for part in ("norm", "proj")]
    assert report.dropped_keys == []
    assert_equal_logits(tmp_path / "out", published_model(model, tensors, K3_NAMES, K3_OUTPUT, 2 * layers_per_block))


def test_kimi_k3_inside_a_multimodal_file(tmp_path):
    model, tensors = save_k3(tmp_path / "k3", nested=True)
    convert(tmp_path / "k3", tmp_path / "out")
    assert_equal_logits(tmp_path / "out", published_model(model, tensors, K3_NAMES, K3_OUTPUT, 4))


@pytest.mark.parametrize(
    ("block_size", "model_type", "options"),
    [
        (1, "llama", {}),
        (2, "llama", {"hidden_act": "silu", "tie_word_embeddings": False}),
        (4, "qwen2", {"qkv_bias": True}),
        (6, "qwen3", {"qk_norm": True}),
        (2, "mistral", {"window_size": 4}),
    ],
)
def test_fla_computes_the_published_rule(tmp_path, block_size, model_type, options):
    model, tensors = save_fla(tmp_path / "fla", block_size, model_type, **options)
    report = convert(tmp_path / "fla", tmp_path / "out")
    assert (report.source_kind, report.model_type, report.sublayers_per_block) == ("fla", model_type, block_size)
    assert_equal_logits(tmp_path / "out", published_model(model, tensors, FLA_DEPTH_NAMES, FLA_OUTPUT, block_size))


def test_dialect_can_be_named(tmp_path):
    save_k3(tmp_path / "k3")
    assert convert(tmp_path / "k3", tmp_path / "out", dialect="kimi_k3", dry_run=True).source_kind == "kimi_k3"
    with pytest.raises(DialectError, match="'fla' needs `attnres_block_size` >= 1, got None"):
        convert(tmp_path / "k3", tmp_path / "out", dialect="fla")


# --- Both ways -------------------------------------------------------------------------------------------------------

FILES = ("*.safetensors", "*.json")
WRITABLE = [
    ("kimi_k3", "kimi_linear", 4, {}),
    ("fla", "llama", 1, {}),
    ("fla", "qwen2", 2, {}),
    ("fla", "qwen3", 4, {"rms_norm_eps": 1e-5}),
    ("fla", "mistral", 2, {}),
]


@pytest.mark.parametrize(("dialect", "model_type", "sublayers", "overrides"), WRITABLE)
def test_writing_reading_and_writing_gives_the_same_files(tmp_path, dialect, model_type, sublayers, overrides):
    model = tiny_model(model_type, sublayers, "mean", **overrides)
    model.save_pretrained(tmp_path / "ours")
    report = convert(tmp_path / "ours", tmp_path / "theirs", to=dialect)
    assert "compared bit for bit" in report.check
    convert(tmp_path / "theirs", tmp_path / "back")
    convert(tmp_path / "back", tmp_path / "again", to=dialect)
    for folder in ("theirs", "again"):
        (tmp_path / folder / "conversion_report.json").unlink()  # says how long it took
    assert same_files(tmp_path / "theirs", tmp_path / "again", FILES)
    back = AttnResForCausalLM.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        assert torch.equal(back(tiny_inputs()).logits, model(tiny_inputs()).logits)


def test_what_no_model_reads_is_kept_and_written_back(tmp_path):
    save_fla(tmp_path / "fla", 2)
    for source, out, to in (("fla", "ours", "attnres"), ("ours", "cast", "attnres"), ("cast", "back", "fla")):
        convert(tmp_path / source, tmp_path / out, to=to)
    before, after = weights(tmp_path / "fla"), weights(tmp_path / "back")
    for part in ("proj", "norm"):
        name = f"model.layers.0.attn_res_{part}.weight"
        assert before[name].unique().numel() > 1
        assert torch.equal(after[name], before[name])


def test_what_is_written_is_what_the_dialect_says(tmp_path):
    tiny_model("kimi_linear", 4, "mean").save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "k3", to="kimi_k3")
    config = json.loads((tmp_path / "k3" / "config.json").read_text())
    assert (config["model_type"], config["attn_res_block_size"]) == ("kimi_linear", 2)
    ours, k3 = weights(tmp_path / "ours"), weights(tmp_path / "k3")
    query, key_norm = ours["model.depth_attention.query"], ours["model.depth_attention.key_norm"]
    assert torch.equal(k3["model.layers.2.mlp_res_proj.weight"], query[4].unsqueeze(0))
    assert torch.equal(k3["model.layers.2.self_attention_res_norm.weight"], key_norm[3])
    assert torch.equal(k3["model.output_attn_res_proj.weight"], query[-1].unsqueeze(0))
    assert not k3["model.layers.0.self_attention_res_proj.weight"].any()
    assert torch.equal(k3["model.layers.0.self_attention_res_norm.weight"], torch.ones(D))


@pytest.mark.parametrize(
    ("dialect", "model_type", "sublayers", "depth_weights", "overrides", "message"),
    [
        ("kimi_k3", "kimi_linear", 4, "sum", {}, r"weights that sum to 1 .* is 'sum', which it cannot express"),
        ("kimi_k3", "kimi_linear", 3, "mean", {}, "counts blocks in 2 sublayers .* sublayers_per_block=3"),
        ("kimi_k3", "llama", 4, "mean", {}, "written for kimi_k3_text and kimi_linear backbones, got 'llama'"),
        ("fla", "llama", 3, "mean", {}, "blocks of 1 or an even number, got 3"),
        ("fla", "mixtral", 2, "mean", {}, "written for llama, qwen2, qwen3, mistral backbones, got 'mixtral'"),
        ("fla", "llama", 2, "mean", {"attention_bias": True}, "no biases of attention or MLP"),
        ("fla", "qwen3", 2, "mean", {"head_dim": 16}, "no head_dim other than hidden_size / heads; no q/k norm"),
        ("fla", "llama", 2, "mean", {"hidden_act": "gelu"}, "has no activation 'gelu'"),
        ("fla", "llama", 2, "mean", {"attention_dropout": 0.1}, "no attention dropout"),
    ],
)
def test_what_a_dialect_cannot_express_is_not_written(
    tmp_path, dialect, model_type, sublayers, depth_weights, overrides, message
):
    tiny_model(model_type, sublayers, depth_weights, **overrides).save_pretrained(tmp_path / "ours")
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / "ours", tmp_path / "theirs", to=dialect)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_router_activation_func": "softmax"}, "`moe_router_activation_func`='softmax'"),
        ({"attn_res_block_size": 0}, "needs `attn_res_block_size` >= 1, got 0"),
        ({"model_type": "llama"}, "model_type 'kimi_linear', got 'llama'"),
    ],
)
def test_kimi_k3_fields_with_another_meaning_are_refused(tmp_path, changes, message):
    save_k3(tmp_path / "k3")
    edit_json(tmp_path / "k3" / "config.json", **changes)
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / "k3", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qkv_bias": True, "qk_norm": True}, "No backbone in Transformers combines"),
        ({"hidden_act": "gelu"}, "`hidden_act` 'gelu' has no equal"),
        ({"qk_norm": True, "norm_eps": 1e-6}, "`qk_norm` has an epsilon of 1e-05 whatever"),
        ({"model_type": "gated_deltanet"}, "the 'transformer' family is understood, got model_type 'gated_deltanet'"),
        ({"logit_cap": 30}, "unknown here: {'logit_cap': 30}"),
    ],
)
def test_fla_options_without_an_equal_are_refused(tmp_path, options, message):
    save_fla(tmp_path / "fla", 2)
    edit_json(tmp_path / "fla" / "config.json", **options)
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / "fla", tmp_path / "out")


@pytest.mark.parametrize("save", [save_k3, save_fla])
def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path, save):
    save(tmp_path / "source", 2)
    sound = weights(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    name = "model.layers.2.mlp_res_proj.weight"
    for changes, message in (
        ({name: None}, f"1 depth tensors are missing: {name}"),
        ({name: torch.ones(D)}, rf"must be \[1, {D}\] and \[{D}\], got \[{D}\]"),
        ({"model.layers.2.mlp_res_gate.weight": torch.ones(D)}, "unknown.*mlp_res_gate"),
    ):
        stored = {key: tensor for key, tensor in {**sound, **changes}.items() if tensor is not None}
        save_file(stored, file)
        with pytest.raises((CheckpointError, DialectError), match=message):
            convert(tmp_path / "source", tmp_path / "out")


def test_same_tensor_with_and_without_the_prefix(tmp_path):
    save_k3(tmp_path / "k3", nested=True)
    stored = weights(tmp_path / "k3")
    save_file({**stored, "model.norm.weight": torch.ones(D)}, tmp_path / "k3" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"stored twice, with and without 'language_model\.'"):
        convert(tmp_path / "k3", tmp_path / "out")


def test_depth_tensors_without_a_block_size_are_not_lost(tmp_path):
    save_k3(tmp_path / "k3")
    edit_json(tmp_path / "k3" / "config.json", attn_res_block_size=None)
    with pytest.raises(CheckpointError, match=r"unknown: .*self_attention_res"):
        convert(tmp_path / "k3", tmp_path / "out")


FOREIGN = {
    "inkling2": ("inkling2", "model.layers.0.attention_input.query", "mixes normalised values"),
    "inkling2 files": ("other", "model.llm.attn_res.attn_queries.3", "mixes normalised values"),
    "open-attention-residuals": ("qwen3_attnres", "model.layers.0.attn_res_proj.weight", "cumulative snapshots"),
    "attnres-phase1": ("attnres", "layers.0.attn_res.proj.weight", "embedding is inside block 1"),
    "tokenbender": ("gpt2", "attnres_mixer.mixer.queries", "un-weighted with an epsilon of 1e-8"),
    "nanoattnres": ("other", "attn_res_proj", "one query for both sublayers"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_conventions_are_refused_by_what_differs(tmp_path, name):
    model_type, key, difference = FOREIGN[name]
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": model_type}))
    save_file({key: torch.ones(4)}, source / "model.safetensors")
    with pytest.raises(DialectError, match=difference):
        convert(source, tmp_path / "out")
    forced = name.split(" ", maxsplit=1)[0]
    shutil.rmtree(source)
    source.mkdir()
    with pytest.raises(DialectError, match=difference):
        convert(source, tmp_path / "out", dialect=forced)
