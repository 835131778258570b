# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""`attnres-eval run` on a tiny checkpoint: what it writes, that scores do not depend on batching, what it refuses."""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_attnres import AttnResForCausalLM
from modeling_attnres.eval import provenance
from modeling_attnres.eval.cli import main
from modeling_attnres.eval.comparison import Model, compare_models
from modeling_attnres.eval.records import load_run
from modeling_attnres.eval.run import parse
from modeling_attnres.eval.tasks import TASKS_PATH


# Every kind of request: likelihoods of choices, of answers, of whole texts; generation.
TASKS = ("attnres_lookup_2", "attnres_cloze_python", "attnres_arithmetic", "attnres_bits_python", "attnres_stories")


def evaluate(checkpoint, batch_size, tasks=TASKS, limit=6, gen_kwargs=None):
    """Scores by task, and every sample's log-likelihoods or texts."""
    lm = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(checkpoint),
        tokenizer=AutoTokenizer.from_pretrained(checkpoint),
        batch_size=batch_size,
    )
    manager = TaskManager(include_path=str(TASKS_PATH), include_defaults=False)
    results = simple_evaluate(
        lm, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0, gen_kwargs=gen_kwargs
    )
    scores = {
        task: {key: value for key, value in row.items() if "," in key and "_stderr" not in key}
        for task, row in results["results"].items()
    }
    responses = {
        task: [np.ravel(sample["resps"]).tolist() for sample in samples]
        for task, samples in results["samples"].items()
    }
    return scores, responses


@pytest.fixture(scope="module")
def one_by_one(checkpoint):
    return evaluate(checkpoint, batch_size=1)


def test_batch_size_does_not_change_scores(checkpoint, one_by_one):
    """Eight at a time pads likelihoods on the right and generation on the left."""
    scores, responses = evaluate(checkpoint, batch_size=8)
    expected_scores, expected = one_by_one
    assert responses["attnres_stories"] == expected["attnres_stories"]
    for task in TASKS:
        assert scores[task] == pytest.approx(expected_scores[task], rel=1e-5)
    for task in TASKS[:-1]:
        found, wanted = (np.array([sample[0] for sample in side[task]], dtype=float) for side in (responses, expected))
        np.testing.assert_allclose(found, wanted, rtol=1e-5)  # float32


def test_generation_without_cache_is_the_same(checkpoint, monkeypatch):
    few = {"tasks": ("attnres_stories",), "limit": 3, "gen_kwargs": {"max_gen_toks": 16}}
    _, expected = evaluate(checkpoint, batch_size=3, **few)
    generate, caches = AttnResForCausalLM.generate, []

    def uncached(self, *args, use_cache, **kwargs):
        caches.append(use_cache)
        return generate(self, *args, use_cache=False, **kwargs)

    monkeypatch.setattr(AttnResForCausalLM, "generate", uncached)
    _, responses = evaluate(checkpoint, batch_size=3, **few)
    assert caches == [True]  # lm-eval itself asks for the cache
    assert responses == expected
    assert all(text for (text,) in responses["attnres_stories"])


