# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""`torch.compile` and `torch.export` take the whole model as one graph."""

import pytest
import torch
from tiny_backbones import tiny_inputs, tiny_model
from transformers import CompileConfig, StaticCache

from modeling_attnres import depth_attention_attnres


TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, **kwargs):
    # `aot_eager` traces forward and backward whole; what generates the machine code after that is not ours.
    return torch.compile(function, fullgraph=True, backend="aot_eager", **kwargs)


@pytest.mark.parametrize(("sublayers_per_block", "depth_weights"), [(1, "mean"), (2, "sum"), (3, "mean"), (8, "sum")])
def test_inference_in_one_graph(sublayers_per_block, depth_weights):
    model = tiny_model("llama", sublayers_per_block, depth_weights)
    with torch.no_grad():
        expected = model(tiny_inputs(), use_cache=False).logits
        torch.testing.assert_close(compiled(model)(tiny_inputs(), use_cache=False).logits, expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("sublayers_per_block", "depth_weights", "checkpointing"),
    [(1, "sum", False), (2, "mean", False), (3, "mean", False), (2, "sum", True), (3, "sum", True)],
)
def test_training_in_one_graph(sublayers_per_block, depth_weights, checkpointing):
    model = tiny_model("llama", sublayers_per_block, depth_weights).train()
    input_ids = tiny_inputs()
    model(input_ids, labels=input_ids, use_cache=False).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compiled(model)(input_ids, labels=input_ids, use_cache=False).loss.backward()
    for gradient, parameter in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, **TOLERANCE)


@pytest.mark.parametrize(
    ("sublayers_per_block", "depth_weights", "checkpointing"), [(2, "sum", False), (3, "mean", True)]
)
def test_training_with_copies_of_a_query(sublayers_per_block, depth_weights, checkpointing, monkeypatch):
    monkeypatch.setattr(depth_attention_attnres, "TOKENS_OF_A_COPY", 6)
    test_training_in_one_graph(sublayers_per_block, depth_weights, checkpointing)


@pytest.mark.parametrize(
    ("tokens", "dynamic", "gradients", "copies"),
    [(12, False, True, 4), (13, False, True, 1), (12, True, True, 1), (12, False, False, 1)],
)
def test_copies_of_a_query_are_planned_for_compiled_training(tokens, dynamic, gradients, copies, monkeypatch):
    monkeypatch.setattr(depth_attention_attnres, "TOKENS_OF_A_COPY", 6)

    @compiled
    def planned(embedding):
        return embedding * depth_attention_attnres.plan_depth(embedding, 4, 2, undivided=True).query_copies

    with torch.set_grad_enabled(gradients):
        embedding = torch.ones(2, tokens, 4)
        if dynamic:
            torch._dynamo.mark_dynamic(embedding, 1)
        assert planned(embedding).unique().tolist() == [copies]


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_static_decode_loop_compiles_once(model_type):
    model = tiny_model(model_type, 3)
    input_ids = tiny_inputs()
    expected = model.generate(input_ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    cache = StaticCache(config=model.config.text_config, max_cache_len=24)
    step = compiled(model)
    with torch.no_grad():
        token = model(input_ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        tokens = [token]
        for position in range(12, 17):
            positions = torch.tensor([[position]])
            token = step(token, past_key_values=cache, position_ids=positions, use_cache=True).logits.argmax(-1)
            tokens.append(token)
            if position == 12:
                torch.compiler.set_stance("fail_on_recompile")
    torch.compiler.set_stance("default")
    assert torch.equal(torch.cat(tokens, dim=1), expected[:, 12:])


def test_generate_compiles_its_static_decode_loop():
    """The bank that `generate` hands from step to step goes through the compiled forward too."""
    model = tiny_model("llama", 3)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(tiny_inputs(), **options)
    model.generation_config.compile_config = None
    model.forward = compiled(model.forward)
    result = model.generate(tiny_inputs(), cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(result, expected)


@pytest.mark.parametrize(("sublayers_per_block", "depth_weights"), [(1, "sum"), (2, "mean"), (3, "sum")])
def test_export_with_a_free_number_of_tokens(sublayers_per_block, depth_weights):
    model = tiny_model("llama", sublayers_per_block, depth_weights)
    shapes = {"input_ids": {1: torch.export.Dim("tokens", min=2, max=64)}, "use_cache": None}
    with torch.no_grad():
        program = torch.export.export(
            model, (), {"input_ids": tiny_inputs(), "use_cache": False}, dynamic_shapes=shapes, strict=False
        )
        for tokens in (12, 5, 30):
            input_ids = tiny_inputs(tokens=tokens)
            logits = program.module()(input_ids=input_ids, use_cache=False).logits
            torch.testing.assert_close(logits, model(input_ids).logits, **TOLERANCE)


@pytest.mark.parametrize(("sublayers_per_block", "depth_weights"), [(1, "mean"), (3, "sum")])
def test_an_exported_program_has_no_function_that_onnx_lacks(sublayers_per_block, depth_weights):
    model = tiny_model("llama", sublayers_per_block, depth_weights)
    with torch.no_grad():
        program = torch.export.export(model, (), {"input_ids": tiny_inputs(), "use_cache": False}, strict=False)
    assert not [node.target for node in program.graph.nodes if "hypot" in str(node.target)]


@pytest.mark.parametrize("sublayers_per_block", [1, 3])
def test_the_librarys_own_export_for_generation(sublayers_per_block):
    exporters = pytest.importorskip("transformers.exporters", reason="this Transformers has no exporters")
    dynamo = pytest.importorskip("transformers.exporters.exporter_dynamo")
    model = tiny_model("llama", sublayers_per_block)
    inputs = {"input_ids": tiny_inputs(), "attention_mask": torch.ones_like(tiny_inputs())}
    found = exporters.DynamoExporter().export_for_generation(model, inputs, config=dynamo.DynamoConfig())
    # Older versions return the parts by themselves.
    assert list(getattr(found, "components", found)) == ["prefill", "decode"]


@pytest.mark.parametrize(("sublayers_per_block", "depth_weights"), [(1, "mean"), (2, "sum")])
def test_generate_compiles_by_itself_with_a_static_cache(sublayers_per_block, depth_weights):
    """As on an accelerator, where `generate` compiles decode steps without being asked: one graph for all calls."""
    model, inputs = tiny_model("llama", sublayers_per_block, depth_weights), tiny_inputs()
    arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(inputs, **arguments)
    config = CompileConfig(backend="eager")
    config._compile_all_devices = True
    arguments |= {"cache_implementation": "static", "compile_config": config}
    graphs = []
    for _ in range(3):
        assert torch.equal(model.generate(inputs, **arguments), expected)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] >= 1
    assert graphs[0] == graphs[2]
