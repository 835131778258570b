# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Adapters: where they go, the recipe that trains the queries too, and every way to save and load them."""

import importlib.util
import json
import sys

import peft
import pytest
import torch
from fresh_process import LOADER, run_python
from hub_server import TOKEN, HubServer
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.utils import constants
from safetensors.torch import load_file, save_file
from tiny_backbones import BACKBONES, NUM_LAYERS, tiny_backbone, tiny_config, tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM

import modeling_attnres.peft_attnres
from modeling_attnres import AttnResForCausalLM, attnres_lora_config


QUERY_AND_VALUE = {
    **{model_type: {"self_attn.q_proj", "self_attn.v_proj"} for model_type in BACKBONES},
    "deepseek_v3": {"self_attn.q_b_proj", "self_attn.kv_b_proj"},
    "qwen3_next": {"linear_attn.in_proj_qkvz", "self_attn.q_proj", "self_attn.v_proj"},
    "kimi_linear": {"self_attn.q_proj", "self_attn.v_proj", "self_attn.kv_b_proj"},
    "kimi_k3_text": {"self_attn.q_proj", "self_attn.v_proj", "self_attn.q_b_proj", "self_attn.kv_b_proj"},
}
DEPTH = "base_model.model.model.depth_attention"
REPO = "user/adapter"
# In a process without the package: an adapter on a base with its own code, pushed by itself, pulled again.
WITHOUT_PACKAGE = f"""
import sys
sys.path.insert(0, "{LOADER.parent}")
import load_without_package as loader
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

loader.require(loader.package_is_blocked(), "modeling_attnres can be imported here")
inputs = torch.tensor(INPUTS)
base = AutoModelForCausalLM.from_pretrained("base", trust_remote_code=True)
model = PeftModel.from_pretrained(base, "adapter").eval()
results = {{"folder": model(inputs).logits}}
print(model.push_to_hub("{REPO}").oid)
pulled = AutoPeftModelForCausalLM.from_pretrained("{REPO}", trust_remote_code=True).eval()
results["hub"] = pulled(inputs).logits
results["merged"] = pulled.merge_and_unload()(inputs).logits
save_file(results, "results.safetensors")
fresh = AutoModelForCausalLM.from_pretrained("base", trust_remote_code=True)
loader.require("transformers_modules" in type(fresh).__module__, "not the checkpoint's code")
print(len(get_peft_model(fresh, LoraConfig(task_type="CAUSAL_LM")).targeted_module_names))
"""


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tiny_inputs()).logits


@torch.no_grad()
def shake_trainable(model, seed: int = 3):
    """Stands in for training: what is trainable gets other values, so that nothing is zero any more."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, a trained adapter of the recipe for it, and in `logits` what both together give."""
    folder = tmp_path_factory.mktemp("peft")
    tiny_model("llama", depth_weights="sum").save_pretrained(folder / "base")
    model = get_peft_model(AttnResForCausalLM.from_pretrained(folder / "base"), attnres_lora_config())
    shake_trainable(model)
    model.save_pretrained(folder / "adapter")
    torch.save(logits(model), folder / "logits")
    return folder


@pytest.fixture
def base(folder):
    return AttnResForCausalLM.from_pretrained(folder / "base").eval()


@pytest.mark.parametrize("model_type", BACKBONES)
def test_no_target_list_is_needed(model_type):
    model = get_peft_model(tiny_model(model_type), LoraConfig(task_type="CAUSAL_LM"))
    layers = [name.removeprefix("model.layers.").split(".", 1) for name in model.targeted_module_names]
    assert {name for _, name in layers} == QUERY_AND_VALUE[model_type]
    assert {int(index) for index, _ in layers} == set(range(NUM_LAYERS))


METHODS = {
    "IA3Config": {},
    "AdaLoraConfig": {"total_step": 10},
    "LoHaConfig": {},
    "BOFTConfig": {"boft_block_size": 4},
    "VeraConfig": {},
    "LNTuningConfig": {},
    "PromptTuningConfig": {"num_virtual_tokens": 3},
    "PrefixTuningConfig": {"num_virtual_tokens": 3},
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_train(method):
    config = getattr(peft, method)(task_type="CAUSAL_LM", **METHODS[method])
    model = get_peft_model(tiny_model("llama"), config).train()
    inputs = tiny_inputs()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), labels=inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_every_table_that_knows_llama_knows_attnres():
    tables = {name: table for name, table in vars(constants).items() if name.endswith("_MODULES_MAPPING")}
    known = {name for name, table in tables.items() if "llama" in table}
    assert known == {name for name, table in tables.items() if "attnres" in table}
    assert "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING" in known
    ia3 = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING["attnres"]
    # PEFT asks that feed-forward modules are among the targets.
    assert set(constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING["attnres"]) <= set(ia3)


