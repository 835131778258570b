# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Reading runs: gold answers, and errors for whatever is missing, doubled or not a number."""

import json
import math

import numpy as np
import pytest
from synthetic_runs import DATE, multiple_choice, sample, whole_texts, write_run

from modeling_attnres.eval.records import RunError, load_run


@pytest.fixture
def folder(tmp_path):
    tasks = {
        "mc": multiple_choice("mc", [1, 0, 1, 1, 0, 0]),
        "bits": whole_texts("bits", [1.0, 2.0, 1.5], [10, 20, 30]),
    }
    return write_run(tmp_path / "run", tasks)


def rewrite(folder, task, change):
    path = folder / f"samples_{task}_{DATE}.jsonl"
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    change(samples)
    path.write_text("".join(json.dumps(item) + "\n" for item in samples))


def test_items_of_multiple_choice(folder):
    items = load_run(folder).items("mc", "acc", "none")
    assert items.values.tolist() == [1, 0, 1, 1, 0, 0]
    assert items.chance.tolist() == [0.25] * 6
    # The gold choice has log-likelihood -1 where right, -2 where wrong; " option 0" has 9 bytes.
    assert items.gold_bits * math.log(2) == pytest.approx(np.array([1, 2, 1, 1, 2, 2]))
    assert items.gold_bytes.tolist() == [9] * 6


def test_items_of_bits_per_byte(folder):
    items = load_run(folder).items("bits", "bits_per_byte", "none")
    assert items.values == pytest.approx(np.array([1.0, 2.0, 1.5]))
    assert items.weights.tolist() == [10, 20, 30]
    assert items.gold_bits is None


def digit_choices(target, best, acc):
    """Choices "3", "1", "2", "0": a target read as text is another choice than read as an index."""
    return sample(
        "digits",
        0,
        metrics={"acc": acc},
        target=target,
        arguments=[("Q:", f" {digit}") for digit in "3120"],
        resps=[[["-1.0" if index == best else "-2.0", "False"]] for index in range(4)],
    )


@pytest.mark.parametrize(("best", "acc", "gold"), [(0, 1.0, 0), (3, 1.0, 3), (1, 0.0, None)])
def test_gold_answer_that_could_be_index_or_text(tmp_path, best, acc, gold):
    """The target "3" is choice 3 or the choice that reads 3; the logged accuracy decides, if it can."""
    run = load_run(write_run(tmp_path / "run", {"digits": [digit_choices("3", best, acc)]}))
    items = run.items("digits", "acc", "none")
    assert (None if items.gold_bits is None else -1.0) == (None if gold is None else pytest.approx(-1.0))
    if gold is not None:
        assert items.gold_bits[0] * math.log(2) == pytest.approx(1.0)


def test_choices_asked_for_twice_count_once(tmp_path):
    """lm-eval's mutual information adds each choice without its context."""
    pairs = [(context, f" {word}") for context in ("Q:", "") for word in ("tin", "gold")]
    likelihoods = [[[value, "False"]] for value in ("-3.0", "-1.0", "-9.0", "-5.0")]
    both = sample("twice", 0, {"acc": 1.0}, "1", pairs, likelihoods)
    items = load_run(write_run(tmp_path / "run", {"twice": [both]})).items("twice", "acc", "none")
    assert items.chance.tolist() == [0.5]
    assert items.gold_bits * math.log(2) == pytest.approx(np.array([1.0]))
    assert items.gold_bytes.tolist() == [5]


def test_no_gold_where_contexts_vary_or_text_is_generated(tmp_path):
    varied = sample(
        "contexts",
        0,
        metrics={"acc": 1.0},
        target="0",
        arguments=[("A", " end"), ("B", " end")],
        resps=[[["-1", "False"]], [["-2", "False"]]],
    )
    generated = sample("text", 0, {"exact_match": 1.0}, "7", [("Q", {"until": ["\n"]})], [["7"]], filter_name="answer")
    run = load_run(write_run(tmp_path / "run", {"contexts": [varied], "text": [generated]}))
    assert run.items("contexts", "acc", "none").gold_bits is None
    items = run.items("text", "exact_match", "answer")
    assert (items.gold_bits, items.chance.tolist()) == (None, [0.0])


def test_metrics_that_are_no_mean_are_left_out(tmp_path):
    items = [
        sample("f1", index, {"f1": [0, 1], "perplexity": -2.0, "acc": 1.0}, "0", [("Q", " a")], [[["-1", "True"]]])
        for index in range(2)
    ]
    for item in items:
        item["f1"] = 0.0  # write_run averages; lm-eval logs pairs
    folder = write_run(tmp_path / "run", {"f1": items})
    rewrite(folder, "f1", lambda samples: [item.update(f1=[0, 1]) for item in samples])
    results = folder / f"results_{DATE}.json"
    content = json.loads(results.read_text())
    content["configs"]["f1"]["metric_list"] = [
        {"metric": "f1", "aggregation": "f1"},
        {"metric": "perplexity", "aggregation": "perplexity"},
        {"metric": "acc"},
    ]
    results.write_text(json.dumps(content))
    assert list(load_run(folder).measured("f1")) == [("acc", "none")]


