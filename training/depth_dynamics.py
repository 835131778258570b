# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The pictures of `attnres-inspect`, followed during training."""

import json
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modeling_attnres.eval.depth_weights import save_depth_heatmap
from modeling_attnres.eval.dynamics import save_dynamics
from modeling_attnres.eval.inspect_model import inspect_model


class DepthDynamics(TrainerCallback):
    """Measures depth weights, output magnitudes and gradient norms on a fixed batch while a model trains.

    Every `every` steps (and at step 0) one line is appended to `dynamics.jsonl`: `step`, `output_magnitude` and
    `gradient_norm` per decoder layer, `magnitude_ratio`, `gradient_variation`, and for an AttnRes model
    `depth_weights` `[L + 1][N + 1]` (`null` where a source does not exist yet). At the end the last measurement is
    drawn as `attnres-inspect` does. Training is not disturbed: no gradient, mode or random number changes.

    Args:
        input_ids: `[B, T]`, the batch to measure on.
        folder: where to write.
        every: optimizer steps between measurements.

    Raises:
        ValueError: if `every` is not positive; at the first measurement, if the parameters are sharded (FSDP).
    """

    def __init__(self, input_ids: torch.Tensor, folder: str | Path, every: int = 100):
        if every < 1:
            raise ValueError(f"`every` must be at least 1, got {every}.")
        self.input_ids, self.folder, self.every = input_ids, Path(folder), every

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ):
        path = self.folder / "dynamics.jsonl"
        if state.is_world_process_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            # A resumed run repeats the steps after its checkpoint, so drop their measurements.
            kept = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            kept = [line for line in kept if json.loads(line)["step"] < state.global_step]
            path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            self.on_step_end(args, state, control, model=model)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs):
        if state.is_world_process_zero and state.global_step % self.every == 0:
            self._measure(state, model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ):
        if not state.is_world_process_zero:
            return
        dynamics, matrix = inspect_model(model, self.input_ids.to(model.device))
        title = f"step {state.global_step}"
        save_dynamics({title: dynamics}, self.folder / "dynamics.png")
        if matrix is not None:
            save_depth_heatmap({title: matrix}, self.folder / "depth_weights.png")

    def _measure(self, state: TrainerState, model):
        dynamics, matrix = inspect_model(model, self.input_ids.to(model.device))
        record = {
            "step": state.global_step,
            "output_magnitude": dynamics.output_magnitude,
            "gradient_norm": dynamics.gradient_norm,
            "magnitude_ratio": dynamics.magnitude_ratio,
            "gradient_variation": dynamics.gradient_variation,
        }
        if matrix is not None:
            rows = matrix.tolist()
            record["depth_weights"] = [[None if value != value else value for value in row] for row in rows]
        with (self.folder / "dynamics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
