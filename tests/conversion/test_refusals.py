# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_backbones import tiny_backbone
from tiny_checkpoints import edit_json, weights
from transformers import AutoModelForCausalLM

from modeling_attnres import AttnResConfig, AttnResForCausalLM
from modeling_attnres.conversion import CheckpointError, ConversionError, convert


DEQUANTISE = "cannot be converted; save the model dequantised first."
WEIGHT = "model.layers.1.self_attn.q_proj.weight"


def add(folder, tensors):
    """Sets tensors of a one-file checkpoint by name; `None` removes one."""
    stored = {**weights(folder), **tensors}
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, folder / "model.safetensors")


def fp8(name_of_scale):
    def quantise(folder):
        tensors = {}
        for name, tensor in weights(folder).items():
            if "proj" in name:
                scale = tensor.abs().max() / 448
                tensors[name] = (tensor / scale).to(torch.float8_e4m3fn)
                tensors[name_of_scale(name)] = scale
        add(folder, tensors)

    return quantise


def rename_weight(*endings):
    """A weight under another name, in integers, as 4-bit formats store it."""
    stem = WEIGHT.removesuffix("weight")
    return lambda folder: add(folder, {WEIGHT: None} | {stem + ending: torch.ones(4, 4) for ending in endings})


def config_field(**fields):
    return lambda folder: edit_json(folder / "config.json", **fields)


def file_of(name, **fields):
    return lambda folder: (folder / name).write_text(json.dumps(fields))


def stored_as(dtype):
    """Without any scale: what it was divided by is kept elsewhere, or lost."""
    return lambda folder: add(folder, {WEIGHT: weights(folder)[WEIGHT].to(dtype)})


def four_bits_in_the_header(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"F4" ', 1))


QUANTISED = {
    "FP8 with scales": (fp8(lambda name: f"{name}_scale"), r"by its tensors .*weight_scale"),
    "FP8 with inverse scales": (fp8(lambda name: f"{name}_scale_inv"), r"by its tensors .*weight_scale_inv"),
    "FP8 with scales of another name": (
        fp8(lambda name: name.removesuffix("weight") + "scale_weight"),
        r"by its tensors .*scale_weight",
    ),
    "FP8 without scales": (stored_as(torch.float8_e5m2), rf"8-bit floats, such as {WEIGHT}"),
    "4-bit floats": (four_bits_in_the_header, "has dtype F4"),
    "GPTQ by names": (rename_weight("qweight", "qzeros", "scales", "g_idx"), r"by its tensors .*g_idx"),
    "compressed-tensors by names": (rename_weight("weight_packed", "weight_scale", "weight_shape"), "weight_packed"),
    "bitsandbytes by names": (rename_weight("weight", "weight.absmax", "weight.quant_map"), "weight.absmax"),
    "MLX by names": (rename_weight("weight", "scales", "biases"), "biases.*scales"),
    "scale beside a plain weight": (
        lambda folder: add(folder, {f"{WEIGHT}_scale": torch.ones(1)}),
        "by its tensors .*q_proj.weight_scale",
    ),
    "activation scale": (
        lambda folder: add(folder, {WEIGHT.replace("weight", "input_scale"): torch.ones(1)}),
        "by its tensors .*q_proj.input_scale",
    ),
    "config": (
        config_field(quantization_config={"quant_method": "awq"}),
        "awq, by `quantization_config` of its config",
    ),
    "compression": (config_field(compression_config={"format": "pack-quantized"}), "by `compression_config` of its"),
    "MLX config": (config_field(quantization={"bits": 4}), "by `quantization` of its config"),
    "nested config": (
        config_field(text_config={"quantization_config": {"quant_method": "fp8"}}),
        r"fp8, by `text_config\.quantization_config` of its config",
    ),
    "deeply nested config": (
        config_field(thinker={"text": {"quantization_config": {"quant_method": "fp8"}}}),
        r"fp8, by `thinker\.text\.quantization_config`",
    ),
    "ModelOpt's file": (
        file_of("hf_quant_config.json", quantization={"quant_algo": "FP8"}),
        "by its hf_quant_config.json",
    ),
    "GPTQ's file": (file_of("quantize_config.json", bits=4), r"by its quantize_config\.json"),
    "AWQ's file": (file_of("quant_config.json", w_bit=4), r"by its quant_config\.json"),
}


@pytest.mark.parametrize(
    "drop_keys", [(), (r"scale", r"qzeros$|g_idx$|biases$|absmax$|quant_map$|shape$")], ids=["", "drop"]
)
@pytest.mark.parametrize("case", QUANTISED)
def test_quantised_sources_are_refused_and_no_option_gets_past(tmp_path, llama, case, drop_keys):
    change, shown = QUANTISED[case]
    change(llama)
    with pytest.raises(ConversionError) as refusal:
        convert(llama, tmp_path / "out", drop_keys=drop_keys)
    if not drop_keys:
        assert DEQUANTISE in str(refusal.value)
        refusal.match(shown)
    assert "drop" not in str(refusal.value) or "only whole modules can be left out" in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested, as in earlier versions"])
def test_quantised_attnres_sources_are_refused_by_the_backbones_config(tmp_path, llama, nested):
    convert(llama, tmp_path / "attnres", check=False)
    config = json.loads((tmp_path / "attnres" / "config.json").read_text())
    if nested:
        backbone = {**config, "model_type": config.pop("backbone_type")}
        config = {"model_type": "attnres", "sublayers_per_block": 1, "depth_weights": "sum", "text_config": backbone}
    (config["text_config"] if nested else config)["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "attnres" / "config.json").write_text(json.dumps(config))
    where = r"text_config\.quantization_config" if nested else "quantization_config"
    with pytest.raises(ConversionError, match=rf"\(fp8, by `{where}` of its config\)"):
        convert(tmp_path / "attnres", tmp_path / "out")


# --- --drop-keys -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.q_proj.bias",
        "model.norm.bias",
        "model.layers.0.mlp.up_proj.lora_down.weight",
        "model.layers.0.self_attn.o_proj.input_quantizer.offset",
        "model.layers.0.mlp.act.scales",
        "model.layers.3.self_attn.k_scale",
        "model.layers.2.layer_scale",
    ],
)
def test_tensors_beside_one_that_stays_are_not_left_out(tmp_path, llama, name):
    add(llama, {name: torch.ones(4)})
    with pytest.raises(
        ConversionError, match=rf"`drop_keys` leaves out {name}, .* only whole modules can be left out"
    ):
        convert(llama, tmp_path / "out", drop_keys=(name,))


