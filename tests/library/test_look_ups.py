# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Others look a model up by its type, class, source, fields and attributes: the table is whole, and the answers are right."""

import copy
import functools
import logging
import re
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate.utils import MegatronLMPlugin, fsdp_utils
from accelerate.utils.dataclasses import get_module_class_from_name
from lm_eval.models.huggingface import HFLM
from look_ups import ANSWERS, PAGE, read_rows, render
from peft import AdaptionPromptConfig, LoraConfig, get_peft_model
from peft.utils import constants
from scan import LEFT_OUT, LookUp, scan
from test_third_parties import converted, plain_model
from tiny_backbones import tiny_inputs
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modelcard import TASK_MAPPING, _get_mapping_values
from transformers.pipelines.base import Pipeline
from transformers.utils import logging as library_logging
from trl.trainer.utils import create_model_from_path

from modeling_attnres import AttnResConfig, AttnResForCausalLM, supported_backbones
from modeling_attnres.modeling_attnres import AUTO_CLASSES


BACKBONES = ("llama", "qwen3_moe", "deepseek_v3", "gpt_oss")
MISSING = object()
found = functools.cache(scan)


@functools.cache
def pair(model_type: str) -> tuple[PreTrainedModel, AttnResForCausalLM]:
    """A plain model and its AttnRes model. Not to be changed."""
    plain = plain_model(model_type)
    return plain, converted(plain)


# --- The table -------------------------------------------------------------------------------------------------------


def other_versions() -> list[str]:
    """The libraries that are not the pinned ones, with both versions."""
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text(encoding="utf-8")
    pinned = {library: re.search(rf"^{library}==(\S+)$", pins, re.MULTILINE)[1] for library in LEFT_OUT}
    return [f"{name} {version(name)} (pinned: {pin})" for name, pin in pinned.items() if version(name) != pin]


def test_the_table_has_every_look_up_and_no_other():
    if others := other_versions():
        pytest.skip(f"The table is that of the pinned versions: {', '.join(others)}.")
    listed = [row.look_up for row in read_rows()]
    assert len(listed) == len(set(listed))
    new, gone = found().look_ups - set(listed), set(listed) - found().look_ups
    assert not new, f"Look-ups that are new, to be judged and entered: {sorted(new)}"
    assert not gone, f"Look-ups that are gone: {sorted(gone)}"


def test_every_look_up_has_an_answer():
    for row in read_rows():
        assert row.decides, row
        assert row.kind in ANSWERS, row
        assert row.answer.partition(": ")[2], row


def test_the_page_shows_the_table():
    assert PAGE.read_text(encoding="utf-8") == render(read_rows())


def test_the_search_finds_look_ups(tmp_path, monkeypatch):
    """Each kind, in code that no library has."""
    package = tmp_path / "invented"
    package.mkdir()
    (package / "__init__.py").write_text(
        "TABLE = {'llama': 1, 'qwen3': 2}\n"
        "def by_type(model): return model.config.model_type == 'llama'\n"
        "def by_key(config): return config.get('model_type')\n"
        "def by_name(model): return model.__class__.__name__ in NAMES\n"
        "def by_torch(model): return model._get_name()\n"
        "def by_beginning(cls): return cls.__name__.startswith('Llama')\n"
        "def by_source(cls): return inspect.getsource(cls)\n"
        "def by_class():\n    from transformers.models.llama.modeling_llama import LlamaModel\n"
        "def by_auto(name): return name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()\n"
        "class Outer:\n    def inner(self, model): return model.config.architectures[0]\n"
        "def message(model): raise ValueError(f'{model.__class__.__name__}')\n"
        "def fields(config, model): return getattr(config, 'rope', None), model.lm_head\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("scan.LEFT_OUT", {"invented": ()})
    findings = scan()
    kinds = {(look_up.symbol, look_up.by) for look_up in findings.look_ups}
    assert kinds == {
        ("TABLE", "table"),
        ("by_type", "model_type"),
        ("by_key", "model_type"),
        ("by_name", "class name"),
        ("by_torch", "class name"),
        ("by_beginning", "class name"),
        ("by_source", "source"),
        ("by_class", "class"),
        ("by_auto", "table"),
        ("Outer.inner", "architectures"),
    }
    assert findings.fields == {"get", "model_type", "rope", "architectures"}
    assert findings.attributes == {"config", "lm_head", "_get_name"}


# --- Fields and attributes -------------------------------------------------------------------------------------------

# What is our own, by intention.
OWN_FIELDS = {
    "_auto_class": "the code goes with a checkpoint",
    "model_type": "the class is registered under it",
    "architectures": "names the class in a file; `text_config.architectures` is the backbone's",
    "base_model_pp_plan": "the library's plan hands one tensor from stage to stage",
    "text_config": "the backbone's fields as its own config",
}
OWN_ATTRIBUTES = {
    "_auto_class": "the code goes with a checkpoint",
    "_can_record_outputs": "hidden states are collected by the loop, not by hooks",
    "can_record_outputs": "as `_can_record_outputs`",
    "config_class": "`AttnResConfig`",
    "_checkpoint_conversion_mapping": "names of earlier versions",
    "_no_split_modules": "the class of the layers",
    "_skip_keys_device_placement": "the bank of block summaries is one more",
    "_pp_plan": "as `base_model_pp_plan`",
    "pp_plan": "as `base_model_pp_plan`",
    "supports_pp_plan": "as `base_model_pp_plan`",
}


def value_of(owner, name: str):
    try:
        return getattr(owner, name, MISSING)
    except Exception as error:  # a property that a tiny model cannot answer
        return type(error)


def is_plain_data(value) -> bool:
    if isinstance(value, dict):
        return all(is_plain_data(part) for item in value.items() for part in item)
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(is_plain_data, value))
    return value is None or isinstance(value, bool | int | float | str | type | torch.dtype | torch.device)


