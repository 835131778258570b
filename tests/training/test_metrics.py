# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from transformers import TrainerControl, TrainerState

from modeling_attnres.training import JsonlMetrics, plot_metrics, read_metrics


def state_at(step: int, **kwargs) -> TrainerState:
    return TrainerState(global_step=step, is_world_process_zero=True, **kwargs)


def log(callback: JsonlMetrics, step: int, **logs):
    callback.on_log(None, state_at(step), TrainerControl(), logs=logs)


def begin(callback: JsonlMetrics, step: int):
    callback.on_train_begin(None, state_at(step), TrainerControl())


def test_records_are_appended_with_their_step(tmp_path):
    callback = JsonlMetrics(tmp_path / "run" / "metrics.jsonl")
    log(callback, 0, eval_loss=3.5)
    begin(callback, 0)
    log(callback, 1, loss=3.0, learning_rate=1e-3)
    lines = callback.path.read_text().splitlines()
    assert lines == ['{"step": 0, "eval_loss": 3.5}', '{"step": 1, "loss": 3.0, "learning_rate": 0.001}']
    assert read_metrics(callback.path) == [json.loads(line) for line in lines]
    assert [path.name for path in callback.path.parent.iterdir()] == ["metrics.jsonl"]


def test_resuming_drops_what_will_be_logged_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    callback = JsonlMetrics(path)
    for step in range(1, 6):
        log(callback, step, loss=float(step))
    callback = JsonlMetrics(path)  # a new process, from the checkpoint of step 3
    begin(callback, 3)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    log(callback, 4, loss=4.5)
    log(callback, 4, eval_loss=4.0)
    log(callback, 4, eval_loss=4.25)  # the same evaluation once more
    assert read_metrics(path)[3:] == [{"step": 4, "loss": 4.5}, {"step": 4, "eval_loss": 4.25}]
    begin(JsonlMetrics(path), 0)  # from the start
    assert read_metrics(path) == []


def test_only_the_main_process_writes(tmp_path):
    callback = JsonlMetrics(tmp_path / "metrics.jsonl")
    state = TrainerState(global_step=1, is_world_process_zero=False)
    callback.on_train_begin(None, state, TrainerControl())
    callback.on_log(None, state, TrainerControl(), logs={"loss": 1.0})
    assert not callback.path.exists()


def test_a_torn_last_line_is_cut_off_and_any_other_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    log(JsonlMetrics(path), 2, loss=0.5)
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n'
    path.write_text('{"step": 1, "lo\n{"step": 2, "loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"Line 1 of .*metrics.jsonl must be a JSON object"):
        read_metrics(path)
    path.write_text('{"loss": 1.0}\n')
    with pytest.raises(ValueError, match="with a `step`"):
        read_metrics(path)


def test_plot(tmp_path):
    for name in ("a", "b"):
        callback = JsonlMetrics(tmp_path / f"{name}.jsonl")
        for step in range(1, 4):
            log(callback, step, loss=1 / step)
        log(callback, 3, eval_loss=0.3)
    png = plot_metrics(tmp_path / "a.jsonl", tmp_path / "plots" / "a.png")
    assert png.read_bytes().startswith(b"\x89PNG")
    runs = {name: tmp_path / f"{name}.jsonl" for name in ("a", "b")}
    both = plot_metrics(runs, tmp_path / "both.png", keys=["eval_loss"])
    assert both.read_bytes() != png.read_bytes()
    with pytest.raises(ValueError, match=r"`keys` must name metrics of the records, got \['accuracy'\]"):
        plot_metrics(runs, tmp_path / "none.png", keys=["accuracy"])
    assert not (tmp_path / "none.png").exists()
