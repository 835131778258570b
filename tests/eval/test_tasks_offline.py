# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The offline tasks: their data, their answers checked by other means, and their prompts."""

import hashlib
import json
import re

import pytest
from lm_eval.tasks import TaskManager

from modeling_attnres.eval.tasks import TASKS_PATH
from modeling_attnres.eval.tasks.offline import arithmetic, humaneval, lookup, texts


TASKS = {
    "attnres_bits_shakespeare": 20,
    "attnres_bits_python": 20,
    "attnres_cloze_shakespeare": 40,
    "attnres_cloze_python": 40,
    "attnres_arithmetic": 80,
    "attnres_stories": 30,
    "attnres_lookup_1": 50,
    "attnres_lookup_2": 50,
    "attnres_lookup_4": 50,
    "attnres_lookup_8": 50,
    "attnres_humaneval_solutions": 60,
}


@pytest.fixture(scope="module")
def tasks():
    manager = TaskManager(include_path=str(TASKS_PATH), include_defaults=False)
    return manager.load(["attnres_offline", "attnres_humaneval"])["tasks"]


def test_the_group_and_its_sizes(tasks):
    sizes = {name: len(task.eval_docs) for name, task in tasks.items()}
    assert sizes == {**TASKS, "attnres_humaneval": 164}
    assert all(task.VERSION == 1.0 for task in tasks.values())
    assert [name for name, task in tasks.items() if task.config.unsafe_code] == ["attnres_humaneval"]


def prompt(task, index=0):
    task.set_fewshot_seed(1234)
    return task.fewshot_context(task.eval_docs[index], task.config.num_fewshot)


@pytest.mark.parametrize("name", ["shakespeare", "python_reference"])
def test_shipped_passages(name):
    records = texts.read(name)
    assert len(records) == 60
    assert all(1200 <= len(record["text"]) <= 1500 for record in records)
    assert len({record["text"] for record in records}) == 60


@pytest.mark.parametrize("name", ["shakespeare", "python_reference"])
def test_cloze_items_continue_the_text(name):
    passages = [record["text"] for record in texts.read(name)]
    to_compress = passages[: texts.PASSAGES_TO_COMPRESS]
    documents = texts.cloze(name)["test"]
    golds = []
    for document in documents:
        choices, gold = document["choices"], document["gold"]
        assert len(set(choices)) == 4
        sources = [text for text in passages if document["context"] in text]
        assert len(sources) == 1
        assert sources[0] not in to_compress
        rest = sources[0][sources[0].index(document["context"]) + len(document["context"]) :]
        assert re.match(rf"\s{re.escape(choices[gold])}\b", rest)
        golds.append(gold)
    assert all(5 <= golds.count(place) <= 15 for place in range(4))  # no favoured place


def test_cloze_prompt(tasks):
    task = tasks["attnres_cloze_python"]
    document = task.eval_docs[0]
    requests = task.construct_requests(document, prompt(task))
    assert [request.args for request in requests] == [
        (document["context"], f" {choice}") for choice in document["choices"]
    ]
    results = [(-1.0 if index == document["gold"] else -2.0, False) for index in range(4)]
    assert task.process_results(document, results) == {"acc": 1.0}


def test_arithmetic_answers_are_right(tasks):
    task = tasks["attnres_arithmetic"]
    for document in task.eval_docs:
        expression = re.fullmatch(r"Q: ([-+*() 0-9]+)\nA:", document["question"])[1]
        assert document["answer"] == f" {eval(expression)}."
    examples = [document["question"] for document in arithmetic.expressions()["examples"]]
    assert not set(examples) & set(task.eval_docs["question"])


def test_arithmetic_prompt_and_score(tasks):
    task = tasks["attnres_arithmetic"]
    document = task.eval_docs[0]
    request = task.construct_requests(document, prompt(task))
    context, continuation = request.args
    assert re.fullmatch(r"(Q: .+\nA: \d+\.\n\n){3}Q: .+\nA:", context)
    assert continuation == document["answer"]
    assert task.process_results(document, [(-1.0, True)])["acc"] == 1
    assert task.process_results(document, [(-1.0, False)])["acc"] == 0


def solve(question: str) -> int:
    """The story told again by other means than its generator's."""
    count = int(re.search(r"has (\d+)", question)[1])
    for sentence in question.split(". ")[1:]:
        if found := re.search(r"finds (\d+) more", sentence):
            count += int(found[1])
        elif found := re.search(r"gives away (\d+)", sentence):
            count -= int(found[1])
        elif sentence.startswith("A friend brings as many"):
            count += count
    return count