def differences(plain, ours, names: set[str]) -> dict:
    result = {}
    for name in sorted(names):
        theirs, own = value_of(plain, name), value_of(ours, name)
        if theirs is MISSING or own is MISSING:
            different = theirs is not own
        else:
            different = (is_plain_data(theirs) or is_plain_data(own)) and theirs != own
        if different:
            result[name] = theirs, own
    return result


def public_names(owner: type) -> set[str]:
    return {name for name in dir(owner) if not name.startswith("__")}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # old names are read too
@pytest.mark.parametrize("model_type", BACKBONES)
def test_whatever_is_read_off_a_config_is_the_plain_configs(model_type):
    plain, ours = (model.config for model in pair(model_type))
    names = found().fields | public_names(PreTrainedConfig) | set(vars(plain))
    assert len(names) > 400
    assert differences(plain, ours, names).keys() <= OWN_FIELDS.keys()
    assert {"vocab_size", "rope_parameters", "tie_word_embeddings", "num_hidden_layers"} <= names


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("model_type", BACKBONES)
def test_whatever_is_read_off_a_model_is_the_plain_models(model_type):
    plain, ours = pair(model_type)
    names = found().attributes | public_names(PreTrainedModel)
    for theirs, own in ((plain, ours), (plain.model, ours.model), (type(plain), type(ours))):
        assert differences(theirs, own, names).keys() <= OWN_ATTRIBUTES.keys()
    assert {"_no_split_modules", "supports_gradient_checkpointing", "lm_head", "layers"} <= names


# The size of Moshi's other vocabulary, which it takes from its audio codec; the number of Phi-3's code, for no file.
OF_ONE_BACKBONE = {"moshi": {"audio_vocab_size"}, "phi3": {"_version"}}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_whatever_is_read_off_any_supported_backbone():
    result = {}
    for model_type in supported_backbones():
        config = CONFIG_MAPPING[model_type]()
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(copy.deepcopy(config))
            ours = AttnResForCausalLM(AttnResConfig(text_config=config, sublayers_per_block=1))
        names = found().attributes | public_names(PreTrainedModel)
        different = differences(plain.config, ours.config, found().fields | set(vars(plain.config))).keys()
        for theirs, own in ((plain, ours), (plain.model, ours.model), (type(plain), type(ours))):
            different |= differences(theirs, own, names).keys()
        different -= {*OWN_FIELDS, *OWN_ATTRIBUTES, *OF_ONE_BACKBONE.get(model_type, ())}
        if different:
            result[model_type] = different
    assert result == {}


