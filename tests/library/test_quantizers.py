# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Transformers' quantizers take from an AttnRes model what they take from the plain one: never queries or key norms.

Those that run on a CPU run here, if their package is installed. What all others take is judged by what they look for.
"""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from peft import get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import save_file
from test_third_parties import converted, plain_model
from tiny_backbones import tiny_backbone, tiny_config, tiny_inputs, tiny_model
from torch import nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)
from transformers import (
    AutoModelForCausalLM,
    BitNetQuantConfig,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    QuantoConfig,
    TorchAoConfig,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from modeling_attnres import AttnResForCausalLM, attnres_lora_config
from modeling_attnres.twin_attnres import TESTED_TRANSFORMERS


PAGE = Path(__file__).parents[2] / "docs" / "quantization.md"
# Groups of 32 weights and blocks of 64, as the quantizers have them, divide these.
WIDE = {"hidden_size": 64, "intermediate_size": 128}
INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
# name -> package, config
METHODS = {
    "torchao int8": ("torchao", lambda: TorchAoConfig(Int8WeightOnlyConfig())),
    "torchao int8 with activations": ("torchao", lambda: TorchAoConfig(Int8DynamicActivationInt8WeightConfig())),
    "torchao int4": ("torchao", lambda: TorchAoConfig(INT4)),
    "torchao float8": ("torchao", lambda: TorchAoConfig(Float8WeightOnlyConfig())),
    "bitsandbytes 8 bit": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "bitsandbytes 4 bit": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_4bit=True)),
    "quanto int8": ("optimum.quanto", lambda: QuantoConfig(weights="int8")),
    "quanto int4": ("optimum.quanto", lambda: QuantoConfig(weights="int4")),
}
NOT_SAVED = ("quanto int8", "quanto int4")  # by the library's own word


def quantization(name: str):
    package, config = METHODS[name]
    if find_spec(package.partition(".")[0]) is None:
        pytest.skip(f"{package} is not installed")
    return config()


def load(folder, name: str, dtype: torch.dtype = torch.float32):
    config = quantization(name)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype).eval()


def assert_depth_attention_kept(model, source):
    """Queries and key norms are the source's numbers, as plain tensors; other weights are not."""
    for name, parameter in source.model.depth_attention.named_parameters():
        kept = getattr(model.model.depth_attention, name)
        assert (type(kept), type(kept.data), kept.dtype) == (nn.Parameter, torch.Tensor, parameter.dtype)
        assert torch.equal(kept, parameter)
    projection, plain = (one.model.layers[1].self_attn.q_proj for one in (model, source))
    weight = getattr(projection, "weight", None)
    assert weight is None or (type(weight.data), weight.dtype) != (torch.Tensor, plain.weight.dtype)


# --- Quantizers that run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_a_converted_model_is_quantised_as_the_plain_one(name, dtype, tmp_path):
    plain = plain_model(**WIDE).to(dtype)
    model = converted(plain).to(dtype)
    outputs = []
    for folder, source in (("plain", plain), ("attnres", model)):
        source.save_pretrained(tmp_path / folder)
        outputs.append(load(tmp_path / folder, name, dtype)(tiny_inputs()).logits)
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], plain(tiny_inputs()).logits)


@pytest.mark.parametrize("sublayers_per_block", [1, 3, 8])
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_queries_are_kept_quantised_saved_and_loaded(name, sublayers_per_block, tmp_path):
    source = tiny_model("llama", sublayers_per_block, **WIDE)
    source.save_pretrained(tmp_path / "source")
    model = load(tmp_path / "source", name)
    assert_depth_attention_kept(model, source)
    if name not in NOT_SAVED:  # before a forward, in which bitsandbytes packs its weights anew for a CPU
        model.save_pretrained(tmp_path / "quantised")
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    generated = model.generate(tiny_inputs(), **settings)
    if "activations" not in name and "8 bit" not in name:  # what is rounded by token moves with its input's last bits
        assert torch.equal(model.generate(tiny_inputs(), use_cache=False, **settings), generated)
    if name in NOT_SAVED:
        with pytest.raises(ValueError, match="not serializable"):
            model.save_pretrained(tmp_path / "quantised")
        return
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised").eval()
    assert_depth_attention_kept(loaded, source)
    assert torch.equal(loaded(tiny_inputs()).logits, model(tiny_inputs()).logits)
    assert torch.equal(loaded.generate(tiny_inputs(), **settings), generated)