@pytest.mark.usefixtures("own_tasks_only")
class TestCommand:
    def run(self, checkpoint, output, *options):
        return main(["run", str(checkpoint), "--output", str(output), "--batch_size", "4", *options])

    def test_results_samples_and_provenance(self, checkpoint, tmp_path):
        """With lm-eval's options after ours, and further tasks beside ours."""
        extra = tmp_path / "extra"
        extra.mkdir()
        (extra / "own.yaml").write_text(
            (TASKS_PATH / "offline/attnres_arithmetic.yaml").read_text().replace("task: attnres_", "task: own_")
        )
        output = tmp_path / "runs" / "tiny"
        options = ("--tasks", "attnres_lookup_1,own_arithmetic", "--limit", "3", "--include_path", str(extra))
        assert self.run(checkpoint, output, *options, "--model_args", "dtype=bfloat16") == 0
        run = load_run(output)
        assert set(run.tasks) == {"attnres_lookup_1", "own_arithmetic"}
        assert len(run.samples("own_arithmetic")) == 3
        assert run.results["config"]["model_dtype"] == "torch.bfloat16"
        assert run.provenance["model_hash"] == provenance.model_hash(checkpoint)
        assert run.provenance["versions"]["lm-eval"] == run.results["lm_eval_version"]
        assert [path.name for path in output.parent.iterdir()] == ["tiny"]  # no left-overs
        assert all(path.is_file() for path in output.iterdir())

    def test_run_and_compare(self, checkpoint, tmp_path):
        """A model compared with itself: no difference in any figure."""
        options = ("--tasks", "attnres_lookup_1,attnres_bits_python", "--limit", "4")
        folders = [tmp_path / name for name in "ab"]
        for folder in folders:
            assert self.run(checkpoint, folder, *options) == 0
        models = [Model(folder.name, [load_run(folder)]) for folder in folders]
        for row in compare_models(models, resamples=99).rows["b"]:
            assert (row.difference.value, row.difference.p_value) == (0, 1)

    def test_a_model_that_counts_to_nan(self, checkpoint, tmp_path, capsys):
        """Its accuracies look like numbers; the comparison ends in one sentence instead of a difference."""
        broken = AutoModelForCausalLM.from_pretrained(checkpoint)
        broken.lm_head.weight.data[5] = float("nan")
        broken.save_pretrained(tmp_path / "broken")
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "broken")
        for model, name in ((checkpoint, "good"), (tmp_path / "broken", "nan")):
            assert self.run(model, tmp_path / name, "--tasks", "attnres_lookup_1", "--limit", "4") == 0
        capsys.readouterr()
        for sides in (("good", "nan"), ("nan", "good")):
            assert main(["compare", *(str(tmp_path / side) for side in sides)]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert f"{tmp_path / 'nan'}: task attnres_lookup_1, item 0: the log-likelihood of an answer is nan" in line

    def test_another_longest_input(self, checkpoint, tmp_path, capsys):
        options = ("--tasks", "attnres_bits_python", "--limit", "2")
        assert self.run(checkpoint, tmp_path / "full", *options) == 0
        assert self.run(checkpoint, tmp_path / "short", *options, "--model_args", "max_length=16") == 0
        capsys.readouterr()
        assert main(["compare", str(tmp_path / "full"), str(tmp_path / "short")]) == 2
        error = capsys.readouterr().err
        assert f"model argument max_length: {tmp_path / 'full'} has None, {tmp_path / 'short'} has 16" in error
        assert "has 1024, " in error  # what it came to

    def test_a_second_model_among_the_arguments(self, checkpoint, tmp_path, capsys):
        options = ("--tasks", "attnres_lookup_1", "--model_args", "pretrained=elsewhere")
        assert self.run(checkpoint, tmp_path / "out", *options) == 2
        assert f"be the model given first, {checkpoint}; got elsewhere" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_unknown_task(self, checkpoint, tmp_path, capsys):
        assert self.run(checkpoint, tmp_path / "out", "--tasks", "no_such_task") == 2
        assert "Tasks not found: no_such_task" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--nonsense", "3"), "lm-eval does not understand its options: unrecognized arguments: --nonsense 3"),
            (("--gen_kwargs", "junk"), "argument --gen_kwargs: expected `key=value`, got 'junk'"),
            (("--batch_size", "0"), "--batch_size must be auto, auto:N or a whole number of at least 1, got 0"),
            (("--batch_size", "few"), "--batch_size must be auto, auto:N or a whole number of at least 1, got few"),
            (("--limit", "-1"), "--limit must be above 0, got -1.0"),
            (("--num_fewshot", "-1"), "--num_fewshot must be at least 0, got -1"),
            (("--device", "cuda:99"), "--device must be a device of this machine, got 'cuda:99' ("),
            (("--model_args", "unheard_of=1"), "lm-eval ended with TypeError: "),
            (("--config", "nowhere.yaml"), "Config file not found: "),
        ],
    )
    def test_requests_that_lm_eval_cannot_carry_out(self, checkpoint, tmp_path, capsys, options, message):
        assert self.run(checkpoint, tmp_path / "new" / "out", "--tasks", "attnres_lookup_1", *options) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("attnres-eval: error: ")
        assert message in line
        assert not list(tmp_path.iterdir())

    def test_weights_that_are_missing(self, checkpoint, tmp_path, capsys):
        """lm-eval would evaluate the random ones that the library puts in their place."""
        broken = AutoModelForCausalLM.from_pretrained(checkpoint)
        state = broken.state_dict()
        name = next(name for name in state if name.endswith("up_proj.weight"))
        broken.save_pretrained(tmp_path / "broken", state_dict={key: state[key] for key in state if key != name})
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "broken")
        assert self.run(tmp_path / "broken", tmp_path / "out", "--tasks", "attnres_lookup_1", "--limit", "1") == 2
        assert f"lacks 1: {name}" in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "out").exists()

    def test_results_as_json_in_another_dtype(self, checkpoint, tmp_path, capsys):
        options = ("--tasks", "attnres_lookup_1", "--limit", "1", "--dtype", "bf16", "--json")
        assert self.run(checkpoint, tmp_path / "out", *options) == 0
        run = load_run(tmp_path / "out")
        assert json.loads(capsys.readouterr().out) == run.results["results"]
        assert run.results["config"]["model_dtype"] == "torch.bfloat16"

    def test_no_task(self, checkpoint, tmp_path, capsys):
        assert self.run(checkpoint, tmp_path / "out") == 2
        assert "No tasks specified" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_generated_code_needs_consent(self, checkpoint, tmp_path, capsys):
        assert self.run(checkpoint, tmp_path / "out", "--tasks", "attnres_humaneval", "--limit", "1") == 2
        assert "attnres_humaneval which is marked as unsafe" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_generated_code_with_consent(self, checkpoint, tmp_path):
        options = ("--tasks", "attnres_humaneval", "--limit", "1", "--confirm_run_unsafe_code")
        assert self.run(checkpoint, tmp_path / "out", *options, "--gen_kwargs", "max_gen_toks=8") == 0
        items = load_run(tmp_path / "out").items("attnres_humaneval", "pass@1", "none")
        assert items.values.tolist() == [0.0]

    def test_generated_code_where_it_cannot_be_confined(self, checkpoint, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(platform, "machine", lambda: "riscv64")
        options = ("--tasks", "attnres_humaneval", "--limit", "1", "--confirm_run_unsafe_code")
        assert self.run(checkpoint, tmp_path / "out", *options) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("attnres-eval: error: generated code runs only where it can be confined: Linux on ")
        assert not list(tmp_path.iterdir())

    def test_samples_that_lm_eval_could_not_save(self, checkpoint, tmp_path, monkeypatch, capsys):
        """lm-eval logs the failure and ends as if all were well."""
        monkeypatch.setattr("lm_eval.loggers.EvaluationTracker.save_results_samples", lambda *_, **__: None)
        assert self.run(checkpoint, tmp_path / "out", "--tasks", "attnres_lookup_1", "--limit", "1") == 2
        assert "did not write the samples of task attnres_lookup_1" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


def test_include_path_of_a_config_file_is_kept(tmp_path):
    (tmp_path / "run.yaml").write_text("tasks: [attnres_lookup_1]\ninclude_path: from_file\n")
    config = ["--config", str(tmp_path / "run.yaml")]
    assert parse(config).include_path == [str(TASKS_PATH), "from_file"]
    assert parse([*config, "--include_path", "given"]).include_path == [str(TASKS_PATH), "given"]
    assert parse(["--tasks", "attnres_lookup_1"]).include_path == [str(TASKS_PATH)]


def test_output_must_be_new(checkpoint, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["run", str(checkpoint), "--output", str(tmp_path), "--tasks", "attnres_lookup_1"]) == 2
    assert "new or empty folder" in capsys.readouterr().err
    arguments = ["run", str(checkpoint), "--output", str(tmp_path / "out"), "--output_path", "elsewhere"]
    assert main(arguments) == 2
    assert "give the folder for results as --output" in capsys.readouterr().err


def test_model_hash_is_of_contents_and_names(checkpoint, tmp_path):
    first = provenance.model_hash(checkpoint)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in checkpoint.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "README.md").write_text("a card does not change the model")
    assert provenance.model_hash(copy) == first
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "depth_norm_eps": 0.5}))
    assert provenance.model_hash(copy) != first


