# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import csv
import statistics

import pytest
import torch
from tiny_backbones import tiny_backbone, tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM

from modeling_attnres.eval.dynamics import LayerDynamics, decoder_layers, measure_dynamics, save_dynamics


def rms(values):
    return float(values.square().mean(-1).sqrt().mean())


def prenorm_model(model_type="llama"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_backbone(model_type)).eval()


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_a_prenorm_model_leaves_its_residual_stream(model_type):
    model = prenorm_model(model_type)
    found = measure_dynamics(model, tiny_inputs())
    with torch.no_grad():
        hidden_states = model(tiny_inputs(), output_hidden_states=True).hidden_states
    # The last hidden state is after the final norm: the layer before it is not listed apart.
    assert found.output_magnitude[:-1] == pytest.approx([rms(state) for state in hidden_states[1:-1]], rel=1e-5)
    assert len(found.output_magnitude) == len(decoder_layers(model))


@pytest.mark.parametrize("depth_weights", ["mean", "sum"])
def test_an_attnres_model_leaves_its_open_block(depth_weights):
    """S = 4 is two decoder layers: every second one leaves a whole block, which the model can be asked for."""
    model = tiny_model("llama", 4, depth_weights)
    found = measure_dynamics(model, tiny_inputs())
    with torch.no_grad():
        blocks = model(tiny_inputs(), output_block_summaries=True).block_summaries.unbind(-2)
    assert found.output_magnitude[1::2] == pytest.approx([rms(block) for block in blocks[1:]], rel=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_norms_are_those_of_backward(frozen):
    model = tiny_model("llama", 3).train()
    model(tiny_inputs(), labels=tiny_inputs()).loss.backward()
    expected = [
        float(torch.cat([parameter.grad.flatten() for parameter in layer.parameters()]).norm())
        for layer in decoder_layers(model)
    ]
    kept = [parameter.grad.clone() for parameter in model.parameters()]
    if frozen:
        model.requires_grad_(False)
    found = measure_dynamics(model, tiny_inputs())
    assert found.gradient_norm == pytest.approx(expected, rel=1e-4)  # fp32, summed in another order
    assert model.training
    assert all(torch.equal(parameter.grad, gradient) for parameter, gradient in zip(model.parameters(), kept))
    assert {parameter.requires_grad for parameter in model.parameters()} == {not frozen}


def test_the_figures_that_sum_it_up():
    dynamics = LayerDynamics(output_magnitude=[1.0, 2.0, 4.0], gradient_norm=[1.0, 3.0])
    assert dynamics.magnitude_ratio == 4.0
    assert dynamics.gradient_variation == pytest.approx(statistics.pstdev([1.0, 3.0]) / 2.0)


def test_pictures_have_their_numbers_beside_them(tmp_path):
    dynamics = {"a": LayerDynamics([1.0, 2.0], [3.0, 4.0]), "b": LayerDynamics([5.0], [6.0])}
    picture, table = save_dynamics(dynamics, tmp_path / "figures" / "dynamics.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = list(csv.reader(table.open()))
    assert rows[1:] == [["a", "0", "1", "3"], ["a", "1", "2", "4"], ["b", "0", "5", "6"]]


def test_a_model_without_decoder_layers_is_refused():
    model = prenorm_model()
    model.model.layers = None
    with pytest.raises(ValueError, match="`model` must be a decoder with a list of `layers`, got LlamaForCausalLM"):
        measure_dynamics(model, tiny_inputs())
