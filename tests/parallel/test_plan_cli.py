# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import json
import re
import shlex
from pathlib import Path

import pytest

from modeling_attnres import AttnResForCausalLM
from modeling_attnres.configuration import load_preset
from modeling_attnres.parallel.cli import main
from modeling_attnres.parallel.plan import DepthShape, pipeline_transitions, summary_memory


DOCS = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
DOCUMENTED = re.findall(r"```bash\nattnres-plan ([^\n]*)\n```\n```text\n(.*?)```", DOCS, re.DOTALL)
HARDWARE = ["--link-bandwidth", "50", "--memory-bandwidth", "3350", "--flops", "400", "--activated-parameters", "3"]


def figures(capsys, *arguments: str) -> dict:
    main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def test_a_preset(capsys):
    run = ["--tokens", "131072", "--pipeline-ranks", "4", "--virtual-stages", "2"]
    memory = ["--tensor-parallel", "8", "--chunk", "16384"]
    found = figures(capsys, "--preset", "kimi-linear-48b-a3b-block", *run, *memory, *HARDWARE)
    shape = DepthShape(27, 2304, 6)
    assert found["model"] == {
        "num_layers": 27,
        "hidden_size": 2304,
        "sublayers_per_block": 6,
        "depth_weights": "mean",
        "num_sublayers": 54,
        "num_blocks": 9,
    }
    assert found["summaries"]["whole"] == summary_memory(shape, 131_072).total
    assert found["summaries"]["sharded"] == summary_memory(shape, 131_072, tensor_parallel=8).total
    assert found["summaries"]["sharded_chunk"] == summary_memory(shape, 131_072, tensor_parallel=8, chunk=16_384).total
    tensor = 131_072 * 2304 * 2
    assert found["pipeline"]["prenorm"] == {"total": 7 * tensor, "peak": tensor}
    for caching in ("none", "received", "all"):
        sent = [step.tensors * tensor for step in pipeline_transitions(shape, 4, 2, caching)]
        assert found["pipeline"][caching] == {"total": sum(sent), "peak": max(sent), "transitions": sent}
    assert found["pipeline"]["none"]["total"] > found["pipeline"]["received"]["total"]
    assert 0 < found["overhead"]["all"]["lowest"] < found["overhead"]["all"]["highest"] < 1


def test_a_shape_and_nothing_else(capsys):
    found = figures(capsys, "--num-layers", "8", "--hidden-size", "64", "--dtype", "float32")
    assert (found["model"]["sublayers_per_block"], found["model"]["num_blocks"]) == (2, 8)  # the default of 8 blocks
    assert sorted(found) == ["model", "summaries"]
    assert sorted(found["summaries"]) == ["sources", "whole"]
    assert found["summaries"]["sources"] == 9 * 4096 * 64 * 4


def test_overrides_of_a_preset(capsys):
    found = figures(capsys, "--preset", "tiny-block", "--num-blocks", "2", "--depth-weights", "sum", "--chunk", "512")
    assert (found["model"]["num_blocks"], found["model"]["depth_weights"]) == (2, "sum")
    assert found["summaries"]["chunk"] == found["summaries"]["whole"] / 8


def test_weights(capsys):
    found = figures(capsys, "--preset", "tiny-block", "--weights", "--dtype", "float32")
    (dtype,) = found["weights"]["memory"]
    assert dtype == "float32"
    total = sum(parameter.numel() for parameter in AttnResForCausalLM(load_preset("tiny-block")).parameters())
    assert found["weights"] == {"memory": {"float32": {"parameters": total, "bytes": 4 * total}}}


def test_text(capsys):
    main(
        [
            "--num-layers",
            "93",
            "--hidden-size",
            "7168",
            "--sublayers-per-block",
            "24",
            "--pipeline-ranks",
            "8",
            *HARDWARE,
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "93 decoder layers, L = 186 sublayers, S = 24, N = 8 blocks, D = 7168, 'mean'"
    assert [line.split()[0] for line in lines if line.startswith("  ")] == [
        "whole", "sources", "prenorm", "none", "received", "all", "none", "received", "all",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give `preset`, or the shape: `num_layers`, `hidden_size` missing."),
        (["--preset", "tiny-prenorm"], "`preset` must be one of kimi-k3-full"),
        (["--num-layers", "4", "--hidden-size", "8", "--weights"], "`weights` are counted on a model: give `preset`."),
        (["--preset", "tiny-block", "--num-layers", "4"], "Give `preset` or the shape, not both"),
        (["--num-layers", "4", "--hidden-size", "8", "--num-blocks", "9"], "`num_blocks` must be from 1 to the 8"),
        (["--preset", "tiny-block", "--num-blocks", "9"], "from 1 to the 8 sublayers"),
        (["--preset", "tiny-block", "--pipeline-ranks", "5"], "5 stages"),
        (["--preset", "tiny-block", "--flops", "400"], "A predicted overhead needs `activated_parameters`, `link_"),
    ],
)
def test_bad_arguments_are_refused(capsys, arguments, message):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("attnres-plan: error: ")
    assert message in line


COUNTS = ("num-layers", "hidden-size", "num-blocks", "sublayers-per-block", "tokens", "pipeline-ranks")
COUNTS += ("virtual-stages", "tensor-parallel", "chunk")


@pytest.mark.parametrize(("value", "rule"), [("0", "at least 1, got 0"), ("-3", "at least 1, got -3")])
@pytest.mark.parametrize("option", COUNTS)
def test_counts_start_at_one(capsys, option, value, rule):
    with pytest.raises(SystemExit, match="2"):
        main(["--num-layers", "4", "--hidden-size", "8", f"--{option}={value}"])
    assert f"attnres-plan: error: argument --{option}: must be {rule}" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "fast"])
@pytest.mark.parametrize("option", [name for name in HARDWARE if name.startswith("--")])
def test_hardware_is_in_positive_numbers(capsys, option, value):
    with pytest.raises(SystemExit, match="2"):
        main(["--num-layers", "4", "--hidden-size", "8", f"{option}={value}"])
    assert f"argument {option}: must be a number above 0, got '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "output"), DOCUMENTED)
def test_documented_commands_print_what_is_documented(capsys, arguments, output):
    main(shlex.split(arguments))
    assert capsys.readouterr().out.strip() == output.strip()


def test_six_commands_are_documented():
    assert len(DOCUMENTED) == DOCS.count("\nattnres-plan ") == 6
