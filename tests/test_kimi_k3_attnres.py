# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Kimi K3's text model: against the official code's numbers, against a plain transcription, and as a model of its own."""

import json

import pytest
import torch
from fresh_process import LOADER, load_results, run_python
from kimi_k3_naive import is_dense, naive_logits
from kimi_k3_tiny import FOLDER, expected_logits, fixture_model, fixture_weights, published_fields
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_backbones import randomize_depth_attention, tiny_inputs, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from modeling_attnres import AttnResConfig, AttnResForCausalLM, KimiK3ForCausalLM, KimiK3TextConfig
from modeling_attnres.compat_attnres import CACHE
from modeling_attnres.eval.inspect_model import inspect_model
from modeling_attnres.kimi_k3_attnres import KimiK3GatedActivation, KimiK3MoE, _HeadsFromFile


# fp32: sums of other kernels over 7 layers, logits of up to 3.4. What is computed otherwise shows from 0.14 on.
OFFICIAL = {"rtol": 0, "atol": 2e-4}
FP32 = {"rtol": 0, "atol": 1e-4}  # the same model in another order of sums, logits of the same size
# fp32 against fp64, random weights: a change of 1e-7 in the embedding changes logits by up to 4e-4 in these models.
RANDOM = {"rtol": 0, "atol": 5e-4}
KEPT_IN_FP32 = ("A_log", "dt_bias", "conv1d.weight", "o_norm.weight", "e_score_correction_bias")


@pytest.fixture(scope="module")
def model():
    return fixture_model()


# --- The official code -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_official_codes_logits(model):
    expected = expected_logits()
    logits = model(expected["input_ids"][:1].long()).logits
    torch.testing.assert_close(logits, expected["logits"], **OFFICIAL)


@torch.no_grad()
def test_the_official_codes_logits_under_left_padding(model):
    expected = expected_logits()
    mask = expected["attention_mask"].bool()
    assert not mask.all()
    logits = model(expected["input_ids"].long(), attention_mask=mask.long()).logits
    torch.testing.assert_close(logits[mask], expected["padded_logits"][mask], **OFFICIAL)


def test_the_transcription_has_the_official_codes_logits():
    expected = expected_logits()
    weights, queries, key_norms = fixture_weights()
    logits = naive_logits(published_fields(), weights, expected["input_ids"][0].long(), queries, key_norms, block=3)
    torch.testing.assert_close(logits.float(), expected["logits"][0], **OFFICIAL)


@torch.no_grad()
@pytest.mark.parametrize("prefill", [1, 3, 64, 70])
def test_cached_decoding(model, prefill):
    input_ids = expected_logits()["input_ids"][:1].long()
    full = model(input_ids).logits
    output = model(input_ids[:, :prefill], use_cache=True)
    logits = [output.logits]
    for token in range(prefill, input_ids.shape[1]):
        output = model(input_ids[:, token : token + 1], use_cache=True, **{CACHE: output[CACHE]})
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), full, **FP32)


@torch.no_grad()
def test_a_left_padded_row_is_the_row_alone():
    """With a cached step behind it; a model whose logits do not amplify rounding, as the fixture's do (1e-7 to 7e-5)."""
    model = tiny_model("kimi_k3_text", 4)
    input_ids = tiny_inputs(2, 70)
    mask = torch.ones_like(input_ids)
    mask[0, :9] = 0
    padded = model(input_ids, attention_mask=mask, use_cache=True)
    following = torch.tensor([[7], [8]])
    step_mask = torch.cat([mask, torch.ones_like(following)], dim=1)
    step = model(following, attention_mask=step_mask, use_cache=True, **{CACHE: padded[CACHE]}).logits
    for row in range(2):
        kept = mask[row].bool()
        logits = model(torch.cat([input_ids[row][kept], following[row]])[None]).logits[0]
        torch.testing.assert_close(padded.logits[row][kept], logits[:-1], **FP32)
        torch.testing.assert_close(step[row, 0], logits[-1], **FP32)


# --- Other configs, against the transcription ------------------------------------------------------------------------


