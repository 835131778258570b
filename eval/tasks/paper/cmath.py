# Copyright 2026 The modeling-attnres maintainers.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""CMath (Chinese elementary-school word problems): worked examples and the comparison of numbers."""

import re
from fractions import Fraction


NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?")


def worked_examples() -> list[dict[str, str]]:
    """Three problems of our own in the style of the benchmark, with their solutions."""
    return [
        {
            "question": "小红有12本书，小明比小红多5本，两人一共有多少本书？",
            "solution": "小明有12+5=17本书，两人一共有12+17=29本书。答案是29。",
        },
        {
            "question": "一辆汽车每小时行60千米，3小时后离终点还有45千米，全程多少千米？",
            "solution": "3小时行了60×3=180千米，全程是180+45=225千米。答案是225。",
        },
        {
            "question": "学校买了8盒粉笔，每盒24支，平均分给6个班，每个班分到多少支？",
            "solution": "一共有8×24=192支，每个班分到192÷6=32支。答案是32。",
        },
    ]


def to_number(text: str) -> Fraction | None:
    """The last number of a text, exactly; `None` if it has none. Understands `1,200`, `0.5`, `3/4` and `25%`."""
    found = NUMBER.findall(text)
    if not found:
        return None
    number, percent = found[-1].replace(",", "").rstrip("%"), found[-1].endswith("%")
    numerator, _, denominator = number.partition("/")
    if denominator and int(denominator) == 0:
        return None
    value = Fraction(numerator) / Fraction(denominator or 1)
    return value / 100 if percent else value


def same_number(doc: dict, results: list[str]) -> dict[str, float]:
    """1.0 if the answer's last number after `答案是` (or, without it, its last number) equals `golden`."""
    answer = results[0].rsplit("答案是", maxsplit=1)[-1]
    value = to_number(answer)
    return {"exact_match": float(value is not None and value == to_number(str(doc["golden"])))}