def test_a_heads_coefficient_acts_as_on_the_plain_model():
    losses = []
    for model in (plain := plain_model("qwen3_moe"), converted(plain)):
        assert (model.vocab_size, model.num_experts, model.num_experts_per_tok) == (96, 4, 2)
        model.router_aux_loss_coef = 2.0
        losses.append(model(tiny_inputs(), labels=tiny_inputs(), output_router_logits=True).loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize("model_type", ["llama", "kimi_linear"])
def test_embeddings_are_tied_where_the_plain_models_are(model_type):
    """Kimi Linear's never are, whatever its config says."""
    tied = []
    for model in (plain := plain_model(model_type, tie_word_embeddings=True), converted(plain)):
        tied.append(model.lm_head.weight is model.model.embed_tokens.weight)
    assert tied == [model_type == "llama"] * 2


def test_classes_inside_a_model_are_its_own():
    _, ours = pair("llama")
    (name,) = ours._no_split_modules
    assert {type(layer) for layer in ours.model.layers} == {get_module_class_from_name(ours, name)}


# --- Answers ---------------------------------------------------------------------------------------------------------


def is_unknown_to_the_pipeline(model, task: str, auto_class: type) -> bool:
    """Whether a pipeline says, in the log, that it does not know the model."""
    said = []
    handler = logging.Handler()
    handler.emit = said.append
    logger = library_logging.get_logger("transformers.pipelines.base")
    logger.addHandler(handler)
    verbosity = library_logging.get_verbosity()
    library_logging.set_verbosity_error()
    try:
        pipeline = SimpleNamespace(task=task, model=model)
        Pipeline.check_model_type(pipeline, auto_class._model_mapping._model_mapping)
    finally:
        library_logging.set_verbosity(verbosity)
        logger.removeHandler(handler)
    return bool(said)


@pytest.mark.parametrize(
    ("task", "head"),
    [
        ("text-generation", "ForCausalLM"),
        ("text-classification", "ForSequenceClassification"),
        ("token-classification", "ForTokenClassification"),
    ],
)
def test_pipelines_and_model_cards_know_the_heads(task, head):
    (auto_class,) = (auto for auto in AUTO_CLASSES if auto.__name__.endswith(head))
    plain, ours = pair("llama")
    heads = [auto_class.from_config(copy.deepcopy(model.config)) for model in (plain, ours)]
    assert [is_unknown_to_the_pipeline(model, task, auto_class) for model in heads] == [False, False]
    assert is_unknown_to_the_pipeline(plain.model, task, auto_class)
    for model in heads:
        name = type(model).__name__
        assert [card for card, table in TASK_MAPPING.items() if name in _get_mapping_values(table)] == [task]


@pytest.mark.parametrize("model_type", BACKBONES)
def test_lm_eval_takes_it_for_a_causal_model(model_type):
    backends = []
    for model in pair(model_type):
        asked = SimpleNamespace(backend=None, AUTO_MODEL_CLASS=None)
        HFLM._get_backend(asked, model.config, backend="default", trust_remote_code=False)
        backends.append(asked.backend)
    assert backends == ["causal", "causal"]


@pytest.mark.parametrize("model_type", BACKBONES)
def test_the_last_norm_is_found(model_type):
    plain, ours = pair(model_type)
    assert fsdp_utils._find_final_norm(plain) is plain.model.norm
    assert fsdp_utils._find_final_norm(ours) is ours.model.norm


def test_default_adapters_go_to_the_same_modules():
    plain, ours = pair("llama")
    tables = [
        table for name, table in vars(constants).items() if name.endswith("_MODULES_MAPPING") and "llama" in table
    ]
    assert tables
    for table in tables:
        hit = [
            {name for name, _ in model.named_modules() if name.split(".")[-1] in table[model.config.model_type]}
            for model in (plain, ours)
        ]
        assert hit[0] == hit[1]


def test_trl_loads_a_path(tmp_path):
    pair("llama")[1].save_pretrained(tmp_path)
    assert isinstance(create_model_from_path(str(tmp_path), device_map=None), AttnResForCausalLM)


# --- Refusals and differences ----------------------------------------------------------------------------------------


def test_megatron_refuses():
    _, ours = pair("llama")
    with pytest.raises(ValueError, match="not supports attnres model"):
        MegatronLMPlugin.set_network_size_args(SimpleNamespace(), ours)


def test_adaption_prompts_refuse():
    with pytest.raises(ValueError, match="Unsupported model type for adaption prompt: 'attnres'"):
        get_peft_model(converted(plain_model()), AdaptionPromptConfig(adapter_len=4, adapter_layers=2))


def test_experts_are_adapted_by_their_parameters():
    """Where PEFT translates the names of single experts by `model_type`: name the merged parameters instead."""
    source = plain_model("qwen3_moe", mlp_only_layers=[])
    model = converted(source)
    names = []
    for one, targets in (
        (source, {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}),
        (model, {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}),
    ):
        adapted = get_peft_model(one, LoraConfig(task_type="CAUSAL_LM", r=4, **targets))
        names.append({name for name in adapted.state_dict() if "lora_A" in name})
        adapted(input_ids=tiny_inputs())
    assert names[0] == names[1]
    assert sum("experts" in name for name in names[1]) == 8


def test_the_library_has_no_class_of_our_name():
    """Why `transformers serve` cannot load the model, and why others go on to the auto classes."""
    assert not hasattr(transformers, "AttnResForCausalLM")
    assert LookUp("transformers.cli.serving.model_manager", "ModelManager._load_model", "architectures") in {
        row.look_up for row in read_rows() if row.kind == "refused"
    }