def test_whole_modules_are_left_out_quantised_or_not(tmp_path, llama):
    extra = {
        "mtp.q_proj.weight": torch.ones(4).to(torch.float8_e4m3fn),
        "mtp.q_proj.weight_scale": torch.ones(1),
        "model.layers.7.embed_tokens.weight": torch.ones(4),
        "vision.position_ids": torch.arange(4),
        "vision.logit_scale": torch.ones(()),
    }
    add(llama, extra)
    report = convert(llama, tmp_path / "out", drop_keys=("^mtp", r"layers\.7\.", "^vision"))
    assert report.dropped_keys == sorted(extra)
    assert report.max_logit_difference == 0.0


@pytest.mark.parametrize(
    "name", ["model.layers.2.layer_scale", "model.residual_scale", "model.layers.1.mlp.gate_scale"]
)
def test_an_unknown_scale_of_something_else_is_not_called_quantisation(tmp_path, llama, name):
    add(llama, {name: torch.ones(4)})
    with pytest.raises(
        CheckpointError, match=rf"weights and config disagree. unknown: {name} \(--drop-keys leaves out whole"
    ):
        convert(llama, tmp_path / "out")


# --- Adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(llama):
    model = AutoModelForCausalLM.from_pretrained(llama)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))


@pytest.mark.parametrize("place", ["folder", "subfolder"])
def test_an_adapter_is_no_model(tmp_path, llama, adapted, place):
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder if place == "folder" else folder / "default")
    with pytest.raises(ConversionError, match=r"adapter.*: a PEFT adapter of '.*llama', not a model; merge it first"):
        convert(folder, tmp_path / "out")


