# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_backbones import BACKBONES, tiny_backbone, tiny_inputs, tiny_model
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from modeling_attnres.training import DEFAULT_QUERY_LR, attnres_optimizer, attnres_parameter_groups


DEPTH = ["model.depth_attention.query", "model.depth_attention.key_norm"]


def names_by_group(model, groups) -> dict[str, list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: [names[id(parameter)] for parameter in group["params"]] for group in groups}


@pytest.fixture(scope="module")
def single_process_group(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_rates_and_decay_of_every_group():
    model = tiny_model("llama")
    groups = attnres_parameter_groups(model, lr=2e-5, query_lr=1e-4, weight_decay=0.1)
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("decay", 2e-5, 0.1),
        ("no_decay", 2e-5, 0.0),
        ("depth_attention", 1e-4, 0.0),
    ]
    found = names_by_group(model, groups)
    assert found["depth_attention"] == DEPTH
    assert "model.layers.0.self_attn.q_proj.weight" in found["decay"]
    assert "model.norm.weight" in found["no_decay"]
    assert attnres_parameter_groups(model, lr=1e-5)[-1]["lr"] == DEFAULT_QUERY_LR == 3e-4


@pytest.mark.parametrize("model_type", BACKBONES)
def test_every_parameter_is_in_one_group_and_no_vector_decays(model_type):
    model = tiny_model(model_type)
    found = names_by_group(model, attnres_parameter_groups(model, lr=1e-3, weight_decay=0.1))
    placed = [name for names in found.values() for name in names]
    assert sorted(placed) == sorted(name for name, _ in model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name in found["decay"]:
        assert len(shapes[name]) >= 2, name
        assert "norm" not in name, name
        assert "bias" not in name, name
    # What does not decay by its name though it is no vector: the biases of stacked experts.
    assert all(len(shapes[name]) == 1 or name.endswith("_bias") for name in found["no_decay"])


def wrap_none(model):
    return model


def wrap_data_parallel(model):
    return torch.nn.parallel.DistributedDataParallel(model)


def wrap_fsdp2(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def wrap_compile(model):
    return torch.compile(model)


@pytest.mark.parametrize("wrap", [wrap_none, wrap_data_parallel, wrap_fsdp2, wrap_compile])
def test_groups_are_the_same_under_wrappers(wrap, single_process_group):
    plain = attnres_parameter_groups(tiny_model("qwen2"), lr=1e-3, query_lr=1e-4, weight_decay=0.1)
    wrapped = wrap(tiny_model("qwen2"))
    groups = attnres_parameter_groups(wrapped, lr=1e-3, query_lr=1e-4, weight_decay=0.1)
    for group, expected in zip(groups, plain, strict=True):
        assert {key: value for key, value in group.items() if key != "params"} == {
            key: value for key, value in expected.items() if key != "params"
        }
        assert [parameter.shape for parameter in group["params"]] == [
            parameter.shape for parameter in expected["params"]
        ]
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in wrapped.parameters()}


def test_under_peft_the_copies_are_trained():
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["depth_attention"], use_dora=True)
    model = get_peft_model(tiny_model("llama"), config)
    found = names_by_group(model, attnres_parameter_groups(model, lr=1e-3, weight_decay=0.1))
    prefix = "base_model.model.model.depth_attention.modules_to_save.default"
    assert found["depth_attention"] == [f"{prefix}.query", f"{prefix}.key_norm"]
    assert {name.split(".")[-3] for name in found["decay"]} == {"lora_A", "lora_B"}
    assert {name.split(".")[-3] for name in found["no_decay"]} == {"lora_magnitude_vector"}


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_optimizers_move_each_group_at_its_own_rate(optimizer_class):
    model = tiny_model("llama").train()
    optimizer = optimizer_class(attnres_parameter_groups(model, lr=1e-3, query_lr=0.0, weight_decay=0.1))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(tiny_inputs(), labels=tiny_inputs()).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in DEPTH), name


def test_queries_do_not_decay():
    model = tiny_model("llama").train()
    optimizer = torch.optim.AdamW(attnres_parameter_groups(model, lr=0.5, query_lr=0.5, weight_decay=1.0))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        decayed = not (name in DEPTH or "norm" in name)
        torch.testing.assert_close(parameter, before[name] * (0.5 if decayed else 1.0))


def test_errors():
    model = tiny_model("llama")
    for arguments in ({"lr": -1.0}, {"lr": float("nan")}, {"lr": 1e-3, "query_lr": -1e-4}):
        with pytest.raises(ValueError, match="must not be negative"):
            attnres_parameter_groups(model, **arguments)
    with pytest.raises(ValueError, match=r"`weight_decay` must not be negative, got -0\.1"):
        attnres_parameter_groups(model, lr=1e-3, weight_decay=-0.1)
    with pytest.raises(ValueError, match="must have depth attention, got a LlamaForCausalLM without"):
        attnres_parameter_groups(AutoModelForCausalLM.from_config(tiny_backbone("llama")), lr=1e-3)
    with pytest.raises(ValueError, match="depth attention is frozen"):
        attnres_parameter_groups(get_peft_model(model, LoraConfig(target_modules=["q_proj"])), lr=1e-3)


def test_parameters_that_fsdp1_flattened_are_refused():
    model = tiny_model("llama")
    model.model.depth_attention = torch.nn.ModuleDict({"_fsdp_wrapped_module": model.model.depth_attention})
    with pytest.raises(ValueError, match="FSDP1"):
        attnres_parameter_groups(model, lr=1e-3)


def training_arguments(tmp_path, **kwargs):
    return TrainingArguments(output_dir=tmp_path, learning_rate=2e-5, use_cpu=True, report_to=[], **kwargs)


def test_optimizer_follows_the_training_arguments(tmp_path):
    args = training_arguments(tmp_path, weight_decay=0.1, adam_beta2=0.9, optim="adamw_torch")
    factory, kwargs = attnres_optimizer(args, query_lr=1e-4)
    optimizer = factory()(tiny_model("llama"), **kwargs)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["lr"] for group in optimizer.param_groups] == [2e-5, 2e-5, 1e-4]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.0]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.9)}
    args = training_arguments(tmp_path, optim="sgd")
    factory, kwargs = attnres_optimizer(args)
    assert isinstance(factory()(tiny_model("llama"), **kwargs), torch.optim.SGD)


@pytest.mark.parametrize(
    "handled",
    [
        (torch.optim.AdamW, {"lr": 1e-3, "params": []}),  # as GaLore's
        (lambda: None, {"lr": 1e-3}),  # a factory of optimizers
    ],
)
def test_an_optimizer_with_its_own_groups_is_refused(handled, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda args: handled))
    with pytest.raises(ValueError, match=r"`args\.optim` must be an optimizer that takes parameter groups"):
        attnres_optimizer(training_arguments(tmp_path))