def test_story_answers_are_right(tasks):
    for document in tasks["attnres_stories"].eval_docs:
        assert int(document["answer"]) == solve(document["question"])
        steps = re.findall(r"(\d+ [-+*] \d+) = (\d+)\.", document["solution"])
        assert len(steps) == document["steps"]
        assert all(eval(left) == int(right) for left, right in steps)


@pytest.mark.parametrize(
    ("answer", "score"),
    [("{}. The answer is {}.", 1.0), ("The answer is 1{}.", 0.0), ("It is {}", 0.0)],
)
def test_story_filter_and_score(tasks, answer, score):
    task = tasks["attnres_stories"]
    document = task.eval_docs[0]
    assert prompt(task).count("The answer is") == 3
    request = task.construct_requests(document, prompt(task))
    request.resps = [answer.format(*[document["answer"]] * 2)]
    task._instances = [request]
    task.apply_filters()
    assert task.process_results(document, [request.filtered_resps["answer"]]) == {"exact_match": score}


@pytest.mark.parametrize("hops", [1, 2, 4, 8])
def test_look_ups_are_as_deep_as_they_say(hops):
    documents = lookup.look_ups(hops)["test"]
    for document in documents:
        *lines, question = document["question"].split("\n")
        table = dict(line.split(" = ") for line in lines)
        assert len(table) == lookup.CHAINS * (hops + 1)
        value, steps = question.removesuffix(" ="), 0
        while value in table:
            value, steps = table[value], steps + 1
        assert (int(value), steps) == (document["gold"], hops + 1)
        assert document["choices"] == list("0123456789")
    # Line order must not give the answer away: the asked digit is not always in the first or last of its lines.
    digits = [re.findall(r"= (\d)", document["question"]) for document in documents]
    first = sum(int(found[0]) == document["gold"] for found, document in zip(digits, documents))
    assert 10 <= first <= 40


@pytest.mark.parametrize("hops", [0, 13])
def test_look_ups_out_of_range(hops):
    with pytest.raises(ValueError, match=f"between 1 and 12, got {hops}"):
        lookup.look_ups(hops)


@pytest.mark.parametrize(
    "build",
    [
        arithmetic.expressions,
        arithmetic.stories,
        lambda **seed: lookup.look_ups(4, **seed),
        lambda **seed: texts.cloze("shakespeare", **seed),
    ],
)
def test_items_follow_from_the_seed(build):
    assert build()["test"].to_list() == build(item_seed=0)["test"].to_list()
    assert build()["test"].to_list() != build(item_seed=1)["test"].to_list()


def test_items_are_those_that_published_figures_were_measured_on():
    """A change here makes earlier results incomparable: raise the task's version with it."""
    data = [
        arithmetic.expressions()["test"],
        arithmetic.stories()["test"],
        *(lookup.look_ups(hops)["test"] for hops in (1, 2, 4, 8)),
        texts.cloze("shakespeare")["test"],
        texts.cloze("python_reference")["test"],
    ]
    digest = hashlib.sha256(json.dumps([part.to_list() for part in data]).encode()).hexdigest()
    assert digest[:16] == "e8e04f394005005b"


def test_humaneval_solution_is_what_is_scored(tasks):
    task = tasks["attnres_humaneval_solutions"]
    document = task.eval_docs[1]
    assert document["task_id"] == "HumanEval/2"
    request = task.construct_requests(document, prompt(task, index=1))
    assert request.args == (document["prompt"], document["canonical_solution"])
    assert humaneval.solution_bits(document, [(-12.5, False)]) == {
        "bits_per_byte": (-12.5, len(document["canonical_solution"].encode()))
    }


def test_humaneval_prompt_stops_at_the_next_statement(tasks):
    task = tasks["attnres_humaneval"]
    context, arguments = task.construct_requests(task.eval_docs[0], prompt(task)).args
    assert context == task.eval_docs[0]["prompt"]
    assert "\ndef" in arguments["until"]
    assert arguments["do_sample"] is False


def test_bits_of_whole_passages(tasks):
    task = tasks["attnres_bits_python"]
    document = task.eval_docs[0]
    assert task.construct_requests(document, "").args == (document["text"],)
    size = len(document["text"].encode())
    assert task.process_results(document, [-1000.0]) == {"bits_per_byte": (-1000.0, size)}