def test_recipe_trains_the_adapter_and_depth_attention_alone(base):
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    model = get_peft_model(base, attnres_lora_config(r=4, modules_to_save=["lm_head", "depth_attention"])).train()
    assert model.peft_config["default"].r == 4
    assert model.peft_config["default"].modules_to_save == ["depth_attention", "lm_head"]
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    others = {name for name in trainable if ".lora_" not in name}
    copies = [f"{DEPTH}.modules_to_save.default.{name}" for name in ("query", "key_norm")]
    assert others == {*copies, "base_model.model.lm_head.modules_to_save.default.weight"}

    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(tiny_inputs(), labels=tiny_inputs()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    depth = model.get_submodule(DEPTH)
    for name in ("query", "key_norm"):
        assert not torch.equal(getattr(depth.modules_to_save["default"], name), getattr(depth.original_module, name))
    model.unload()  # gives the base its own names back
    for name, parameter in base.named_parameters():
        if "depth_attention" not in name and "lm_head" not in name:
            assert torch.equal(parameter, before[name]), name


def test_adapter_file_holds_the_adapter_and_the_queries(folder):
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    depth = {name for name in saved if "lora_" not in name}
    assert depth == {f"{DEPTH}.query", f"{DEPTH}.key_norm"}
    assert len(saved) - len(depth) == NUM_LAYERS * 2 * 2  # query and value, A and B
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["depth_attention"]
    assert config["base_model_name_or_path"] == str(folder / "base")
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def load_by_peft(folder):
    return PeftModel.from_pretrained(AttnResForCausalLM.from_pretrained(folder / "base"), folder / "adapter")


def load_by_peft_alone(folder):
    return AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")


def load_by_transformers(folder):
    model = AttnResForCausalLM.from_pretrained(folder / "base")
    model.load_adapter(folder / "adapter")
    return model


def load_by_transformers_alone(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "adapter")


@pytest.mark.parametrize("load", [load_by_peft, load_by_peft_alone, load_by_transformers, load_by_transformers_alone])
def test_a_loaded_adapter_is_the_saved_one_bit_for_bit(load, folder):
    assert torch.equal(logits(load(folder)), torch.load(folder / "logits"))


@pytest.mark.parametrize("model_type", ["deepseek_v3", "kimi_linear", "kimi_k3_text", "mixtral", "gpt_oss"])
def test_round_trip_on_backbones_with_mapped_names(model_type, tmp_path):
    """Backbones whose checkpoints are renamed on loading: an adapter's names go through the same mappings."""
    tiny_model(model_type, depth_weights="sum").save_pretrained(tmp_path / "base")
    model = get_peft_model(AttnResForCausalLM.from_pretrained(tmp_path / "base"), attnres_lora_config())
    shake_trainable(model)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    assert torch.equal(logits(load_by_peft(tmp_path)), expected)
    assert torch.equal(logits(load_by_transformers(tmp_path)), expected)


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "kimi_linear", "kimi_k3_text"])
def test_an_adapter_of_the_prenorm_model_fits_the_converted_one(model_type, tmp_path):
    plain = AutoModelForCausalLM.from_config(tiny_backbone(model_type))
    plain.save_pretrained(tmp_path / "plain")
    adapted = get_peft_model(plain, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    shake_trainable(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    config = tiny_config(model_type, depth_weights="sum")
    converted = AttnResForCausalLM.from_pretrained(tmp_path / "plain", config=config).eval()
    before = logits(converted)
    found = logits(PeftModel.from_pretrained(converted, tmp_path / "adapter"))
    # fp32; equal weights in memory that is aligned differently, so matrix products may round differently.
    torch.testing.assert_close(found, logits(adapted), rtol=0, atol=1e-6)
    assert (found - before).abs().max() > 0.1


def test_disabling_the_adapter_gives_the_base_model(base, folder):
    expected = logits(base)
    model = PeftModel.from_pretrained(base, folder / "adapter")
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), torch.load(folder / "logits"))


def test_two_adapters_bring_their_own_queries(base, folder, tmp_path):
    plain = logits(base)
    model = PeftModel.from_pretrained(base, folder / "adapter", adapter_name="first")
    model.add_adapter("second", attnres_lora_config(target_modules=["o_proj"]))
    model.set_adapter("second")
    shake_trainable(model, seed=4)
    second = logits(model)
    model.set_adapter("first")
    assert torch.equal(logits(model), torch.load(folder / "logits"))
    assert (second - torch.load(folder / "logits")).abs().max() > 0.01
    model.save_pretrained(tmp_path)
    loaded = AttnResForCausalLM.from_pretrained(folder / "base")
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "second", adapter_name="second")
    assert torch.equal(logits(loaded), second)
    model.delete_adapter("first")
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


