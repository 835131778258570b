# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Joining runs: rows, averages, seeds, and refusals that name what differs."""

import numpy as np
import pytest
from scipy import stats
from synthetic_runs import multiple_choice, whole_texts, write_run

from modeling_attnres.eval.comparison import Model, compare_models
from modeling_attnres.eval.records import RunError, load_run


A = [1, 0, 1, 1, 0, 0, 1, 0, 1, 1]
B = [1, 1, 1, 1, 0, 1, 1, 0, 0, 1]
BITS_A, BITS_B, SIZES = [1.0, 2.0, 1.5, 1.2], [0.9, 1.9, 1.5, 1.0], [10, 20, 30, 15]


def model(name, *folders) -> Model:
    return Model(name, [load_run(folder) for folder in folders])


def tasks(correct, bits):
    return {
        "mc": multiple_choice("mc", correct),
        "pair": multiple_choice("pair", correct[::-1], choices=2),
        "bits": whole_texts("bits", bits, SIZES),
    }


@pytest.fixture
def models(tmp_path):
    a = write_run(tmp_path / "a", tasks(A, BITS_A))
    b = write_run(tmp_path / "b", tasks(B, BITS_B))
    return [model("a", a), model("b", b)]


def test_rows_hold_scores_differences_and_gold_answers(models):
    rows = {row.key.tasks[0]: row for row in compare_models(models, resamples=999).rows["b"]}
    row = rows["mc"]
    assert (row.key.title, row.key.metric, row.items, row.shots) == ("Alias of mc", "acc", 10, 3)
    assert (row.baseline, row.variant) == pytest.approx((0.6, 0.7))
    assert row.baseline_se == pytest.approx(stats.sem(A))
    assert row.difference.se == pytest.approx(stats.sem(np.array(B) - np.array(A)))
    assert row.difference.p_value == pytest.approx(stats.binomtest(1, 3).pvalue)
    assert row.chance == 0.25
    # One nat less for each item more right, 9 bytes an item.
    assert row.gold_variant - row.gold_baseline == pytest.approx(-(0.7 - 0.6) / np.log(2) / 9)
    assert row.gold_difference.value == pytest.approx(row.gold_variant - row.gold_baseline)

    row = rows["bits"]
    assert not row.higher_is_better
    assert (row.baseline, row.variant) == pytest.approx([np.average(bits, weights=SIZES) for bits in (BITS_A, BITS_B)])
    assert row.gold_difference is None
    assert row.difference.test == "bootstrap"


def test_holm_is_over_all_rows_and_variants(models, tmp_path):
    third = model("c", write_run(tmp_path / "c", tasks([0] * 10, BITS_A)))
    comparison = compare_models([*models, third], resamples=999)
    flat = [row for rows in comparison.rows.values() for row in rows]
    assert len(flat) == 6
    smallest = min(flat, key=lambda row: row.difference.p_value)
    assert smallest.holm == pytest.approx(min(6 * smallest.difference.p_value, 1))


def test_macro_averages(models):
    raw, centred = compare_models(models, resamples=99).averages["b"]
    assert (raw.rows, raw.baseline, raw.variant) == pytest.approx((2, 0.6, 0.7))
    assert centred.baseline == pytest.approx(((0.6 - 0.25) / 0.75 + (0.6 - 0.5) / 0.5) / 2)
    assert centred.difference.value == pytest.approx((0.1 / 0.75 + 0.1 / 0.5) / 2)
    assert centred.difference.value == pytest.approx(centred.variant - centred.baseline)


def test_equal_runs_differ_by_exactly_nothing(tmp_path):
    folder = write_run(tmp_path / "a", tasks(A, BITS_A))
    comparison = compare_models([model("a", folder), model("b", folder)], resamples=99)
    for row in comparison.rows["b"]:
        for difference in filter(None, (row.difference, row.gold_difference)):
            assert (difference.value, difference.se, difference.p_value) == (0, 0, 1)
    assert all(average.difference.p_value == 1 for average in comparison.averages["b"])


def test_pooled_benchmark_of_the_report(tmp_path):
    """MMLU's subjects become one row, whatever group they were run in."""
    groups = {"attnres_paper_mc": ["mmlu"], "mmlu": ["mmlu_stem", "mmlu_z"], "mmlu_stem": ["mmlu_x", "mmlu_y"]}
    names, sides = ("mmlu_x", "mmlu_y", "mmlu_z"), []
    for side, correct in (("a", A), ("b", B)):
        samples = {name: multiple_choice(name, correct) for name in names}
        sides.append(model(side, write_run(tmp_path / side, samples, groups)))
    (row,) = compare_models(sides).rows["b"]
    assert (row.key.title, row.items, row.baseline) == ("MMLU", 30, pytest.approx(0.6))


