# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What Trainer, PEFT, accelerate and Transformers do with a plain model they do with an AttnRes model."""

import pytest
import torch
from accelerate import load_checkpoint_and_dispatch
from datasets import Dataset
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    ShadowConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import save_file
from tiny_backbones import load_plain_weights, tiny_backbone, tiny_inputs, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import load_sharded_checkpoint

from modeling_attnres import AttnResConfig, AttnResForCausalLM
from modeling_attnres.compat_attnres import CACHE


def plain_model(model_type: str = "llama", **overrides):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_backbone(model_type, **overrides)).eval()


def converted(plain, sublayers_per_block: int = 3):
    """The lossless AttnRes model of a plain one: its outputs are the same, bit for bit."""
    config = AttnResConfig(text_config=plain.config, sublayers_per_block=sublayers_per_block, depth_weights="sum")
    model = AttnResForCausalLM(config).eval()
    load_plain_weights(model, plain)
    model.tie_weights()
    return model


# --- Trainer ---------------------------------------------------------------------------------------------------------


def test_label_smoothing_shifts_the_labels(tmp_path):
    losses = []
    for model in (plain := plain_model(), converted(plain)):
        rows = [{"input_ids": row, "labels": row} for row in tiny_inputs().tolist()]
        arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, report_to=[], use_cpu=True)
        losses.append(Trainer(model, arguments, eval_dataset=Dataset.from_list(rows)).evaluate()["eval_loss"])
    assert losses[0] == losses[1]


# --- PEFT ------------------------------------------------------------------------------------------------------------

FULL = "model.layers.1.self_attn.q_proj"
LORA = {"task_type": "CAUSAL_LM", "r": 4, "init_lora_weights": False}
ADAPTERS = {
    "default": lambda: LoraConfig(**LORA),
    "all-linear": lambda: LoraConfig(**LORA, target_modules="all-linear"),
    "rank by suffix": lambda: LoraConfig(**LORA, rank_pattern={"layers.1.self_attn.q_proj": 8}),
    "rank by full name": lambda: LoraConfig(**LORA, rank_pattern={FULL: 8}),
    "alpha by full name": lambda: LoraConfig(**LORA, alpha_pattern={FULL: 64}),
    "full pattern": lambda: LoraConfig(**LORA, target_modules=r"model\.layers\.\d+\.self_attn\.(q|v)_proj"),
    "full names": lambda: LoraConfig(**LORA, target_modules=[FULL]),
    "full name left out": lambda: LoraConfig(**LORA, target_modules=["q_proj", "v_proj"], exclude_modules=[FULL]),
    "some layers": lambda: LoraConfig(**LORA, target_modules=["q_proj"], layers_to_transform=[1]),
    "tokens": lambda: LoraConfig(**LORA, trainable_token_indices=[5, 9]),
    "embedding and head saved": lambda: LoraConfig(**LORA, modules_to_save=["embed_tokens", "lm_head"]),
    "a feed-forward saved": lambda: LoraConfig(**LORA, modules_to_save=["model.layers.1.mlp"]),
    "embedding": lambda: LoraConfig(**LORA, target_modules=["embed_tokens", "q_proj"]),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "ia3": lambda: IA3Config(task_type="CAUSAL_LM"),
    "vera": lambda: VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]),
    "loha": lambda: LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]),
    "oft": lambda: OFTConfig(task_type="CAUSAL_LM", r=0, oft_block_size=4, target_modules=["q_proj"]),
    "norms": lambda: LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm", "norm"]),
}


