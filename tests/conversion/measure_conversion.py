# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Converts in a process of its own and prints what it took: `python measure_conversion.py SOURCE OUT`."""

import json
import sys
import time
from pathlib import Path

from modeling_attnres.conversion import convert


def peak_bytes() -> int:
    """Largest resident set of this process so far, memory-mapped file pages included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    before, start = peak_bytes(), time.monotonic()
    report = convert(sys.argv[1], sys.argv[2], check="--no-check" not in sys.argv)
    figures = {"seconds": time.monotonic() - start, "peak_bytes_beyond_imports": peak_bytes() - before}
    print(json.dumps({**figures, "check": report.check, "max_logit_difference": report.max_logit_difference}))