@pytest.mark.parametrize("depth_weights", ["mean", "sum"])
@pytest.mark.parametrize("config", [Int8WeightOnlyConfig(), INT4], ids=["int8", "int4"])
def test_nothing_but_weights_is_rounded(config, depth_weights, tmp_path):
    """The quantised model is the unquantised one with the weights rounded: by `quantize_`, and where it is loaded."""
    model = tiny_model("llama", 3, depth_weights, **WIDE)
    model.save_pretrained(tmp_path)
    rounded = tiny_model("llama", 3, depth_weights, **WIDE)
    quantize_(rounded.model, config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=TorchAoConfig(config))
    logits = rounded(tiny_inputs()).logits
    assert torch.equal(loaded(tiny_inputs()).logits, logits)
    with torch.no_grad():
        for (name, linear), quantised in zip(model.model.named_modules(), rounded.model.modules()):
            if isinstance(linear, nn.Linear):
                assert not torch.equal(linear.weight, quantised.weight.dequantize()), name
                linear.weight.copy_(quantised.weight.dequantize())
    torch.testing.assert_close(model(tiny_inputs()).logits, logits, rtol=1e-4, atol=1e-5)  # fp32: order of sums


@pytest.mark.parametrize("name", ["torchao int8", "bitsandbytes 4 bit"])
def test_queries_learn_beside_adapters_of_a_quantised_model(name, tmp_path):
    tiny_model("llama", 3, **WIDE).save_pretrained(tmp_path)
    model = get_peft_model(prepare_model_for_kbit_training(load(tmp_path, name)), attnres_lora_config(r=4)).train()
    model(input_ids=tiny_inputs(), labels=tiny_inputs()).loss.backward()
    learned = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    queries = [gradient for name, gradient in learned.items() if "depth_attention" in name]
    assert len(queries) == 2
    assert all(gradient.abs().sum() > 0 for gradient in queries)
    assert {name.rpartition(".lora_")[1] for name in learned if "depth_attention" not in name} == {".lora_"}


def test_compressed_tensors_are_read(tmp_path):
    """A checkpoint as llm-compressor writes it: weights in 8 bits by output channel."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import ModelCompressor

    source, rounded = (tiny_model("llama", 3, **WIDE) for _ in range(2))
    weights = quantization.QuantizationArgs(num_bits=8, strategy="channel")
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    frozen = quantization.QuantizationStatus.FROZEN
    config = quantization.QuantizationConfig(
        config_groups={"all": scheme}, ignore=["lm_head"], quantization_status=frozen
    )
    quantization.apply_quantization_config(rounded, config)
    for module in rounded.modules():
        if isinstance(module, nn.Linear) and hasattr(module, "weight_scale"):
            module.weight_scale.data.copy_(module.weight.abs().amax(1, keepdim=True) / 127.5)
            module.quantization_status = frozen
    expected = rounded(tiny_inputs()).logits
    compressor = ModelCompressor.from_pretrained_model(rounded)
    compressor.compress_model(rounded)
    rounded.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_depth_attention_kept(model, source)
    assert torch.equal(model(tiny_inputs()).logits, expected)


@pytest.mark.parametrize("depth_weights", ["mean", "sum"])
def test_calibration_layer_by_layer_is_refused(depth_weights):
    """As GPTQ by Optimum goes: it catches the first layer's input, and runs one layer after the other from there."""
    layers, kwargs, state = *catch_call(tiny_model("llama", 4, depth_weights), 0), ()
    if depth_weights == "sum":
        state = (torch.randn(2, 12, 32),)
    output = layers[0](*state, **kwargs)
    with pytest.raises(
        ValueError, match=r"layer 1 must be called by its model, .* those of layer 0 found\. .* one by one"
    ):
        layers[1](output[0], **kwargs)


def test_a_layer_with_a_part_of_its_state_is_refused():
    """As GPTQ by Optimum goes without `cache_block_outputs`: it catches the first tensor of every layer's call."""
    layers, kwargs = catch_call(tiny_model("llama", 4, "sum"), 1)
    with pytest.raises(
        ValueError, match=r"layer 1 must .* the 2 tensors of the depth state .*; got 1, .* layer 1 found"
    ):
        layers[1](torch.randn(2, 12, 32), **kwargs)