def test_missing_run(tmp_path):
    with pytest.raises(RunError, match="is not a folder"):
        load_run(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="holds 0 runs"):
        load_run(tmp_path / "empty")


def test_two_runs_in_one_folder(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name, {"mc": multiple_choice("mc", [1, 0])})
    with pytest.raises(RunError, match="holds 2 runs"):
        load_run(tmp_path)


def test_broken_results(folder):
    (folder / f"results_{DATE}.json").write_text('{"results": ')
    with pytest.raises(RunError, match="is not JSON"):
        load_run(folder)


def test_missing_samples(folder):
    (folder / f"samples_mc_{DATE}.jsonl").unlink()
    with pytest.raises(RunError, match="no samples of task mc"):
        load_run(folder).items("mc", "acc", "none")


@pytest.mark.parametrize("content", ["", '{"doc_id": 0'])
def test_broken_samples(folder, content):
    (folder / f"samples_mc_{DATE}.jsonl").write_text(content)
    with pytest.raises(RunError, match=r"is empty|is not JSON lines"):
        load_run(folder).items("mc", "acc", "none")


@pytest.mark.parametrize(
    ("task", "metric", "value", "message"),
    [
        ("mc", "acc", float("nan"), "item 2, metric acc: the score is nan"),
        ("mc", "acc", float("inf"), "the score is inf"),
        ("mc", "acc", None, "no score"),
        ("bits", "bits_per_byte", [float("nan"), 30], "the score is nan"),
    ],
)
def test_scores_that_are_no_numbers(folder, task, metric, value, message):
    rewrite(folder, task, lambda samples: samples[2].update({metric: value}))
    with pytest.raises(RunError, match=message):
        load_run(folder).items(task, metric, "none")


def test_samples_of_another_run(folder):
    rewrite(folder, "mc", lambda samples: samples[0].update(acc=0.0))
    with pytest.raises(RunError, match="not of one run"):
        load_run(folder).items("mc", "acc", "none")


def test_item_twice(folder):
    rewrite(folder, "mc", lambda samples: samples.append(samples[0]))
    with pytest.raises(RunError, match="comes twice"):
        load_run(folder).items("mc", "acc", "none")


@pytest.mark.parametrize("value", ["nan", "-inf", "inf"])
@pytest.mark.parametrize("metric_too", [False, True])
def test_a_gold_answer_without_a_likelihood(folder, value, metric_too):
    """The accuracy of such an item may well be a number: `argmax` of NaN is an index."""

    def spoil(samples):
        samples[2]["resps"][int(samples[2]["target"])][0][0] = value
        if metric_too:
            samples[2]["acc_norm"] = 0.0

    rewrite(folder, "mc", spoil)
    with pytest.raises(RunError, match=rf"{folder}: task mc, item 2: the log-likelihood of .* is {value}$"):
        load_run(folder).items("mc", "acc", "none")


def test_another_answer_without_a_likelihood(folder):
    """What it was compared with decided whether the gold answer was chosen."""

    def spoil(samples):
        gold = int(samples[1]["target"])
        samples[1]["resps"][(gold + 1) % 4][0][0] = "nan"

    rewrite(folder, "mc", spoil)
    with pytest.raises(RunError, match="task mc, item 1: the log-likelihood of an answer is nan"):
        load_run(folder).items("mc", "acc", "none")


@pytest.mark.parametrize("value", [[-3.0, 0], [-3.0], -3.0, ["-3.0", 10]])
def test_bits_per_byte_of_something_else(folder, value):
    rewrite(folder, "bits", lambda samples: samples[2].update(bits_per_byte=value))
    with pytest.raises(RunError, match="task bits, item 2, metric bits_per_byte: the score must be a log-likelihood"):
        load_run(folder).items("bits", "bits_per_byte", "none")


@pytest.mark.parametrize("value", [None, "", "nan"])
def test_a_first_item_without_a_score_does_not_hide_the_metric(folder, value):
    rewrite(folder, "mc", lambda samples: samples[0].update(acc=value))
    run = load_run(folder)
    assert list(run.measured("mc")) == [("acc", "none")]
    with pytest.raises(RunError, match=f"{folder}: task mc, item 0, metric acc: (no score|the score is {value})$"):
        run.items("mc", "acc", "none")
