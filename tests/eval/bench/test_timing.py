# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import time

import pytest
import torch

from modeling_attnres.compat_attnres import CACHE
from modeling_attnres.eval.bench.models import PRESETS, EqualityGateError, build_lineup
from modeling_attnres.eval.bench.timing import (
    Timing,
    mixer_actions,
    ratio,
    take_turns,
    time_compiled,
    time_decode,
    time_prefill,
    time_training,
)


def test_every_round_runs_every_action_starting_with_another():
    calls = []
    actions = {name: lambda name=name: calls.append(name) for name in "abc"}

    timings = take_turns(actions, rounds=3, warmup=1, after=lambda: calls.append("-"))

    assert "".join(calls) == "a-b-c-b-c-a-c-a-b-a-b-c-"
    assert all(len(timing.cpu) == len(timing.wall) == 3 for timing in timings.values())


def test_processor_time_leaves_out_waiting():
    timing = take_turns({"sleep": lambda: time.sleep(0.05)}, rounds=1, warmup=0)["sleep"]

    assert timing.wall[0] >= 0.05
    assert timing.cpu[0] < 0.04


def test_ratio_is_the_median_of_the_rounds():
    mine, other = Timing([2.0, 9.0, 3.0], [1.0, 1.0, 1.0]), Timing([1.0, 1.0, 3.0], [2.0, 2.0, 2.0])

    assert ratio(mine, other).median == 2.0
    assert (ratio(mine, other).low, ratio(mine, other).high) == (1.5, 5.5)
    assert ratio(mine, other, "wall").median == 0.5
    assert mine.quartiles("cpu")[1] == 3.0


@pytest.mark.parametrize("timer", [time_prefill, time_training])
def test_whole_models_are_timed(timer):
    lineup = build_lineup(PRESETS["tiny"], ["figure2", "full-sum"])

    timings = timer(lineup, 2, 8, rounds=2)

    assert list(timings) == ["base", "figure2", "full-sum"]
    assert all(len(timing.cpu) == 2 and min(timing.cpu) > 0 for timing in timings.values())
    assert lineup.query.grad is None
    assert not lineup.models["full-sum"].training


def test_all_variants_decode_the_same_positions():
    lineup = build_lineup(PRESETS["tiny"], ["figure2", "block"])
    lengths = {name: [] for name in lineup.models}
    for name, model in lineup.models.items():
        model.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: lengths[name].append(
                kwargs[CACHE].get_seq_length() if CACHE in kwargs else None
            ),
            with_kwargs=True,
        )

    time_decode(lineup, 1, past=6, rounds=3, warmup=1)

    assert lengths.pop("base") == [None, 6, 7, 8, 9]  # it fills the cache that all start from
    assert lengths == {name: [6, 7, 8, 9] for name in lengths}


@torch.no_grad()
def test_mixers_compute_the_same_mix():
    actions = mixer_actions(8, 4, 16, tokens=8)

    torch.testing.assert_close(actions["mean"](), actions["figure2"]())
    assert actions["sum"]().norm() > actions["mean"]().norm()


@pytest.mark.slow
def test_compiled_models_are_timed_behind_their_own_gate(monkeypatch):
    lineup = build_lineup(PRESETS["tiny"], ["block"])

    prefill, decode = time_compiled(lineup, 1, 16, rounds=2)

    assert [len(prefill["block"].cpu), len(decode["block"].cpu)] == [2, 20]
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: _Shifted(model))
    with pytest.raises(EqualityGateError, match="Compiled, 'base' is"):
        time_compiled(lineup, 1, 16, rounds=2)


class _Shifted:
    def __init__(self, model):
        self.model, self.config = model, model.config

    def __call__(self, **kwargs):
        outputs = self.model(**kwargs)
        outputs.logits = outputs.logits + 0.1
        return outputs
