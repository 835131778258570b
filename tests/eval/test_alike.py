# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Runs that were asked differently are refused by name; runs of other models, devices and batch sizes are not."""

import pytest
from synthetic_runs import multiple_choice, write_run

from modeling_attnres.eval.cli import main


A, B = [1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]
SEEDS = {f"{name}_seed": 1234 for name in ("random", "numpy", "torch", "fewshot")}


@pytest.fixture
def compare(tmp_path, capsys):
    """Writes two runs, compares them, and returns the exit code and what was printed as an error."""

    def run(first: dict, second: dict) -> tuple[int, str]:
        folders = []
        for name, correct, changes in (("first", A, first), ("second", B, second)):
            folder = tmp_path / name
            write_run(folder, {"mc": multiple_choice("mc", correct)}, **changes)
            folders.append(str(folder))
        code = main(["compare", *folders])
        return code, capsys.readouterr().err

    return run


def config(model_args=None, **entries) -> dict:
    return {"config": {"model": "hf", "model_args": model_args, "model_dtype": "torch.float32", **SEEDS, **entries}}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_length", 8),
        ("add_bos_token", True),
        ("add_bos_token", False),  # not the same as the tokenizer's own default
        ("dtype", "bfloat16"),
        ("softmax_dtype", "float32"),
        ("peft", "path/to/adapter"),
        ("delta", "path/to/delta"),
        ("prefix_token_id", 0),
        ("revision", "v2"),
        ("subfolder", "last"),
        ("backend", "seq2seq"),
        ("tokenizer", "another/tokenizer"),
        ("truncation", True),
        ("use_fast_tokenizer", False),
        ("gguf_file", "model.gguf"),
        ("load_in_4bit", True),
        ("attn_implementation", "eager"),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("argument_of_a_later_version", 1),
    ],
)
def test_an_argument_that_may_change_scores(compare, name, value):
    code, error = compare(config({"pretrained": "a"}), config({"pretrained": "b", name: value}))
    assert code == 2
    assert f"model argument {name}: " in error
    assert "first has None, " in error
    assert f"second has {value}\n" in error
    assert "only the model (pretrained," in error
    assert "Traceback" not in error


def test_two_values_of_one_argument(compare):
    code, error = compare(
        config({"pretrained": "a", "max_length": 512, "dtype": "float32"}),
        config({"pretrained": "a", "max_length": 1024, "dtype": "float32"}),
    )
    assert code == 2
    assert "model argument max_length: " in error
    assert "first has 512, " in error
    assert "second has 1024" in error
    assert "dtype" not in error


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"pretrained": "a"}, {"pretrained": "b"}),
        ({"pretrained": "a"}, {"pretrained": "b", "trust_remote_code": True}),
        ({"pretrained": "a", "batch_size": 1}, {"pretrained": "b", "batch_size": 64, "device": "cuda:0"}),
        ({"pretrained": "a"}, {"pretrained": "b", "parallelize": True, "max_memory_per_gpu": "10GiB"}),
        ({"pretrained": "a", "max_length": 512}, "pretrained=b,max_length=512"),  # lm-eval called from Python
        ({"pretrained": "a", "dtype": "torch.float32"}, {"pretrained": "b", "dtype": "float32"}),
        ({"pretrained": "a", "peft": None}, {"pretrained": "b"}),
        ({"pretrained": "a", "max_length": 512}, {"pretrained": "b", "max_length": 512.0}),
    ],
)
def test_another_model_elsewhere_in_other_portions(compare, first, second):
    code, error = compare(
        config(first, model_sha="1", model_num_parameters=5, batch_size="1", batch_sizes=[1], device="cpu"),
        config(second, model_sha="2", model_num_parameters=6, batch_size="auto", batch_sizes=[64], device="cuda:0"),
    )
    assert (code, error) == (0, "")


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (config(), config(model_dtype="torch.bfloat16"), "model_dtype: {} has torch.float32, {} has torch.bfloat16"),
        (config(), config(model="vllm"), "backend (--model): {} has hf, {} has vllm"),
        (config(), config(torch_seed=1), "torch_seed: {} has 1234, {} has 1"),
        (config(), config(entry_of_a_later_version="x"), "entry_of_a_later_version: {} has None, {} has x"),
        ({"max_length": 256}, {"max_length": 2048}, "--model_args max_length): {} has 256, {} has 2048"),
    ],
)
def test_what_lm_eval_records_besides(compare, tmp_path, first, second, message):
    code, error = compare(first, second)
    assert code == 2
    assert message.format(tmp_path / "first", tmp_path / "second") in error


def test_backends_of_one_class_are_one(compare):
    assert compare(config(), config(model="huggingface"))[0] == 0


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("filter_list", [{"name": "none", "filter": [{"function": "regex"}]}]),
        ("process_results", "def other(doc, results): ..."),
        ("output_type", "generate_until"),
        ("generation_kwargs", {"max_gen_toks": 8}),
    ],
)
def test_a_task_scored_otherwise_under_the_same_version(compare, entry, value):
    plain = {"task_alias": "MC", "metric_list": [{"metric": "acc", "aggregation": "mean"}]}
    code, error = compare({"configs": {"mc": plain}}, {"configs": {"mc": {**plain, entry: value}}})
    assert code == 2
    assert " of mc: " in error
    assert f"second has {value}" in error


def test_a_task_that_lies_and_is_called_otherwise(compare):
    """The prompts' hash is compared; a task's metadata repeats the model's path."""
    metrics = {"metric_list": [{"metric": "acc", "aggregation": "mean"}]}
    sides = [
        {"configs": {"mc": {"task_alias": name, "dataset_path": name, "metadata": {"pretrained": name}, **metrics}}}
        for name in "ab"
    ]
    assert compare(*sides) == (0, "")


def test_two_models_answers_from_one_cache(compare):
    cached = [config({"pretrained": name}, use_cache="cache/answers") for name in "ab"]
    code, error = compare(*cached)
    assert code == 2
    assert "use_cache: " in error
    assert "both have cache/answers" in error


def test_caches_of_their_own(compare):
    assert compare(*[config({"pretrained": name}, use_cache=f"cache/{name}") for name in "ab"])[0] == 0
