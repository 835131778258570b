# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from tiny_checkpoints import edit_json, save_backbone, save_tokenizer
from tiny_tokenizers import (
    VOCAB_SIZE,
    behaviour,
    byte_level,
    save_json,
    save_tekken,
    save_vocab_and_merges,
    sentencepiece_like,
)
from transformers import AutoTokenizer, Qwen2Tokenizer

from modeling_attnres.conversion import ConversionError, convert
from modeling_attnres.conversion.fetch import FetchedSource
from modeling_attnres.conversion.tokenizer import NONE, SAME, keep_tokenizer


LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "legacy": False}
ADDED = {"content": "NEW", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False, "special": True}
FAMILIES = {
    "sentencepiece": lambda folder: save_json(sentencepiece_like(), folder),
    "byte level": lambda folder: save_json(byte_level(), folder),
    "vocab and merges": save_vocab_and_merges,
    "tekken": save_tekken,
}
# Family, model type and tokenizer_config.json: the library picks the class by all three.
CASES = [
    ("sentencepiece", "llama", LLAMA),
    ("sentencepiece", "mistral", LLAMA),
    ("sentencepiece", "mistral", {**LLAMA, "add_eos_token": True, "added_tokens_decoder": {"600": ADDED}}),
    ("sentencepiece", "qwen2", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}),
    ("sentencepiece", "mixtral", None),
    ("byte level", "llama", LLAMA),
    ("byte level", "qwen2", {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}),
    ("byte level", "qwen3", {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "add_prefix_space": True}),
    (
        "byte level",
        "mistral",
        {"tokenizer_class": "Nonesuch", "extra_special_tokens": ["NEW"], "padding_side": "left"},
    ),
    (
        "byte level",
        "olmoe",
        {"chat_template": [{"name": "default", "template": "D"}, {"name": "rag", "template": "R"}]},
    ),
    ("vocab and merges", "qwen2", None),
    ("vocab and merges", "qwen3", {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>"}),
    ("tekken", "mistral", None),
    ("tekken", "llama", {"eos_token": "</s>", "model_max_length": 77}),
]


@pytest.mark.parametrize(("family", "model_type", "config"), CASES)
def test_what_the_source_loads_the_result_loads_and_back(tmp_path, family, model_type, config):
    source = save_backbone(tmp_path / "source", model_type, vocab_size=VOCAB_SIZE)
    FAMILIES[family](source)
    if config is not None:
        (source / "tokenizer_config.json").write_text(json.dumps(config))
    expected = behaviour(source)
    report = convert(source, tmp_path / "out", check=False)
    assert report.tokenizer == SAME
    assert behaviour(tmp_path / "out") == expected
    convert(tmp_path / "out", tmp_path / "back", to="prenorm", check=False)
    assert behaviour(tmp_path / "back") == expected
    convert(tmp_path / "out", tmp_path / "again", num_blocks=2, check=False)
    assert behaviour(tmp_path / "again") == expected


def test_class_that_follows_from_the_name_on_the_hub(tmp_path, llama):
    save_json(sentencepiece_like(), llama)
    (llama / "tokenizer_config.json").write_text(json.dumps(LLAMA))
    name = "deepseek-ai/deepseek-coder-tiny"  # the library has a list of such names
    assert type(FetchedSource(llama).load_tokenizer()).__name__ == "LlamaTokenizer"
    assert type(FetchedSource(llama, name, "0" * 40).load_tokenizer()).__name__ == "TokenizersBackend"


def test_chat_templates_in_files(tmp_path, llama):
    save_tokenizer(llama)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = {"default": "D", "tool_use": "T", "rag": "R"}
    tokenizer.save_pretrained(llama)
    convert(llama, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def test_class_named_in_the_models_config(tmp_path, llama):
    save_json(byte_level(), llama)
    edit_json(llama / "config.json", tokenizer_class="GPT2Tokenizer")
    assert behaviour(llama)["class"] == "GPT2Tokenizer"
    convert(llama, tmp_path / "out")
    assert behaviour(tmp_path / "out") == behaviour(llama)


def test_source_without_a_tokenizer(tmp_path):
    source = save_backbone(tmp_path / "source", "qwen2")  # its class builds a tokenizer from no files at all
    assert convert(source, tmp_path / "out").tokenizer == NONE
    assert not list((tmp_path / "out").glob("*token*"))


def test_a_tokenizer_with_code_comes_along_whole(tmp_path, llama, monkeypatch):
    save_tokenizer(llama)
    code = "from .shift_helper import SHIFT\nfrom transformers import PreTrainedTokenizerFast\n\n\nclass Mine(PreTrainedTokenizerFast):\n    shift = SHIFT\n"
    (llama / "tokenization_mine.py").write_text(code)
    (llama / "shift_helper.py").write_text("SHIFT = 3\n")
    auto_map = {"AutoTokenizer": ["tokenization_mine.Mine", None]}
    edit_json(llama / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Mine")
    report = convert(llama, tmp_path / "out")
    assert report.tokenizer.startswith("Came along unchecked, because the source's does not load here: ")
    assert report.tokenizer in (tmp_path / "out" / "README.md").read_text()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True).shift == 3


def test_a_class_that_would_rebuild_the_rules_gives_way_to_the_generic_one(tmp_path):
    # As when a tokenizer was built from a GGUF file: what its class makes of the saved file is another tokenizer.
    tokenizer = Qwen2Tokenizer(vocab={"a": 0, "b": 1}, merges=[])
    tokenizer.backend_tokenizer.normalizer = None
    sentence = keep_tokenizer(lambda: tokenizer, lambda: AutoTokenizer.from_pretrained(tmp_path), tmp_path)
    assert sentence == f"{SAME} The class is TokenizersBackend."
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert found.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_a_tokenizer_that_cannot_be_kept_is_an_error_that_says_where(tmp_path):
    save_tokenizer(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    other.add_tokens(["more"])
    with pytest.raises(
        ConversionError, match=r"does not load the same .*: .* is .* where .* is due; to convert without"
    ):
        keep_tokenizer(lambda: AutoTokenizer.from_pretrained(tmp_path), lambda: other, tmp_path)


def test_a_tokenizer_that_does_not_load_beside_the_result_is_an_error_with_the_reason(tmp_path):
    save_tokenizer(tmp_path)

    def fail():
        raise OSError("no such class here")

    with pytest.raises(
        ConversionError, match=r"does not load the same .*: it does not load \(no such class here\); to"
    ):
        keep_tokenizer(lambda: AutoTokenizer.from_pretrained(tmp_path), fail, tmp_path)