@torch.no_grad()
def disturb(model):
    """Gives an adapter an effect."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_of_the_source_acts_on_the_converted_model(kind, tied, tmp_path):
    source = plain_model(tie_word_embeddings=tied)
    model = converted(source)
    unadapted = source(tiny_inputs()).logits
    adapted = get_peft_model(source, ADAPTERS[kind]()).eval()
    disturb(adapted)
    expected = adapted(input_ids=tiny_inputs()).logits[:, -12:]
    assert not torch.allclose(expected, unadapted, atol=1e-5)
    adapted.save_pretrained(tmp_path)
    assert torch.equal(
        PeftModel.from_pretrained(model, tmp_path).eval()(input_ids=tiny_inputs()).logits[:, -12:], expected
    )


def test_an_adapter_for_single_experts_is_refused_until_it_is_merged(tmp_path):
    """As PEFT wrote them for Transformers 4: the plain model takes them, and writes what an AttnRes model takes."""
    source = plain_model("qwen3_moe", mlp_only_layers=[])
    targets = {"self_attn.q_proj": (32, 32)}
    for expert in range(4):
        for name, shape in (("gate_proj", (16, 32)), ("up_proj", (16, 32)), ("down_proj", (32, 16))):
            targets[f"mlp.experts.{expert}.{name}"] = shape
    weights = {}
    for layer in range(4):
        for name, (rows, columns) in targets.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{key}.lora_A.weight"] = torch.randn(4, columns)
            weights[f"{key}.lora_B.weight"] = torch.randn(rows, 4)
    modules = [name.rpartition(".")[2] for name in targets]
    LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=modules).save_pretrained(tmp_path)
    save_file(weights, tmp_path / "adapter_model.safetensors")

    with pytest.raises(ValueError, match=r"16 weights that this model has no place for, such as `.*experts.*` ?"):
        PeftModel.from_pretrained(converted(source), tmp_path)
    model = converted(source)
    adapted = PeftModel.from_pretrained(source, tmp_path).eval()
    adapted.save_pretrained(tmp_path / "merged")
    loaded = PeftModel.from_pretrained(model, tmp_path / "merged").eval()
    assert torch.equal(loaded(input_ids=tiny_inputs()).logits, adapted(input_ids=tiny_inputs()).logits)


def test_trained_tokens_of_tied_embeddings_are_the_heads_too():
    model = get_peft_model(
        tiny_model("llama", 3, tie_word_embeddings=True),
        LoraConfig(task_type="CAUSAL_LM", r=4, trainable_token_indices=[90, 91]),
    ).eval()
    assert type(model.base_model.model.lm_head).__name__ == "TrainableTokensWrapper"
    disturb(model)
    expected = model(input_ids=tiny_inputs()).logits
    torch.testing.assert_close(model.merge_and_unload()(tiny_inputs()).logits, expected, rtol=1e-4, atol=1e-5)  # fp32


# --- accelerate, Transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sublayers_per_block", [1, 3])
def test_loaders_that_know_only_names(sublayers_per_block, tmp_path):
    model = tiny_model("llama", sublayers_per_block)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    other = tiny_model("llama", sublayers_per_block, seed=1)
    other = load_checkpoint_and_dispatch(other, tmp_path, device_map={"": "cpu"})
    assert torch.equal(other(tiny_inputs()).logits, model(tiny_inputs()).logits)
    other = tiny_model("llama", sublayers_per_block, seed=1)
    load_sharded_checkpoint(other, tmp_path, strict=True)
    assert torch.equal(other(tiny_inputs()).logits, model(tiny_inputs()).logits)


def test_the_implementation_of_experts_is_set_as_on_the_plain_model(tmp_path):
    plain, model = plain_model("qwen3_moe"), tiny_model("qwen3_moe", 3)
    assert model.config._experts_implementation == plain.config._experts_implementation
    model.save_pretrained(tmp_path)
    expected = model(tiny_inputs()).logits
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=implementation)
        for one in (model, loaded):
            assert one.config._experts_implementation == one.model.config._experts_implementation == implementation
            torch.testing.assert_close(one(tiny_inputs()).logits, expected, rtol=1e-4, atol=1e-5)  # fp32


ROPE = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("way", ["attribute", "keyword"])
def test_another_rope_acts(field, way, tmp_path):
    tokens, outputs = tiny_inputs(1, 60), []
    for name, model in (("plain", plain := plain_model()), ("attnres", converted(plain))):
        folder = tmp_path / name
        model.save_pretrained(folder)
        if way == "attribute":
            config = AutoConfig.from_pretrained(folder)
            setattr(config, field, dict(ROPE))
            loaded = AutoModelForCausalLM.from_pretrained(folder, config=config)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(folder, **{field: dict(ROPE)})
        outputs.append(loaded(tokens).logits)
    assert torch.equal(*outputs)
    assert not torch.allclose(outputs[0], plain(tokens).logits, atol=1e-4)


@pytest.mark.parametrize("depth_attention_type", ["softmax", "static"])
@pytest.mark.parametrize("sublayers_per_block", [1, 3, 8])
def test_early_exit_drafts(sublayers_per_block, depth_attention_type):
    model = tiny_model("llama", sublayers_per_block, depth_attention_type=depth_attention_type)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(tiny_inputs(1), **settings)
    assert torch.equal(model.generate(tiny_inputs(1), assistant_early_exit=2, **settings), expected)
    assert (model.config.num_hidden_layers, model.config.sublayers_per_block) == (4, sublayers_per_block)


def test_an_early_exit_is_the_plain_models():
    plain = plain_model()
    outputs = []
    for model in (plain, converted(plain)):
        model.config.num_hidden_layers = 2
        outputs.append(model(tiny_inputs()).logits)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("sublayers_per_block", [1, 3, 8])
def test_a_replaced_forward_acts(sublayers_per_block):
    """Code that patches modules by hand: what an attention or a decoder layer returns is steered, at every step."""
    plain = plain_model()
    model = converted(plain, sublayers_per_block)
    unpatched = model.generate(tiny_inputs(), max_new_tokens=6, do_sample=False)
    for part in (lambda layer: layer.self_attn, lambda layer: layer):
        outputs = []
        for one in (plain, model):
            module = part(one.model.layers[1])
            module.forward = steered(module.forward)
            generated = one.generate(tiny_inputs(), max_new_tokens=6, do_sample=False)
            outputs.append((one(tiny_inputs()).logits, generated))
            del module.forward
        torch.testing.assert_close(outputs[0][0], outputs[1][0], rtol=1e-5, atol=1e-5)  # fp32: order of sums
        assert torch.equal(outputs[0][1], outputs[1][1])
        assert not torch.equal(outputs[0][1], unpatched)


def steered(forward):
    """`forward`, whose first output is shifted along one direction."""
    direction = 3 * torch.randn(32, generator=torch.Generator().manual_seed(2))

    def patched(*args, **kwargs):
        output = forward(*args, **kwargs)
        return (output[0] + direction, *output[1:]) if isinstance(output, tuple) else output + direction

    return patched


def test_other_layers_are_refused():
    model = converted(plain_model())
    layers = model.model.layers
    with pytest.raises(ValueError, match="`layers` must stay the model's 4 decoder layers in their order"):
        get_peft_model(model, LoraConfig(**LORA, layer_replication=[[0, 3], [1, 4]]))
    for others in (torch.nn.ModuleList(reversed(layers)), layers[1:], torch.nn.ModuleList([*layers, layers[0]]), None):
        with pytest.raises(ValueError, match="`layers` must stay"):
            model.model.layers = others


def test_the_first_layers_alone_are_the_plain_models():
    plain = plain_model()
    outputs = []
    for model in (plain, converted(plain)):
        model.model.layers = model.model.layers[:2]
        model.config.num_hidden_layers = 2
        outputs.append(model(tiny_inputs()).logits)
    assert torch.equal(*outputs)


def test_fewer_layers_than_saved_are_those_of_a_whole_model(tmp_path):
    """Loading less than was saved stops; lowering the number afterwards is what architecture.md advises."""
    plain = plain_model()
    model = converted(plain)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    plain.save_pretrained(tmp_path / "plain")
    loaded.config.num_hidden_layers = 2
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", num_hidden_layers=2)
    assert torch.equal(loaded(tiny_inputs()).logits, expected(tiny_inputs()).logits)


def test_shadow_adapters_of_the_source_act_on_the_converted_model(tmp_path):
    source = plain_model()
    model = converted(source)
    adapted = get_peft_model(source, ShadowConfig(task_type="CAUSAL_LM")).eval()
    disturb(adapted)
    expected = adapted(input_ids=tiny_inputs()).logits
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model, tmp_path).eval()
    assert torch.equal(loaded(input_ids=tiny_inputs()).logits, expected)


def test_a_prefix_is_never_ignored():
    model = get_peft_model(tiny_model("llama", 3), ADAPTERS["prefix"]()).eval()
    disturb(model)
    model(input_ids=tiny_inputs())
    if CACHE == "cache":
        with pytest.raises(ValueError, match="not as both: one would be ignored"):
            model.generate(input_ids=tiny_inputs(), max_new_tokens=2)
    else:
        model.generate(input_ids=tiny_inputs(), max_new_tokens=2)
