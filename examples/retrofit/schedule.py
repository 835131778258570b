# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Which runs the study has and in which order, and its folder: one JSON file per finished run."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from .arms import ARMS, FORMS, MAIN_FORM, PRENORM, QUERY_RATE_BESIDE
from .training import Settings


SEEDS = 5
SWEEP_SEED = 1000  # other batches than those of the seeds that are reported
FORM_SEEDS = 2
FORM_ARM = "attnres-lora"


@dataclass(frozen=True)
class Run:
    """
    Attributes:
        stage: "before" (no training, evaluated on test), "sweep" (on validation) or "seeds" (on test).
        form: of [`arms.FORMS`], or "prenorm".
        arm: of [`arms.ARMS`]; empty before training.
        rate: in the sweep; the runs on test take the best one.
    """

    stage: str
    domain: str
    form: str
    arm: str = ""
    seed: int = 0
    rate: float | None = None

    @property
    def name(self) -> str:
        last = {"before": "", "sweep": f"-{self.rate}", "seeds": f"-{self.seed}"}[self.stage]
        return f"{self.domain}-{self.stage}-{self.form}{self.arm and f'-{self.arm}'}{last}"


def form_of(arm: str) -> str:
    return MAIN_FORM if ARMS[arm].attnres else PRENORM


def sweep_run(domain: str, arm: str, rate: float) -> Run:
    return Run("sweep", domain, form_of(arm), arm, SWEEP_SEED, rate)


def planned(domains: list[str], seeds: int) -> list[Run]:
    """All runs, those that the report can do without last.

    Learning rates are swept on the first domain and hold for all. Seeds are the outer loop, so a study that is cut short has fewer of
    them in every arm and domain. Other forms of AttnRes, on the first domain, come after three seeds.
    """
    runs = []
    for seed in range(seeds):
        for domain in domains:
            if seed == 0:
                runs += [Run("before", domain, form) for form in (PRENORM, MAIN_FORM)]
            if seed == 0 and domain == domains[0]:
                runs += [sweep_run(domain, name, rate) for name, arm in ARMS.items() for rate in arm.rates]
            runs += [Run("seeds", domain, form_of(name), name, seed) for name in ARMS]
        if seed == min(2, seeds - 1):
            others = [form for form in FORMS if form != MAIN_FORM]
            runs += [Run("before", domains[0], form) for form in others]
            runs += [
                Run("seeds", domains[0], form, FORM_ARM, form_seed)
                for form_seed in range(min(FORM_SEEDS, seeds))
                for form in others
            ]
    return runs


class Study:
    """The output folder.

    Args:
        folder: holds `study.json` (settings and domains) and `runs/`.

    Raises:
        ValueError: if the folder holds a study of other settings.
    """

    def __init__(self, folder: Path, settings: Settings, domains: dict[str, str], seeds: int):
        self.folder, self.settings, self.domains, self.seeds = folder, settings, domains, seeds
        described = {"domains": domains, **asdict(settings)}
        path = folder / "study.json"
        if path.exists() and json.loads(path.read_text("utf-8")) != described:
            raise ValueError(f"`--output` must be a new folder or one of the same settings, got {path.read_text()}.")
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        write_json(path, described)

    @classmethod
    def open(cls, folder: Path, seeds: int) -> "Study":
        """The study that a folder holds.

        Raises:
            ValueError: if it holds none.
        """
        path = folder / "study.json"
        if not path.exists():
            raise ValueError(f"`--output` must be the folder of a study, got {folder} without study.json.")
        described = json.loads(path.read_text("utf-8"))
        domains = described.pop("domains")
        return cls(folder, Settings(**described), domains, seeds)

    @property
    def runs(self) -> list[Run]:
        return planned(list(self.domains), self.seeds)

    def path(self, run: Run) -> Path:
        return self.folder / "runs" / f"{run.name}.json"

    def read(self, run: Run) -> dict | None:
        """A finished run's record, or `None`."""
        path = self.path(run)
        return json.loads(path.read_text("utf-8")) if path.exists() else None

    @property
    def first_domain(self) -> str:
        """Where rates are swept and forms are compared."""
        return next(iter(self.domains))

    def chosen_rate(self, arm: str) -> float | None:
        """The swept rate with the least loss on validation; `None` until the arm's sweep is complete."""
        found = {}
        for rate in ARMS[arm].rates:
            record = self.read(sweep_run(self.first_domain, arm, rate))
            if record is None:
                return None
            found[rate] = sum(record["losses"])
        return min(found, key=found.get)

    def rates(self, run: Run) -> tuple[float, float | None] | None:
        """The learning rate of a run and that of its queries; `None` while a sweep that it waits for is not done."""
        rate = self.chosen_rate(run.arm) if run.rate is None else run.rate
        if not ARMS[run.arm].attnres:
            return None if rate is None else (rate, None)
        if run.arm == "queries":
            return None if rate is None else (rate, rate)
        alone = self.chosen_rate("queries")
        return None if rate is None or alone is None else (rate, QUERY_RATE_BESIDE * alone)

    @contextmanager
    def claim(self, run: Run) -> Iterator[bool]:
        """Whether this process may do the run: no other one does, and it is not done. Ends with the process."""
        with self.path(run).with_suffix(".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield not self.path(run).exists()


def write_json(path: Path, record: dict):
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
