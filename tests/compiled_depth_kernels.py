# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The kernels of depth attention compile for a device that is not there, from the very arguments that they are called with.

`test_depth_kernels_attnres.py` runs this file in a process of its own, with a cache of its own.
"""

from pathlib import Path

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from modeling_attnres import depth_launch_attnres
from modeling_attnres.depth_decode_kernel_attnres import decode_mix
from modeling_attnres.depth_kernels_attnres import merge, phase_one_rows, phase_one_rows_backward
from modeling_attnres.eval.bench import kernel_resources


class PretendedDevice:
    """What Triton asks of its driver before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiled(monkeypatch):
    """Names of the kernels compiled, none of them launched; one for each specialisation."""
    monkeypatch.setattr(depth_launch_attnres, "_why_not_on", lambda device: None)
    names, run = {}, JITFunction.run

    def compile_alone(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        names.setdefault(self.__name__, set()).add(kernel.hash)

    monkeypatch.setattr(JITFunction, "run", compile_alone)
    driver.set_active(PretendedDevice())  # for good: there is no other device, and the process is this file's own
    return names


def call_all(num_tokens: int, num_sources: int, hidden_size: int = 100):
    """Every function, once with all it can be given and once with as little as it needs."""

    def draw(*shape):
        return torch.randn(*shape, hidden_size).bfloat16()

    offset, query, floor = torch.randn(num_tokens), torch.randn(hidden_size), torch.tensor(0.1)
    row, recent, output, stream, weight = (draw(num_tokens) for _ in range(5))
    row.requires_grad_()
    merge(row, offset, query, recent, floor, impl="triton").mix.sum().backward()
    options = {"output": output, "stream": stream, "norm_weight": weight[0], "norm_eps": 1e-5, "impl": "triton"}
    merged = merge(row, offset, query, recent, floor, num_sources=num_sources + 1, **options)
    (merged.mix + merged.recent + merged.stream + merged.normed + merged.logit.unsqueeze(-1)).sum().backward()
    scores, sources = torch.randn(num_sources, 3, num_tokens), draw(num_sources, num_tokens)
    for form in ("mean", "sum"):
        rows, offset = phase_one_rows(scores, sources, form, impl="triton")
        phase_one_rows_backward(rows, offset, scores, sources, form, torch.zeros_like(sources), impl="triton")
        phase_one_rows_backward(rows, None, scores, sources, form, impl="triton")
    bank = sources.float()
    decode_mix(bank, num_sources, query, floor, impl="triton")
    decode_mix(bank, num_sources, query, floor, opens_block=True, **options)


def test_calls_compile_and_sizes_make_no_kernels_of_their_own(compiled):
    call_all(num_tokens=1, num_sources=3)
    counts = {name: len(hashes) for name, hashes in compiled.items()}
    assert counts == {
        **{"merge_forward": 2, "merge_backward": 2, "rows_forward": 2, "rows_backward": 4},
        "decode_forward": 2,
    }
    call_all(num_tokens=16, num_sources=4)
    assert {name: len(hashes) for name, hashes in compiled.items()} == counts


def test_resources_are_tabled_and_nothing_is_spilled(tmp_path, capsys):
    document = tmp_path / "kernels.md"
    document.write_text("Before.\n\n<!-- resources: begin -->\nold\n<!-- resources: end -->\n\nAfter.\n")
    arguments = ["--hidden-sizes", "4096", "--compute-capabilities", "90", "--document", str(document)]
    kernel_resources.main(arguments)
    text = document.read_text()
    assert text.startswith("Before.\n\n<!-- resources: begin -->\n\n| kernel | D |")
    assert text.endswith("|\n\n<!-- resources: end -->\n\nAfter.\n")
    rows = {line.split(" | ")[0][2:]: line.split(" | ") for line in text.splitlines()[6:-4]}
    assert list(rows) == list(kernel_resources.KERNELS)
    assert all(1 <= int(cell) <= 255 for row in rows.values() for cell in row[3:5])  # and no "(... spilled)"
    assert int(rows["merge"][3]) < 200
    assert text.count(capsys.readouterr().out.strip()) == 1


def test_the_documented_table_is_of_all_kernels():
    document = (Path(__file__).parents[1] / "docs/kernels.md").read_text(encoding="utf-8")
    assert "python -m modeling_attnres.eval.bench.kernel_resources --document docs/kernels.md" in document
    table = document.split(kernel_resources.BEGIN)[1].split(kernel_resources.END)[0].strip().splitlines()
    cells = [tuple(cell.strip() for cell in line.split("|")[1:4]) for line in table[2:]]
    expected = {(case.kernel, str(case.hidden_size)): case.tile() for case in kernel_resources.cases()}
    assert [cell[:2] for cell in cells] == list(expected)
    assert all(cell[2].endswith(f"{tile.width} x {tile.warps}") for cell, tile in zip(cells, expected.values()))
    assert "spilled" not in "".join(table)


def test_a_document_without_marks_is_refused(tmp_path):
    document = tmp_path / "kernels.md"
    document.write_text("nothing")
    with pytest.raises(ValueError, match="`--document` must hold <!-- resources: begin -->"):
        kernel_resources.write_into(document, "table")
    assert document.read_text() == "nothing"