def test_training_seeds_are_averaged_by_item_and_spread_apart(tmp_path):
    rng = np.random.default_rng(0)
    scores = {side: rng.integers(0, 2, size=(3, 12)) for side in "ab"}
    sides = []
    for side, rows in scores.items():
        folders = [
            write_run(tmp_path / f"{side}{seed}", {"mc": multiple_choice("mc", row.tolist())})
            for seed, row in enumerate(rows)
        ]
        sides.append(model(side, *folders))
    (row,) = compare_models(sides, resamples=999).rows["b"]
    mean_a, mean_b = (scores[side].mean(0) for side in "ab")
    assert row.difference.value == pytest.approx((mean_b - mean_a).mean())
    assert row.difference.se == pytest.approx(stats.sem(mean_b - mean_a))
    assert row.difference.test == "bootstrap"
    by_seed = [scores[side].mean(1) for side in "ab"]
    assert row.seeds.baseline == pytest.approx(by_seed[0].std(ddof=1))
    assert row.seeds.p_value == pytest.approx(stats.ttest_ind(by_seed[1], by_seed[0], equal_var=False).pvalue)


def test_all_metrics_adds_rows_and_drops_averages(tmp_path):
    sides = []
    for side, correct in (("a", A), ("b", B)):
        samples = multiple_choice("mc", correct)
        for item in samples:
            item["acc_norm"] = 1.0 - item["acc"]
            item["metrics"] = ["acc", "acc_norm"]
        sides.append(model(side, write_run(tmp_path / side, {"mc": samples})))
    comparison = compare_models(sides, all_metrics=True)
    assert [row.key.metric for row in comparison.rows["b"]] == ["acc", "acc_norm"]
    assert comparison.averages["b"] == []
    assert len(compare_models(sides).rows["b"]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"versions": {"mc": 2.0}}, "version of mc: .* has 1.0, .* has 2.0"),
        ({"n-shot": {"mc": 5}}, "shots of mc: .* has 3, .* has 5"),
        ({"task_hashes": {"mc": "other"}}, "hash of items of mc"),
        ({"lm_eval_version": "0.4.12"}, "lm-eval version: .* has 0.4.13, .* has 0.4.12"),
        ({"chat_template_sha": "abc"}, "chat template .*: .* has None, .* has abc"),
        ({"system_instruction_sha": "abc"}, "system instruction"),
        ({"config": {"limit": 5.0, "fewshot_seed": 1234}}, "limit: .* has None, .* has 5.0"),
        ({"config": {"gen_kwargs": {"temperature": 1}, "fewshot_seed": 1234}}, "generation arguments"),
        ({"config": {"fewshot_seed": 1}}, "few-shot seed: .* has 1234, .* has 1"),
    ],
)
def test_unequal_settings_are_named(tmp_path, change, message):
    samples = {"mc": multiple_choice("mc", A)}
    sides = [
        model("a", write_run(tmp_path / "a", samples)),
        model("b", write_run(tmp_path / "b", samples, **change)),
    ]
    with pytest.raises(RunError, match=message):
        compare_models(sides)


def test_other_items_under_the_same_hash(tmp_path):
    """Runs of lm-eval before it logged hashes differ only in the items themselves."""
    a, b = multiple_choice("mc", A), multiple_choice("mc", B)
    b[3]["doc_hash"] = "another document"
    sides = [
        model(name, write_run(tmp_path / name, {"mc": samples}, task_hashes={}))
        for name, samples in (("a", a), ("b", b))
    ]
    with pytest.raises(RunError, match="Alias of mc: the runs do not hold the same items"):
        compare_models(sides)


def test_no_common_task(tmp_path):
    sides = [
        model("a", write_run(tmp_path / "a", {"mc": multiple_choice("mc", A)})),
        model("b", write_run(tmp_path / "b", {"other": multiple_choice("other", A)})),
    ]
    with pytest.raises(RunError, match="have no task in common"):
        compare_models(sides)


def test_tasks_of_one_run_only_must_be_left_out_by_name(models, tmp_path):
    more = model("c", write_run(tmp_path / "c", {**tasks(A, BITS_A), "extra": multiple_choice("extra", A)}))
    with pytest.raises(RunError, match="only one has extra"):
        compare_models([models[0], more])
    comparison = compare_models([models[0], more], tasks=["mc", "bits"], resamples=99)
    assert [row.key.tasks for row in comparison.rows["c"]] == [("mc",), ("bits",)]
    with pytest.raises(RunError, match="no task or group nothing"):
        compare_models([models[0], more], tasks=["nothing"])


def test_one_item_is_no_comparison(tmp_path):
    sides = [model(name, write_run(tmp_path / name, {"mc": multiple_choice("mc", [1])})) for name in "ab"]
    with pytest.raises(RunError, match="at least two items"):
        compare_models(sides)


def test_number_and_names_of_models(models):
    with pytest.raises(RunError, match="at least two models, got 1"):
        compare_models(models[:1])
    with pytest.raises(RunError, match="distinct names"):
        compare_models([models[0], models[0]])
