# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from datasets import Dataset
from tiny_backbones import tiny_backbone, tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from modeling_attnres.eval.depth_weights import mean_depth_weights
from modeling_attnres.eval.dynamics import measure_dynamics
from modeling_attnres.training import DepthDynamics


def train(model, folder, *callbacks, steps=4, resume=None):
    rows = tiny_inputs(batch=16).tolist()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=3,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
    trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return model


def records(folder):
    return [json.loads(line) for line in (folder / "dynamics.jsonl").read_text().splitlines()]


def test_training_is_followed_and_not_disturbed(tmp_path):
    plain = train(tiny_model("llama", 2, query_std=0.0), tmp_path / "plain")
    folder = tmp_path / "dynamics"
    watched = tiny_model("llama", 2, query_std=0.0)
    at_start = measure_dynamics(watched, tiny_inputs(seed=7))
    train(watched, tmp_path / "watched", DepthDynamics(tiny_inputs(seed=7), folder, every=2))
    for (name, expected), found in zip(plain.named_parameters(), watched.parameters()):
        assert torch.equal(found, expected), name

    found = records(folder)
    assert [record["step"] for record in found] == [0, 2, 4]
    assert found[0]["gradient_norm"] == pytest.approx(at_start.gradient_norm, rel=1e-5)
    at_end = measure_dynamics(watched, tiny_inputs(seed=7))
    assert found[-1]["output_magnitude"] == pytest.approx(at_end.output_magnitude, rel=1e-5)
    matrix = mean_depth_weights(watched, tiny_inputs(seed=7))
    row = [value for value in found[-1]["depth_weights"][-1] if value is not None]
    assert row == pytest.approx(matrix[-1].tolist(), rel=1e-5)
    assert found[0]["depth_weights"][0] == [1.0, None, None, None, None]
    assert {path.name for path in folder.iterdir()} >= {"dynamics.png", "depth_weights.png", "dynamics.csv"}


def test_resuming_measures_no_step_twice(tmp_path):
    train(tiny_model("llama", 2), tmp_path, DepthDynamics(tiny_inputs(), tmp_path / "d", every=2))
    # From the checkpoint of step 3: what was measured at step 4 is measured again.
    train(
        tiny_model("llama", 2),
        tmp_path,
        DepthDynamics(tiny_inputs(), tmp_path / "d", every=2),
        steps=6,
        resume=str(tmp_path / "checkpoint-3"),
    )
    assert [record["step"] for record in records(tmp_path / "d")] == [0, 2, 4, 6]


def test_a_prenorm_model_is_followed_without_depth_weights(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_backbone("llama"))
    train(model, tmp_path, DepthDynamics(tiny_inputs(), tmp_path / "d", every=4))
    assert [sorted(record) for record in records(tmp_path / "d")] == [
        ["gradient_norm", "gradient_variation", "magnitude_ratio", "output_magnitude", "step"]
    ] * 2
    assert not (tmp_path / "d" / "depth_weights.png").exists()


def test_a_period_of_no_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`every` must be at least 1, got 0"):
        DepthDynamics(tiny_inputs(), tmp_path, every=0)
