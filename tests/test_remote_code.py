# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import ast
import json
from pathlib import Path

import pytest
import torch
import transformers
from fresh_process import LOADER, load_results, run_python
from tiny_backbones import tiny_inputs, tiny_model
from transformers import AutoConfig

import modeling_attnres
from modeling_attnres import (
    AttnResConfig,
    AttnResForCausalLM,
    AttnResForQuestionAnswering,
    AttnResForSequenceClassification,
    AttnResForTokenClassification,
    AttnResModel,
)
from modeling_attnres.configuration_attnres import DEPTH_ATTENTION_TYPES


PACKAGE = Path(modeling_attnres.__file__).parent
CODE = {path.name: path.read_bytes() for path in PACKAGE.glob("*_attnres.py")}
CLASSES = {
    "AutoModelForCausalLM": AttnResForCausalLM,
    "AutoModel": AttnResModel,
    "AutoModelForSequenceClassification": AttnResForSequenceClassification,
    "AutoModelForTokenClassification": AttnResForTokenClassification,
    "AutoModelForQuestionAnswering": AttnResForQuestionAnswering,
}
AUTO_MAP = {
    "AutoConfig": "configuration_attnres.AttnResConfig",
    **{auto_class: f"modeling_attnres.{model.__name__}" for auto_class, model in CLASSES.items()},
}
# A backbone with code of its own: its file, which imports the others, is the one that is named.
OF_A_BACKBONE = {"kimi_k3_text": "kimi_k3_attnres"}
# (backbone, class that is saved, auto class that loads it)
CHECKPOINTS = [("llama", name, name) for name in CLASSES]
BACKBONES = ("mixtral", "kimi_linear", "kimi_k3_text")
CHECKPOINTS += [(backbone, "AutoModelForCausalLM", "AutoModelForCausalLM") for backbone in BACKBONES]
CHECKPOINTS += [("kimi_k3_text", "AutoModel", "AutoModel")]
CHECKPOINTS += [("llama", "AutoModelForCausalLM", "AutoModel")]  # the body of a language model, by itself
VARIANTS = [kind for kind in DEPTH_ATTENTION_TYPES if kind != "softmax"]
CHECKPOINTS += [(f"llama-{kind}", "AutoModelForCausalLM", "AutoModelForCausalLM") for kind in VARIANTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All checkpoints, loaded in one process without the package, which saves each again under `-again`."""
    folder = tmp_path_factory.mktemp("remote_code")
    jobs = []
    for backbone, saved, loaded in CHECKPOINTS:
        source = folder / f"{backbone}-{saved}"
        if not source.exists():
            backbone, _, kind = backbone.partition("-")
            tiny_model(backbone, model_class=CLASSES[saved], depth_attention_type=kind or "softmax").save_pretrained(
                source
            )
        name = f"{source.name}-{loaded}"
        paths = {"again": str(folder / f"{name}-again"), "results": str(folder / f"{name}.safetensors")}
        jobs.append({"source": str(source), "auto_class": loaded, "inputs": tiny_inputs().tolist(), **paths})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run_python(LOADER, folder / "jobs.json", folder=folder, HF_HUB_OFFLINE="1")
    return folder


@torch.no_grad()
def expected_outputs(model_class, folder):
    """What the installed package makes of the checkpoint."""
    model = model_class.from_pretrained(folder).eval()
    outputs = model(tiny_inputs())
    names = ("logits", "start_logits", "end_logits", "last_hidden_state")
    expected = {name: outputs[name] for name in names if outputs.get(name) is not None}
    if model.can_generate():
        expected["generated"] = model.generate(tiny_inputs(), max_new_tokens=6, do_sample=False, eos_token_id=None)
    return expected


@pytest.mark.parametrize(("backbone", "saved", "loaded"), CHECKPOINTS)
def test_a_checkpoint_runs_by_its_own_code_bit_for_bit(folder, backbone, saved, loaded):
    expected = expected_outputs(CLASSES[loaded], folder / f"{backbone}-{saved}")
    results = load_results(folder / f"{backbone}-{saved}-{loaded}.safetensors")
    for turn in ("first", "again"):
        assert results[turn].keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(results[turn][name], value), (turn, name)
            assert value.unique().numel() > 1, name


@pytest.mark.parametrize(("backbone", "saved", "loaded"), CHECKPOINTS)
def test_a_checkpoint_carries_the_code_it_needs(folder, backbone, saved, loaded):
    module = OF_A_BACKBONE.get(backbone)
    not_needed = {f"{name}.py" for name in OF_A_BACKBONE.values() if name != module}
    code = {name: content for name, content in CODE.items() if name not in not_needed}
    auto_map = AUTO_MAP
    if module is not None:
        auto_map = {auto_class: f"{module}.{name.split('.')[-1]}" for auto_class, name in AUTO_MAP.items()}
    for checkpoint in (folder / f"{backbone}-{saved}", folder / f"{backbone}-{saved}-{loaded}-again"):
        assert {path.name: path.read_bytes() for path in checkpoint.glob("*.py")} == code
        assert json.loads((checkpoint / "config.json").read_text())["auto_map"] == auto_map


def test_no_file_imports_what_is_not_copied():
    for name, source in CODE.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, name
                assert f"{node.module}.py" in CODE, name
            elif isinstance(node, ast.ImportFrom):
                assert not node.module.startswith("modeling_attnres"), name


def test_the_package_registers_what_auto_map_names():
    assert isinstance(AutoConfig.for_model("attnres"), AttnResConfig)
    for auto_class, model_class in CLASSES.items():
        assert getattr(transformers, auto_class)._model_mapping[AttnResConfig] is model_class


def test_a_backbone_with_remote_code_of_its_own_does_not_show_through(tmp_path):
    model = tiny_model("llama", auto_map={"AutoModelForCausalLM": "elsewhere.Other"})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert "elsewhere" not in json.dumps(config)


class Variant(AttnResForCausalLM):
    """A user's own model on top of the package."""


def test_a_subclass_from_elsewhere_names_only_itself(tmp_path):
    tiny_model("llama", model_class=Variant).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_attnres.AttnResConfig",
        "AutoModelForCausalLM": f"{Path(__file__).stem}.Variant",
    }