def write_files(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)
    return folder


def test_model_hash_tells_files_of_swapped_names_apart(tmp_path):
    """The same bytes in another file are another model: weights of shards, say, or of two configs."""
    first = write_files(tmp_path / "first", a="one", b="two")
    swapped = write_files(tmp_path / "swapped", a="two", b="one")
    renamed = write_files(tmp_path / "renamed", a="one", c="two")
    hashes = [provenance.model_hash(folder) for folder in (first, swapped, renamed)]
    assert len(set(hashes)) == 3


def test_model_hash_counts_adapters_in_their_order(tmp_path):
    model, one, two = (write_files(tmp_path / name, config=name) for name in ("model", "one", "two"))
    combinations = [(model,), (model, one), (model, two), (model, one, two), (model, two, one), (one, model)]
    assert len({provenance.model_hash(*folders) for folders in combinations}) == len(combinations)


def test_model_hash_of_an_adapters_folder_counts_its_base(tmp_path):
    base = write_files(tmp_path / "base", config="one")
    settings = json.dumps({"base_model_name_or_path": str(base)})
    adapter = write_files(tmp_path / "adapter", adapter_config=settings, config="as lm-eval wants one too")
    first = provenance.model_hash(adapter)
    (base / "config.json").write_text("another")
    assert provenance.model_hash(adapter) != first