def test_adapters_cannot_be_mixed_within_a_batch(folder):
    """Every row would need queries of its own; PEFT says so."""
    model = load_by_peft(folder).eval()
    with pytest.raises(TypeError, match="Mixed batching is only supported"):
        model(tiny_inputs(), adapter_names=["default", "__base__"])


def test_a_merged_model_saves_as_any_other(folder, tmp_path):
    merged = load_by_peft(folder).merge_and_unload()
    assert isinstance(merged, AttnResForCausalLM)
    # fp32: W x + B A x against (W + B A) x.
    torch.testing.assert_close(logits(merged), torch.load(folder / "logits"), rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert names == load_file(folder / "base" / "model.safetensors").keys()
    assert torch.equal(logits(AttnResForCausalLM.from_pretrained(tmp_path)), logits(merged))


def test_unloading_keeps_the_trained_queries(base, folder):
    """PEFT's rule for every module to save; `disable_adapter` is the way back to the base model."""
    unloaded = PeftModel.from_pretrained(base, folder / "adapter").unload()
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    for name in ("query", "key_norm"):
        assert torch.equal(getattr(unloaded.model.depth_attention, name), saved[f"{DEPTH}.{name}"])
    original = AttnResForCausalLM.from_pretrained(folder / "base")
    for name, parameter in original.named_parameters():
        if "depth_attention" not in name:
            assert torch.equal(unloaded.get_parameter(name), parameter), name


def test_generation_with_an_adapter(base, folder):
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cached = model.generate(input_ids=tiny_inputs(), **settings)
    assert torch.equal(cached, model.generate(input_ids=tiny_inputs(), use_cache=False, **settings))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_gradients_of_the_recipe(use_reentrant, folder):
    found = {}
    for checkpointed in (False, True):
        model = load_by_peft(folder).train()
        model.set_adapter("default")
        if checkpointed:
            model.get_base_model().gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
            )
            model.enable_input_require_grads()
        model(tiny_inputs(), labels=tiny_inputs()).loss.backward()
        found[checkpointed] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(found[True]) == NUM_LAYERS * 2 * 2 + 2
    for name, gradient in found[False].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(found[True][name], gradient, rtol=1e-4, atol=1e-6)


def test_without_the_package_and_over_the_hub(folder):
    """The base by its own code, and an adapter that is pushed without it."""
    script = WITHOUT_PACKAGE.replace("INPUTS", repr(tiny_inputs().tolist()))
    with HubServer() as server:
        environment = {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        process = run_python("-c", script, folder=folder, HF_TOKEN=TOKEN, **environment)
        ((oid, files),) = server.repositories[REPO].commits[-1:]
    assert process.stdout.split() == [oid, str(NUM_LAYERS * 2)]
    assert {path for path, file in files.items() if file.is_lfs} == {"adapter_model.safetensors"}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files)
    assert not {path for path in files if path.startswith("model") or path.endswith(".py")}
    expected = torch.load(folder / "logits")
    results = load_file(folder / "results.safetensors")
    assert torch.equal(results["folder"], expected)
    assert torch.equal(results["hub"], expected)
    torch.testing.assert_close(results["merged"], expected, rtol=1e-4, atol=1e-5)  # fp32, merged


def test_peft_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    path = modeling_attnres.peft_attnres.__file__
    spec = importlib.util.spec_from_file_location("modeling_attnres.without_peft", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.register_peft_targets("attnres")
    with pytest.raises(ImportError, match=r"needs PEFT: pip install .modeling-attnres\[train\]"):
        module.attnres_lora_config()


# --- Adapters of earlier versions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_an_adapter_of_an_earlier_version_loads(kind, tmp_path):
    """Names of tensors had one level more while the backbone was a module of its own."""
    config = attnres_lora_config(init_lora_weights=False) if kind == "lora" else IA3Config(task_type="CAUSAL_LM")
    adapted = get_peft_model(tiny_model("llama", 3), config).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.3)
    expected = adapted(input_ids=tiny_inputs()).logits
    adapted.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {
        name.replace("model.model.layers", "model.model.backbone.layers"): tensor
        for name, tensor in load_file(file).items()
    }
    assert any("backbone" in name for name in tensors)
    save_file(tensors, file)
    loaded = PeftModel.from_pretrained(tiny_model("llama", 3), tmp_path).eval()
    assert torch.equal(loaded(input_ids=tiny_inputs()).logits, expected)


def test_an_adapter_of_an_earlier_version_that_does_not_fit_is_told(tmp_path):
    adapted = get_peft_model(tiny_model("llama", 3), IA3Config(task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name.replace("layers.0", "backbone.layers.9"): value for name, value in load_file(file).items()}, file)
    with pytest.raises((ValueError, RuntimeError, KeyError)):
        adapted.load_adapter(tmp_path, "again")
