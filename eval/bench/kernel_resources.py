# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Compiles the kernels of depth attention for NVIDIA devices, without one, and tables what each thread of them takes.

    python -m modeling_attnres.eval.bench.kernel_resources --document docs/kernels.md

Letters: D hidden size, n sources of a mix, R queries read together.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modeling_attnres import depth_launch_attnres as launch
from modeling_attnres import depth_triton_attnres as kernels
from modeling_attnres.command_line import Result, ToolParser, positive_int, run_tool
from modeling_attnres.text_files import split_at_marks, write_text


COMPUTE_CAPABILITIES = (80, 90, 100)
# SmolLM2-135M, Llama-8B, Kimi K2, Llama-70B.
HIDDEN_SIZES = (576, 4096, 7168, 8192)
ELEMENT_SIZES = {"bf16": 2, "fp32": 4}
NUM_SOURCES, NUM_ROWS = 9, 8
KERNELS = {
    "merge": kernels.merge_forward,
    "merge, backward": kernels.merge_backward,
    "phase 1": kernels.rows_forward,
    "phase 1, backward": kernels.rows_backward,
    "decode": kernels.decode_forward,
}
# Arguments in fp32 whatever the model's dtype; what else points to memory is in the model's, or in that of the bank.
FP32_POINTERS = (
    *("offset", "query", "floor", "logit", "saved", "scores", "weights", "partial"),
    *("logit_gradient", "offset_gradient", "to_offset", "to_scores"),
)
INTEGERS = ("num_tokens", "num_sources", "num_rows")
BEGIN, END = "<!-- resources: begin -->", "<!-- resources: end -->"


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel: all optional tensors of its form are given."""

    kernel: str
    form: str
    dtype: str
    hidden_size: int

    def tile(self) -> launch.Tile:
        size = self.hidden_size
        return {
            "merge": lambda: launch.merge_tile(size),
            "merge, backward": lambda: launch.merge_backward_tile(size, ELEMENT_SIZES[self.dtype]),
            "phase 1": lambda: launch.rows_tile(size, NUM_ROWS),
            "phase 1, backward": lambda: launch.rows_backward_tile(size, NUM_ROWS),
            "decode": lambda: launch.decode_tile(size),
        }[self.kernel]()

    def constants(self) -> dict[str, int | bool]:
        return {
            "SUM": self.form == "sum",
            "OPENS": False,
            "D": self.hidden_size,
            "WIDTH": self.tile().width,
            "CHUNK": launch.decode_chunk(self.hidden_size, NUM_SOURCES),
            "SOURCES": launch.power_of_two(NUM_SOURCES),
            "ROWS": launch.power_of_two(NUM_ROWS),
        }

    def type_of(self, argument: str) -> str | None:
        """The type of a kernel's argument as Triton writes it; `None` for a tensor that the form does not have."""
        if argument in INTEGERS:
            return "i32"
        if argument == "eps":
            return "fp32"
        name = argument.removesuffix("_ptr")
        if self.form == "mean" and (name.endswith("stream") or name in ("stream_gradient", "to_output")):
            return None
        in_bank = self.kernel == "decode" and name == "sources"
        return "*fp32" if name in FP32_POINTERS or in_bank else f"*{self.dtype}"


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers a thread, bytes of stack a thread (spills), bytes of shared memory."""

    registers: int
    spilled: int
    shared: int


def compile_case(case: Case, compute_capability: int) -> Resources:
    """Compiles for `compute_capability` (90 for 9.0) and asks the disassembler of Triton's wheel."""
    kernel = KERNELS[case.kernel]
    signature, constants, attributes = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        value = case.constants()[argument] if argument.isupper() else case.type_of(argument)
        if isinstance(value, str):
            signature[argument] = value
            if value.startswith("*"):  # an allocator's pointers are multiples of 16 bytes
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[argument], constants[(index,)] = "constexpr", value
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", compute_capability, 32)
    compiled = triton.compile(source, target=target, options=case.tile().options())
    return Resources(*_registers_and_stack(compiled.asm["cubin"]), compiled.metadata.shared)


def _registers_and_stack(binary: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        command = [str(tool), "--dump-resource-usage", str(path)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(f"`cuobjdump` must print REG, STACK and LOCAL, got {usage!r}.")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def cases(hidden_sizes: tuple[int, ...] = HIDDEN_SIZES) -> Iterator[Case]:
    for kernel in KERNELS:
        for hidden_size in hidden_sizes:
            for dtype in ELEMENT_SIZES:
                for form in ("mean", "sum"):
                    yield Case(kernel, form, dtype, hidden_size)


def table(hidden_sizes: tuple[int, ...], compute_capabilities: tuple[int, ...]) -> Iterator[str]:
    """Lines of Markdown: a row for each kernel and D, the larger of both forms."""
    heads = [f"{dtype}, sm_{capability}" for dtype in ELEMENT_SIZES for capability in compute_capabilities]
    yield f"| kernel | D | columns x warps | {' | '.join(heads)} | shared memory |"
    yield "|---" * (len(heads) + 4) + "|"
    rows: dict[tuple[str, int], list[Case]] = {}
    for case in cases(hidden_sizes):
        rows.setdefault((case.kernel, case.hidden_size), []).append(case)
    for (kernel, hidden_size), of_row in rows.items():
        cells, shared, tiles = [], 0, []
        for dtype in ELEMENT_SIZES:
            of_dtype = [case for case in of_row if case.dtype == dtype]
            tiles.append("{0.width} x {0.warps}".format(of_dtype[0].tile()))
            for capability in compute_capabilities:
                found = [compile_case(case, capability) for case in of_dtype]
                spilled = max(resources.spilled for resources in found)
                registers = max(resources.registers for resources in found)
                cells.append(f"{registers}" + (f" ({spilled} bytes spilled)" if spilled else ""))
                shared = max(shared, *(resources.shared for resources in found))
        tiles = " / ".join(dict.fromkeys(tiles))
        yield f"| {kernel} | {hidden_size} | {tiles} | {' | '.join(cells)} | {shared / 1024:.1f} KB |"


def write_into(document: Path, text: str):
    """Replaces what lies between the marks in `document`."""
    before, _, after = split_at_marks(document, BEGIN, END)
    write_text(document, f"{before}\n\n{text}\n\n{after}")


def build_parser() -> ToolParser:
    parser = ToolParser(
        prog="python -m modeling_attnres.eval.bench.kernel_resources", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--hidden-sizes", type=positive_int, nargs="+", default=HIDDEN_SIZES, metavar="D", help="of the models"
    )
    parser.add_argument(
        "--compute-capabilities",
        type=positive_int,
        nargs="+",
        default=COMPUTE_CAPABILITIES,
        metavar="CC",
        help="of the GPUs, such as 90",
    )
    parser.add_shared("--document")
    return parser


def run(options: argparse.Namespace) -> Result:
    """Prints the table line by line, and writes it into a page if asked to."""
    if options.document is not None:
        split_at_marks(options.document, BEGIN, END)  # a wrong page is an error before the kernels are compiled
    lines = []
    for line in table(tuple(options.hidden_sizes), tuple(options.compute_capabilities)):
        lines.append(line)
        print(line, flush=True)
    if options.document is not None:
        write_into(options.document, "\n".join(lines))
    return Result("", None)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, see [`modeling_attnres.command_line`]."""
    parser = build_parser()
    return run_tool(parser.prog, run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
