# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""`attnres-eval compare`: reads runs, compares them, writes what was asked for."""

import argparse
import json
from pathlib import Path

import yaml

from modeling_attnres.command_line import Result

from .comparison import Comparison, Model, compare_models
from .outputs import Outputs, outputs
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


def check_targets(args: argparse.Namespace, making: Outputs) -> dict[str, Path]:
    """Where each file that was asked for is made, by the name of its option; `csv` are the numbers of the plot.

    Raises:
        OutputError: if one of them cannot be written.
    """
    wanted = {name: getattr(args, name) for name in ("json", "markdown", "plot", "model_index", "card")}
    if args.plot:
        wanted["csv"] = args.plot.with_suffix(".csv")
    options = {"csv": "--plot", "model_index": "--model-index"}
    return {
        name: making.file(path, options.get(name, f"--{name}"))
        for name, path in wanted.items()
        if isinstance(path, Path)
    }


def write_outputs(comparison: Comparison, args: argparse.Namespace, targets: dict[str, Path]):
    """Writes the files asked for; see `attnres-eval compare --help`."""
    variant = comparison.variants[-1]
    if "json" in targets:
        text = json.dumps(json_report(comparison), indent=2, allow_nan=False) + "\n"
        targets["json"].write_text(text, encoding="utf-8")
    if "markdown" in targets:
        targets["markdown"].write_text(markdown_report(comparison), encoding="utf-8")
    if "model_index" in targets:
        from .card import model_index

        index = yaml.safe_dump({"model-index": model_index(comparison, variant)}, sort_keys=False, allow_unicode=True)
        targets["model_index"].write_text(index, encoding="utf-8")
    if "plot" in targets:
        from .forest import forest_plot, write_numbers

        forest_plot(comparison, targets["plot"])
        write_numbers(comparison, targets["csv"])
    if "card" in targets:
        from .card import updated_card

        updated_card(args.card, comparison, variant).save(targets["card"])


def compare(args: argparse.Namespace) -> Result:
    """
    Raises:
        RunError: for runs that cannot be compared, before anything is written.
        OutputError: for a file that cannot be written; then none is.
    """
    if args.resamples < 99:
        raise RunError(f"--resamples must be at least 99, got {args.resamples}")
    if args.plot and args.plot.suffix != ".png":
        raise RunError(f"--plot must end in .png, its numbers go beside it into .csv; got {args.plot}")
    with outputs() as making:
        targets = check_targets(args, making)
        models = load_models(args.runs, args.names)
        tasks = args.tasks.split(",") if args.tasks else None
        comparison = compare_models(models, tasks, args.all_metrics, args.resamples, args.seed)
        write_outputs(comparison, args, targets)
    return Result(text_report(comparison).removesuffix("\n"), json_report(comparison))
