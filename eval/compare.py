# Copyright 2026 The modeling-attnres maintainers.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""`attnres-eval compare`: reads runs, compares them, writes what was asked for."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import yaml

from .comparison import Comparison, Model, compare_models
from .records import RunError, load_run
from .report import json_report, markdown_report, text_report


def load_models(specifications: list[str], names: list[str] | None) -> list[Model]:
    """
    Args:
        specifications: one per model: a run's folder, or several joined by commas, one per training seed.
        names: one per model; by default the name of its first folder.
    """
    if names is not None and len(names) != len(specifications):
        raise RunError(f"--names needs one name per model, got {len(names)} for {len(specifications)}")
    models = []
    for index, specification in enumerate(specifications):
        # A folder whose own name holds a comma is one run.
        whole = Path(specification).is_dir()
        folders = [Path(part) for part in ([specification] if whole else specification.split(","))]
        if len({folder.resolve() for folder in folders}) < len(folders):
            raise RunError(f"training seeds must be different runs, got {specification}")
        name = names[index] if names else folders[0].resolve().name
        models.append(Model(name, [load_run(folder) for folder in folders]))
    return models


def write_whole(path: Path, write: Callable[[Path], None]):
    """Lets `write` fill a file beside `path`, then puts it in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    partial.replace(path)


def write_outputs(comparison: Comparison, args: argparse.Namespace):
    """Writes the files asked for; see `attnres-eval compare --help`."""
    variant = comparison.variants[-1]
    texts = {
        args.json: lambda: json.dumps(json_report(comparison), indent=2, allow_nan=False) + "\n",
        args.markdown: lambda: markdown_report(comparison),
    }
    if args.model_index:
        from .card import model_index

        texts[args.model_index] = lambda: yaml.safe_dump(
            {"model-index": model_index(comparison, variant)}, sort_keys=False, allow_unicode=True
        )
    for path, text in texts.items():
        if path:
            write_whole(path, lambda partial, text=text: partial.write_text(text(), encoding="utf-8"))
    if args.plot:
        from .forest import forest_plot, write_numbers

        write_whole(args.plot, lambda partial: forest_plot(comparison, partial))
        write_whole(args.plot.with_suffix(".csv"), lambda partial: write_numbers(comparison, partial))
    if args.card:
        from .card import update_card

        update_card(args.card, comparison, variant)


def compare(args: argparse.Namespace):
    """
    Raises:
        RunError: for runs that cannot be compared, before anything is written.
    """
    if args.resamples < 99:
        raise RunError(f"--resamples must be at least 99, got {args.resamples}")
    if args.plot and args.plot.suffix != ".png":
        raise RunError(f"--plot must end in .png, its numbers go beside it into .csv; got {args.plot}")
    models = load_models(args.runs, args.names)
    tasks = args.tasks.split(",") if args.tasks else None
    comparison = compare_models(models, tasks, args.all_metrics, args.resamples, args.seed)
    print(text_report(comparison), end="")
    write_outputs(comparison, args)