def tiny_fields(layers=5, full=(3, 5), linear=None, **fields) -> dict:
    """Published fields of a model that is smaller still, with some of them replaced; `...` leaves a field out."""
    attention = {
        **{"num_heads": 3, "head_dim": 8, "short_conv_kernel_size": 4, "use_full_rank_gate": True},
        **{"gate_lower_bound": -5.0, "full_attn_layers": [*full]},
        "kda_layers": [layer for layer in range(1, layers + 1) if layer not in full],
        **(linear or {}),
    }
    small = {"num_hidden_layers": layers, "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48}
    small |= {"routed_expert_hidden_size": 16, "moe_intermediate_size": 24, "num_experts": 5}
    small |= {"linear_attn_config": {name: value for name, value in attention.items() if value is not ...}}
    return {name: value for name, value in {**published_fields(), **small, **fields}.items() if value is not ...}


VARIANTS = {
    "released": ({}, 2),
    "whole-depth": ({}, 9),
    "sublayer-blocks-of-one-layer": ({}, 1),
    "no-bound": ({"linear": {"gate_lower_bound": ...}}, 2),
    "other-bound": ({"linear": {"gate_lower_bound": -1.5, "short_conv_kernel_size": 3}}, 2),
    "low-rank-gate": ({"linear": {"use_full_rank_gate": False}}, 3),
    "low-rank-by-default": ({"linear": {"use_full_rank_gate": ..., "gate_lower_bound": None}}, 3),
    "narrow-situ": ({"activation_situ_beta": 0.7, "activation_situ_linear_beta": 0.4}, 2),
    "situ-by-default": ({"activation_situ_beta": ..., "activation_situ_linear_beta": ...}, 2),
    "silu-by-default": ({"hidden_act": ...}, 2),
    "dense": ({"num_experts": None, "layers": 3, "full": (2,)}, 2),
    "dense-by-default": ({"num_experts": ..., "num_shared_experts": ..., "first_k_dense_replace": ...}, 2),
    "tied": ({"tie_word_embeddings": True, "layers": 1, "full": (1,)}, 1),
    "sparse-from-the-start": ({"first_k_dense_replace": ..., "layers": 2, "full": (2,)}, 1),
    "every-other-layer": ({"moe_layer_freq": 2}, 2),
    "no-latent": ({"routed_expert_hidden_size": None}, 2),
    "latent-without-norm": ({"latent_moe_use_norm": ...}, 2),
    "no-shared-experts": ({"num_shared_experts": ...}, 2),
    "one-expert": ({"num_experts_per_token": 1, "routed_scaling_factor": 2.5}, 2),
    "all-experts-not-normalised": ({"num_experts_per_token": 5, "moe_renormalize": False}, 2),
    "no-output-gate": ({"mla_use_output_gate": ..., "q_lora_rank": None}, 2),
    "other-epsilon": ({"rms_norm_eps": ...}, 2),
}


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0):
    """Weights at which every part shows in the logits; nothing is zero, one or the same for all heads."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in name:
            tensor.copy_(1 + 0.3 * noise)
        elif tensor.ndim < 2 or "A_log" in name:
            tensor.copy_(0.7 * noise)
        else:
            tensor.copy_(noise / tensor.shape[-1] ** 0.5)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_transcription(variant, tmp_path):
    changes, block = VARIANTS[variant]
    fields = tiny_fields(**changes)
    config = AttnResConfig(text_config=KimiK3TextConfig(**fields), sublayers_per_block=2)
    config.sublayers_per_block = min(2 * block, config.num_sublayers)
    dense = ["dense" if is_dense(fields, layer) else "sparse" for layer in range(config.num_hidden_layers)]
    assert config.mlp_layer_types == dense
    model = AttnResForCausalLM(config).eval()
    randomize(model)
    randomize_depth_attention(model)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    input_ids = tiny_inputs(1, 11)
    depth = [weights.pop(f"model.depth_attention.{name}") for name in ("query", "key_norm")]
    expected = naive_logits(fields, weights, input_ids[0], *depth, block=block)
    assert expected.std() > 0.3
    torch.testing.assert_close(model(input_ids).logits[0].double(), expected, **RANDOM)

    plain = AutoModelForCausalLM.from_config(KimiK3TextConfig(**fields)).eval()
    assert isinstance(plain, KimiK3ForCausalLM)
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "depth_" not in name})
    expected = naive_logits(fields, weights, input_ids[0])
    torch.testing.assert_close(plain(input_ids).logits[0].double(), expected, **RANDOM)


# --- Dtypes ----------------------------------------------------------------------------------------------------------


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in model.state_dict().items()}


def is_kept(name: str) -> bool:
    return name.endswith(KEPT_IN_FP32)


@pytest.mark.parametrize("with_depth", [True, False], ids=["attnres", "prenorm"])
def test_what_stays_in_fp32(with_depth, tmp_path):
    model = fixture_model() if with_depth else KimiK3ForCausalLM(KimiK3TextConfig(**published_fields()))
    model.save_pretrained(tmp_path / "fp32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path / "bf16")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    for part in (loaded, again):
        kept = {name for name, dtype in dtypes(part).items() if dtype == torch.float32}
        assert kept == {name for name in dtypes(model) if is_kept(name)}
        assert len(kept) == 5 * 4 + 6  # five layers of linear attention, six mixtures of experts
        assert all(torch.equal(part.state_dict()[name], model.state_dict()[name]) for name in kept)
    with safe_open(tmp_path / "bf16" / "model.safetensors", "pt") as file:
        stored = {name for name in file.keys() if file.get_slice(name).get_dtype() == "F32"}  # noqa: SIM118
    in_file = [*(f"{part}_conv1d.weight" for part in "qkv"), "A_log", "dt_bias", "o_norm.weight", "_correction_bias"]
    assert stored == {name for name in dtypes_of_file() if name.endswith(tuple(in_file))}


def dtypes_of_file() -> list[str]:
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        return [name.removeprefix("language_model.") for name in file.keys()]  # noqa: SIM118


def test_a_model_that_is_built_in_bf16_has_the_dtypes_of_one_that_is_loaded():
    config = AttnResConfig(text_config=KimiK3TextConfig(**published_fields()))
    built = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert {name for name, dtype in dtypes(built).items() if dtype == torch.float32} == set(
        filter(is_kept, dtypes(built))
    )


def test_situ_is_computed_in_fp32_and_rounded_once():
    act = KimiK3GatedActivation(KimiK3TextConfig(**published_fields()))
    gate, up = (40 * torch.randn(2, 500, generator=torch.Generator().manual_seed(0))).bfloat16()
    wide = act(gate.double().float(), up.double().float())
    assert torch.equal(act(gate, up), wide.bfloat16())
    assert wide.abs().max() <= 4 * 25


def test_gates_of_linear_attention_are_computed_in_fp32():
    mixer = AutoModelForCausalLM.from_config(
        KimiK3TextConfig(**published_fields()), dtype=torch.bfloat16
    ).model.layers[0]
    hidden = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    step, decay = mixer.self_attn.b_proj(hidden), mixer.self_attn.forget_gate(hidden)
    assert (step.dtype, decay.dtype) == (torch.float32, torch.float32)
    assert -5 < decay.min() < decay.max() < 0


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_are_rounded_and_then_summed_in_fp32(implementation):
    config = KimiK3TextConfig(**tiny_fields(num_experts=8, num_experts_per_token=8, moe_intermediate_size=16))
    config._experts_implementation = implementation
    experts = KimiK3MoE(config).experts.bfloat16()
    randomize(experts)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(6, 16, generator=generator).bfloat16()
    indices = torch.stack([torch.randperm(8, generator=generator) for _ in range(6)])
    weights = torch.rand(6, 8, generator=generator)
    expected = torch.zeros(6, 16)
    for token in range(6):
        for choice in range(8):
            expert = indices[token, choice]
            gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
            expected[token] += weights[token, choice] * (experts.down_proj[expert] @ experts.act_fn(gate, up)).float()
    found = experts(hidden, indices, weights)
    assert found.dtype == torch.bfloat16
    # bf16: one unit in the last place where products round an expert otherwise. Sums in bf16 are off by four.
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=2**-7)


# --- Config ----------------------------------------------------------------------------------------------------------


def test_what_a_config_leaves_out_has_the_official_codes_default():
    config = KimiK3TextConfig()
    assert (config.num_local_experts, config.n_shared_experts, set(config.mlp_layer_types)) == (None, 0, {"dense"})
    assert (config.routed_scaling_factor, config.rms_norm_eps, config.hidden_act) == (1.0, 1e-6, "silu")
    assert (config.norm_topk_prob, config.latent_moe_use_norm, config.mla_use_output_gate) == (True, False, False)
    assert (config.linear_use_full_rank_gate, config.linear_gate_lower_bound) == (False, None)
    assert config.layer_types[3::4] == 6 * ["full_attention"]
    assert config.layer_types.count("full_attention") == 7  # and the last of 27


def test_a_config_file_is_read_back(tmp_path):
    config = KimiK3TextConfig(**published_fields())
    config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == {**config.to_dict(), "_name_or_path": str(tmp_path)}
    # Each field once: what a nested one says is not kept beside it.
    assert not {"linear_attn_config", "first_k_dense_replace", "moe_layer_freq"} & set(fields)
    assert (fields["linear_num_heads"], fields["linear_gate_lower_bound"]) == (3, -5.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attn_res_block_size": 12}, "`attn_res_block_size` is not a field of the backbone.*sublayers_per_block=24"),
        ({"moe_router_activation_func": "softmax"}, "`moe_router_activation_func` must be 'sigmoid'.*got 'softmax'"),
        ({"topk_method": "greedy"}, "`topk_method` must be 'noaux_tc'.*got 'greedy'"),
        ({"mla_use_nope": False}, "`mla_use_nope` must be True.*got False"),
        ({"num_nextn_predict_layers": 1}, "`num_nextn_predict_layers` must be 0.*got 1"),
        ({"use_grouped_topk": False, "num_expert_group": 2}, "goes with one group of experts, got num_expert_group=2"),
        ({"hidden_act": "sitou"}, "`hidden_act` must be 'situ' or an activation of Transformers, got 'sitou'"),
        ({"activation_situ_beta": 0.0}, "`activation_situ_beta` must be positive, got 0.0"),
        ({"activation_situ_linear_beta": -1.0}, "`activation_situ_linear_beta` must be positive, got -1.0"),
        ({"linear": {"gate_lower_bound": 5.0}}, "`gate_lower_bound` bounds a log decay.*got 5.0"),
        ({"linear": {"head_size": 8}}, r"`linear_attn_config` has fields that are unknown here: \['head_size'\]"),
        ({"linear": {"kda_layers": [1, 2]}}, "must name every decoder layer once, from 1 to `num_hidden_layers`=5"),
        ({"linear": {"kda_layers": [1, 2, 3, 4]}}, "must name every decoder layer once"),
        ({"layer_types": 5 * ["full_attention"]}, "`layer_types` must agree with `linear_attn_config`=.*got"),
        ({"moe_intermediate_size": None}, "needs `moe_intermediate_size`"),
        ({"num_experts_per_token": 6}, "`num_experts_per_token` must be from 1 to `num_experts`=5, got 6"),
        ({"num_experts": None, "mlp_layer_types": 5 * ["sparse"]}, "needs `num_experts`"),
        ({"latent_moe_use_norm": "yes"}, "latent_moe_use_norm"),
    ],
)
def test_configs_that_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        KimiK3TextConfig(**tiny_fields(**fields))


# --- Weights ---------------------------------------------------------------------------------------------------------


def test_files_have_kimi_k3s_names(model, tmp_path):
    model.save_pretrained(tmp_path / "attnres")
    names = set(load_file(tmp_path / "attnres" / "model.safetensors"))
    official = {name for name in dtypes_of_file() if "_res_" not in name}
    assert names == official | {"model.depth_attention.query", "model.depth_attention.key_norm"}


def test_a_padded_decay(model, tmp_path):
    weights, *_ = fixture_weights()
    plain = KimiK3ForCausalLM(model.config.text_config)
    plain.config.save_pretrained(tmp_path)
    assert weights["model.layers.0.self_attn.A_log"].shape == (16,)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    decay = loaded.model.layers[0].self_attn.forget_gate.A_log
    assert torch.equal(decay.view(-1), weights["model.layers.0.self_attn.A_log"][:3])
    loaded.save_pretrained(tmp_path / "again")
    stored = load_file(tmp_path / "again" / "model.safetensors")
    assert torch.equal(stored["model.layers.0.self_attn.A_log"], weights["model.layers.0.self_attn.A_log"][:3])
    assert all(torch.equal(value, weights[name]) for name, value in stored.items() if "A_log" not in name)


@pytest.mark.parametrize(
    ("decay", "message"),
    [(torch.ones(16), "got 16 numbers, 13 of the later ones not zero"), (torch.ones(2), "got 2 numbers, 0 of the")],
)
def test_a_decay_of_another_form(decay, message):
    weights, *_ = fixture_weights()
    config = KimiK3TextConfig(**published_fields())
    with pytest.raises(ValueError, match=message):
        _HeadsFromFile().convert({"A_log": [decay]}, ["A_log"], ["A_log"], config=config)
    weights["model.layers.0.self_attn.A_log"] = decay
    with pytest.raises(RuntimeError, match="conversion"):  # the library has logged the message by then
        KimiK3ForCausalLM.from_pretrained(None, config=config, state_dict=weights)


# --- As a model of its own -------------------------------------------------------------------------------------------


def plain_model(**fields) -> KimiK3ForCausalLM:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(KimiK3TextConfig(**tiny_fields(**fields)))


@pytest.mark.parametrize("build", [plain_model, lambda: tiny_model("kimi_k3_text")], ids=["prenorm", "attnres"])
def test_every_parameter_gets_a_gradient(build):
    model = build().train()
    input_ids = tiny_inputs(4, 24)
    model(input_ids, labels=input_ids).loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    zero = [
        name for name, parameter in model.named_parameters() if parameter.grad is not None and not parameter.grad.any()
    ]
    assert (missing, zero) == ([], [])


def test_gradient_checkpointing_of_the_plain_model():
    input_ids = tiny_inputs()
    gradients = []
    for checkpointed in (False, True):
        model = plain_model().train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(input_ids, labels=input_ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)  # fp32


def test_the_plain_model_generates_and_loads_again(tmp_path):
    model = plain_model(tie_word_embeddings=True).eval()
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "kimi_k3_attnres.KimiK3TextConfig",
        "AutoModelForCausalLM": "kimi_k3_attnres.KimiK3ForCausalLM",
    }
    choices = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(tiny_inputs(), **choices)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.generate(tiny_inputs(), **choices), expected)


def test_the_plain_model_runs_by_its_own_code(tmp_path):
    """In a process without the package."""
    model = plain_model().eval()
    model.save_pretrained(tmp_path / "model")
    paths = {"again": str(tmp_path / "again"), "results": str(tmp_path / "results.safetensors")}
    job = {"source": str(tmp_path / "model"), "auto_class": "AutoModelForCausalLM", "inputs": tiny_inputs().tolist()}
    (tmp_path / "jobs.json").write_text(json.dumps([{**job, **paths}]))
    run_python(LOADER, tmp_path / "jobs.json", folder=tmp_path, HF_HUB_OFFLINE="1")
    results = load_results(tmp_path / "results.safetensors")
    with torch.no_grad():
        expected = model(tiny_inputs()).logits
    for turn in ("first", "again"):
        assert torch.equal(results[turn]["logits"], expected)


@pytest.mark.parametrize("build", [plain_model, lambda: tiny_model("kimi_k3_text")], ids=["prenorm", "attnres"])
def test_trainer_takes_a_step(build, tmp_path):
    model = build()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True
    )
    examples = [{"input_ids": row, "labels": row} for row in tiny_inputs(4, 24)]
    result = Trainer(model, arguments, train_dataset=examples).train()
    assert 0 < result.training_loss < 10
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []


def test_depth_is_inspected():
    model = tiny_model("kimi_k3_text", 4)
    dynamics, weights = inspect_model(model, tiny_inputs())
    assert weights.shape == (2 * 4 + 1, 2 + 1)  # L + 1 mixes over the embedding and two blocks
    torch.testing.assert_close(weights.nansum(-1), torch.ones(9, dtype=weights.dtype), rtol=0, atol=1e-6)  # fp32
    assert len(dynamics.gradient_norm) == 4
    assert min(dynamics.gradient_norm) > 0


def test_peft_finds_targets_in_the_plain_model():
    targets = get_peft_model(plain_model(), LoraConfig(task_type="CAUSAL_LM")).targeted_module_names
    mixers = {"q_proj", "v_proj", "q_b_proj", "kv_b_proj"}
    assert {name.rpartition(".")[-1] for name in targets} == mixers
    assert {int(name.split(".")[2]) for name in targets} == set(range(5))