def test_a_model_with_an_adapter_beside_it_does_not_say_what_it_is(tmp_path, adapted):
    adapted.save_pretrained(tmp_path / "both")
    adapted.merge_and_unload().save_pretrained(tmp_path / "both")
    with pytest.raises(ConversionError, match=r"holds a model and a PEFT adapter .* to a folder of its own with"):
        convert(tmp_path / "both", tmp_path / "out")


def test_unmerged_adapters_inside_the_weights(tmp_path, llama, adapted):
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in adapted.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, llama / "model.safetensors")
    with pytest.raises(
        ConversionError, match=r"weights of a PEFT model that are not merged .*base_layer.*; merge and"
    ):
        convert(llama, tmp_path / "out")


def test_the_merged_model_of_the_error_converts(tmp_path, adapted):
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert convert(tmp_path / "merged", tmp_path / "out").max_logit_difference == 0.0


# --- Ablation forms --------------------------------------------------------------------------------------------------

VARIANTS = ["static", "sigmoid", "no_key_norm", "sliding_window", "multi_head", "input_dependent"]


@pytest.fixture(params=VARIANTS)
def variant(request, tmp_path):
    """A trained checkpoint of an ablation form, and the form's name."""
    heads = {"depth_heads": 4} if request.param == "multi_head" else {}
    config = AttnResConfig(
        text_config=tiny_backbone("llama"), sublayers_per_block=2, depth_attention_type=request.param, **heads
    )
    model = AttnResForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "depth_attention" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path / "variant")
    return tmp_path / "variant", request.param


def test_ablation_forms_keep_their_form(tmp_path, variant):
    folder, form = variant
    before = json.loads((folder / "config.json").read_text())
    for out, options in (("same", {}), ("cast", {"dtype": "bfloat16"}), ("unchecked", {"check": False})):
        report = convert(folder, tmp_path / out, **options)
        assert report.max_logit_difference in ((0.0,) if out != "unchecked" else (None,))
        after = json.loads((tmp_path / out / "config.json").read_text())
        for name in ("depth_attention_type", "depth_window", "depth_heads", "depth_norm_eps", "sublayers_per_block"):
            assert after.get(name) == before.get(name)
        assert after["depth_attention_type"] == form
    stored = weights(tmp_path / "same")
    assert all(torch.equal(stored[name], tensor) for name, tensor in weights(folder).items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "fla"}, "'fla' has softmax mixes; this model's `depth_attention_type` is '{form}', which it cannot"),
        ({"to": "prenorm"}, "Only a model with softmax mixes has a PreNorm model .* is '{form}'"),
        ({"num_blocks": 2}, "`sublayers_per_block` cannot change from 2 to 4 in a model whose .* is '{form}'"),
    ],
    ids=str,
)
def test_what_cannot_express_an_ablation_form_is_refused(tmp_path, variant, options, message):
    folder, form = variant
    with pytest.raises(ConversionError, match=message.format(form=form)):
        convert(folder, tmp_path / "out", check=False, **options)


# --- Older files -----------------------------------------------------------------------------------------------------


def test_pickled_weights_of_the_format_before_zip_archives_convert(tmp_path, llama):
    tensors = weights(llama)
    torch.save(tensors, llama / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (llama / "model.safetensors").unlink()
    assert convert(llama, tmp_path / "out").max_logit_difference == 0.0
    found = weights(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_integers_are_still_no_weights(tmp_path, llama):
    add(llama, {WEIGHT: torch.ones(32, 32, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=f"1 tensors are not floating point: {WEIGHT}"):
        convert(llama, tmp_path / "out")


def test_scales_in_any_shard_are_seen(tmp_path, sharded_llama):
    last = sorted(sharded_llama.glob("*.safetensors"))[-1]
    save_file({**load_file(last), f"{WEIGHT}_scale": torch.ones(1)}, last)
    index = sharded_llama / "model.safetensors.index.json"
    edit_json(index, weight_map=json.loads(index.read_text())["weight_map"] | {f"{WEIGHT}_scale": last.name})
    with pytest.raises(ConversionError, match="quantised weights"):
        convert(sharded_llama, tmp_path / "out", drop_keys=("_scale$",))