def test_provenance_hashes_model_and_adapter_together(tmp_path):
    model, adapter = write_files(tmp_path / "model", config="m"), write_files(tmp_path / "adapter", weights="w")

    def record(**arguments) -> dict:
        provenance.write(tmp_path, {"pretrained": str(model), **arguments}, ["command"], 1.0, 1.0)
        return json.loads((tmp_path / provenance.FILE_NAME).read_text())

    assert record()["model_hash"] == provenance.model_hash(model)
    found = record(peft=str(adapter))
    assert (found["model"], found["peft"]) == (str(model), str(adapter))
    assert found["model_hash"] == provenance.model_hash(model, adapter)
    assert record(peft="name/on-the-hub")["model_hash"] is None  # only half of it could be hashed
    assert record(subfolder="../adapter")["model_hash"] == provenance.model_hash(adapter)


def offline(tmp_path) -> dict[str, str]:
    """The environment of a machine that has no Hub and has never had one."""
    (tmp_path / "home").mkdir()
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
        # Any connection that is tried anyway goes nowhere.
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "ALL_PROXY": "http://127.0.0.1:9",
    }


@pytest.mark.slow
def test_whole_offline_group_without_hub_or_cache(checkpoint, tmp_path):
    """In a process of its own, with lm-eval's own tasks indexed too."""
    command = [
        str(Path(sys.executable).with_name("attnres-eval")),
        "run",
        str(checkpoint),
        "--tasks",
        "attnres_offline",
    ]
    command += ["--output", str(tmp_path / "run"), "--limit", "2", "--batch_size", "8"]
    subprocess.run(command, env=offline(tmp_path), check=True, capture_output=True)
    run = load_run(tmp_path / "run")
    assert len(run.tasks) == 11
    assert all(len(run.samples(task)) == 2 for task in run.tasks)


@pytest.mark.usefixtures("own_tasks_only")
def test_stock_lm_eval_with_remote_code(checkpoint, tmp_path):
    """The README's command. `lm_eval` alone knows neither architecture nor tasks: the checkpoint brings the one,
    --include_path the other. Its run is compared with one of `attnres-eval`."""
    readme = (Path(__file__).parents[2] / "eval" / "README.md").read_text("utf-8")
    (line,) = re.findall(r"^lm_eval (run .+)$", readme, re.MULTILINE)
    line, places = re.subn(r'\$\(python -c "[^"]+ import TASKS_PATH; print\(TASKS_PATH\)"\)', str(TASKS_PATH), line)
    assert places == 1
    for name, value in (("path/to/model", checkpoint), ("attnres_offline", "attnres_lookup_1"), ("runs", tmp_path)):
        assert line.count(name) == 1
        line = line.replace(name, str(value))
    # `python -m lm_eval` is the script `lm_eval`, wherever that was installed.
    command = [sys.executable, "-m", "lm_eval", *shlex.split(line), "--limit", "2"]
    subprocess.run(command, env=offline(tmp_path), cwd=tmp_path, check=True, capture_output=True)
    stock = load_run(tmp_path / "stock")
    _, expected = evaluate(checkpoint, batch_size=1, tasks=("attnres_lookup_1",), limit=2)
    for sample, wanted in zip(stock.samples("attnres_lookup_1"), expected["attnres_lookup_1"], strict=True):
        found = [response[0][0] for response in sample["resps"]]
        np.testing.assert_allclose(np.array(found, dtype=float), np.array(wanted[::2], dtype=float), rtol=1e-5)
    TestCommand().run(checkpoint, tmp_path / "ours", "--tasks", "attnres_lookup_1", "--limit", "2")
    models = [Model("stock", [stock]), Model("ours", [load_run(tmp_path / "ours")])]
    (row,) = compare_models(models, resamples=99).rows["ours"]
    assert (row.difference.value, row.gold_difference.value) == (0, 0)
