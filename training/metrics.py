# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""What a training run logs, one JSON object per line, and a picture of it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modeling_attnres.text_files import write_text


class JsonlMetrics(TrainerCallback):
    """Appends every record that Trainer logs to a file, as `{"step": ..., "loss": ..., ...}` on a line of its own.

    A file that exists is continued. When training starts, records of later steps are dropped: those of a run that was
    interrupted after the checkpoint it resumes from, or of an earlier run. A record with the step and the keys of an
    earlier one replaces it, so an evaluation that is repeated on resuming is there once. Only the main process writes.

    Args:
        path: the file; its folder is made at the first record.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._records: dict[tuple, dict] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if state.is_world_process_zero:
            records = self._load()
            later = [key for key, record in records.items() if record["step"] > state.global_step]
            for key in later:
                del records[key]
            if later:
                self._rewrite()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        record = {"step": state.global_step, **logs}
        records, key = self._load(), _key(record)
        replaces = key in records
        records[key] = record
        if replaces:
            self._rewrite()
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _load(self) -> dict[tuple, dict]:
        if self._records is None:
            self._records = {}
            if self.path.exists():
                self._records = {_key(record): record for record in read_metrics(self.path)}
                self._rewrite()  # drop the half line that a killed process left
        return self._records

    def _rewrite(self):
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in self._records.values()))


def _key(record: dict) -> tuple:
    return record["step"], frozenset(record)


def read_metrics(path: str | Path) -> list[dict]:
    """The records of a file that [`JsonlMetrics`] wrote, in order.

    Raises:
        ValueError: if a line is no record. The last line may be torn: a process was killed while it wrote.
    """
    records = []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"Line {number} of {path} must be a JSON object, got {line[:80]!r}.") from error
        if not isinstance(record, dict) or "step" not in record:
            raise ValueError(f"Line {number} of {path} must be a JSON object with a `step`, got {line[:80]!r}.")
        records.append(record)
    return records


def plot_metrics(
    jsonl: str | Path | Mapping[str, str | Path], png: str | Path, keys: Sequence[str] = ("loss", "eval_loss")
) -> Path:
    """Draws metrics over steps, all in one panel.

    Args:
        jsonl: a file of [`JsonlMetrics`], or several by the label of their run.
        png: the picture to write.
        keys: what to draw; a run's records without a key are passed over.

    Returns:
        `png`.

    Raises:
        ValueError: if no record has any of the keys.
    """
    runs = jsonl if isinstance(jsonl, Mapping) else {"": jsonl}
    curves = {}
    for run, path in runs.items():
        records = read_metrics(path)
        for key in keys:
            points = [(record["step"], record[key]) for record in records if key in record]
            if points:
                curves[f"{run} {key}".strip()] = points
    if not curves:
        raise ValueError(f"`keys` must name metrics of the records, got {list(keys)} for {list(runs.values())}.")

    # Without pyplot: no display, and the user's backend stays as it is.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    for label, points in curves.items():
        panel.plot(*zip(*points), marker="o" if len(points) < 20 else None, markersize=3, label=label)
    panel.set_xlabel("step")
    panel.grid(alpha=0.3)
    panel.legend()
    figure.tight_layout()
    png = Path(png)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=120)
    return png