def catch_call(model, index: int):
    """The decoder layers, and the keyword arguments that the model calls layer `index` with."""
    caught = []

    def catch(module, args, kwargs):
        caught.append(kwargs)
        raise ValueError("caught")

    handle = model.model.layers[index].register_forward_pre_hook(catch, with_kwargs=True)
    with pytest.raises(ValueError, match="caught"):
        model(tiny_inputs())
    handle.remove()
    return model.model.layers, *caught


def test_a_checkpoint_in_fp8_is_read(tmp_path):
    """Without a GPU the library decodes the weights of such a file. Its other tensors are the model's own."""
    source = tiny_model("llama", 3, **WIDE).to(torch.bfloat16)
    source.config.quantization_config = FineGrainedFP8Config(weight_block_size=(32, 32)).to_dict()
    source.config.save_pretrained(tmp_path)
    tensors = {}
    for name, tensor in source.state_dict().items():
        if name.endswith("_proj.weight"):
            rows, columns = tensor.shape
            scale = torch.full((rows // 32, columns // 32), 2.0**-8)  # a power of two: bf16 loses nothing by it
            encoded = (tensor.float() * 2.0**8).clamp(-448, 448).to(torch.float8_e4m3fn)
            tensors |= {name: encoded, f"{name}_scale_inv": scale}
        else:
            tensors[name] = tensor.contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(model.get_parameter(name).float(), tensors[name].float() * 2.0**-8)
    for name in ("query", "key_norm"):
        expected = getattr(source.model.depth_attention, name)
        assert torch.equal(getattr(model.model.depth_attention, name), expected)


# --- All quantizers --------------------------------------------------------------------------------------------------

VARIANTS = ("softmax", "sigmoid", "static", "no_key_norm", "input_dependent", "multi_head", "sliding_window")


@pytest.mark.parametrize("depth_attention_type", VARIANTS)
def test_depth_attention_is_nothing_that_quantizers_look_for(depth_attention_type):
    """They go by the class of a module (linear maps, embeddings, norms, experts), and then by a tensor called weight."""
    with torch.device("meta"):
        model = AttnResForCausalLM(tiny_config("llama", 1, depth_attention_type=depth_attention_type))
    names = [name for name, module in model.named_modules() if "depth" in name]
    assert names == ["model.depth_input", "model.depth_attention"]
    module = model.model.depth_attention
    assert not isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm, nn.Conv1d, nn.Conv2d, Conv1D))
    assert not list(module.buffers())
    assert not any("weight" in name.split("_") or "bias" in name for name, _ in module.named_parameters())


# What replaces modules before weights are loaded and needs neither a package nor, until then, a GPU.
REPLACED = {
    "fp8": lambda: FineGrainedFP8Config(),
    "metal": lambda: transformers.MetalConfig(),
    "bitnet": lambda: BitNetQuantConfig(),
    "gemma": lambda: transformers.GemmaQuantizationConfig(),
}


@pytest.mark.parametrize("name", REPLACED)
def test_the_same_modules_are_replaced_as_in_the_plain_model(name):
    quantizer_class = AUTO_QUANTIZER_MAPPING.get(name)
    if quantizer_class is None:
        pytest.skip(f"Transformers {transformers.__version__} has no '{name}'")
    replaced = []
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(tiny_backbone("llama", **WIDE))
        model = AttnResForCausalLM(tiny_config("llama", 3, **WIDE))
    for one in (plain, model):
        before = {module: type(module) for module in one.modules()}
        quantizer = quantizer_class(REPLACED[name](), pre_quantized=True)
        quantizer.preprocess_model(one, device_map={"": "cpu"}, dtype=torch.bfloat16)
        replaced.append([(name, type(module)) for name, module in one.named_modules() if module not in before])
        quantizer.pre_quantized = False
        taken = [name for name, _ in one.named_parameters() if quantizer.param_needs_quantization(one, name)]
        assert not any("depth_attention" in name for name in taken)
    assert replaced[0] == replaced[1] != []


def test_the_page_lists_all_quantizers():
    """A new version of Transformers has a quantizer that nobody has judged: enter it in the page's table."""
    if transformers.__version__ != TESTED_TRANSFORMERS[-1]:
        pytest.skip(f"The table is that of Transformers {TESTED_TRANSFORMERS[-1]}.")
    cells = re.findall(r"^\| (`.+?`) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(name for cell in cells for name in re.findall(r"`(.+?)`", cell)) == sorted(AUTO_QUANTIZER_MAPPING)
