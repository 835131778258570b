# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
import re
from html.parser import HTMLParser
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
import torch
from test_explorer import TEXT, explorer
from tiny_backbones import NUM_SUBLAYERS

from modeling_attnres.eval.explore.drawing import (
    SCALES,
    SHARE,
    SPREADS,
    TIMES_PLAIN,
    colour,
    draw_connection,
    draw_downloads,
    draw_heatmap,
    draw_losses,
    draw_message,
    draw_next_tokens,
    draw_tokens,
    position_on,
    scale_labels,
    spread_of,
)
from modeling_attnres.eval.explore.explorer import NextToken, Text


@pytest.fixture(scope="module")
def seen():
    """An explorer, a text, and its runs as the model is and with two connections weakened."""
    shown = explorer(4)
    text = shown.read(TEXT)
    kept = {(3, 0): 0.0, (5, 1): 0.5}
    return shown, text, shown.run(text), shown.run(text, kept), kept


def test_darker_is_more():
    def brightness(value):
        red, green, blue = bytes.fromhex(colour(value)[1:])
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    levels = [brightness(step / 50) for step in range(51)]
    assert levels == sorted(levels, reverse=True)
    assert levels[0] - levels[-1] > 200
    assert colour(-1) == colour(0)
    assert colour(2) == colour(1) == "#081d58"


def test_scales_put_their_labels_where_they_say():
    assert [position_on(SHARE, share, 0, 4) for share in (0, 0.25, 1)] == [0, 0.5, 1]
    assert scale_labels(SHARE, 4) == ("0 %", "25 %", "100 %")
    for spread in SPREADS:
        found = [position_on(TIMES_PLAIN, 0, times, spread) for times in (1 / spread, 1, spread)]
        assert found == pytest.approx([0, 0.5, 1], abs=1e-9)
    assert scale_labels(TIMES_PLAIN, 1.05) == ("1/1.05", "1", "1.05")
    assert position_on(TIMES_PLAIN, 0, 0, 4) == 0


@pytest.mark.parametrize(
    ("times", "spread"), [([1, 1], 1.05), ([0.95, 1.0], 1.1), ([0, 1.3, float("nan")], 1.5), ([0.01, 3], 8)]
)
def test_a_scale_ends_where_the_weights_do(times, spread):
    assert spread_of(torch.tensor([times])) == spread


@pytest.mark.parametrize("scale", SCALES)
def test_every_connection_is_a_cell(seen, scale):
    shown, _, _, run, kept = seen
    drawing = ElementTree.fromstring(draw_heatmap(shown, run, 2, kept, (5, 1), scale, "Token <b>"))
    space = "{http://www.w3.org/2000/svg}"
    cells = {(int(c.get("data-sublayer")), int(c.get("data-source"))): c for c in drawing.iterfind(".//*[@data-tip]")}
    assert set(cells) == {(row, column) for row in range(NUM_SUBLAYERS + 1) for column in range(shown.sources_of(row))}
    spread = spread_of(run.heatmap(2) * run.scale)
    for (sublayer, source), cell in cells.items():
        share = float(run.shares[2, sublayer, source])
        times = share * float(run.scale[sublayer])
        assert cell.get("fill") == colour(position_on(scale, share, times, spread))
        assert cell.get("data-tip").startswith(
            f"{shown.name((sublayer, source))}: {share:.1%} of the weight, {times:.3f}"
        )
    assert cells[5, 1].get("data-tip").endswith("; 50% kept")
    assert len(drawing.findall(f".//{space}path")) == 2  # what is weakened is marked
    (chosen,) = drawing.findall(f".//{space}rect[@class='chosen']")
    assert [chosen.get(side) for side in ("x", "y")] == [cells[5, 1].get(side) for side in ("x", "y")]
    assert drawing.find(f".//{space}text").text == "Token <b>"


def test_tokens_are_buttons(seen):
    _, text, before, after, _ = seen
    found = re.findall(
        r'data-token="(\d*)" aria-pressed="(\w+)" data-tip="([^"]+)">([^<]+)<', draw_tokens(text, 3, before, after)
    )
    assert [name for *_, name in found] == ["mean of all", *text.pieces]
    assert [index for index, pressed, *_ in found if pressed == "true"] == ["3"]
    assert found[4][2] == f"token 4: loss {before.losses[2]:.3f}, with the changes {after.losses[2]:.3f}"


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)


def test_texts_are_no_markup(seen):
    _, _, before, after, _ = seen
    evil = '<img src=x onerror="alert(1)">\n'
    text = Text((1, 2, 3), (evil, evil, evil))
    tokens = [NextToken(2, evil, (0.5, 0.25))]
    drawings = [
        draw_tokens(text, None, before, after),
        draw_next_tokens(tokens, ["as it is", evil], text, 0),
        draw_losses({"as it is": before, evil: after}, [evil]),
        draw_connection(evil, {"as it is": before, "changed": after, "PreNorm": after}),
        draw_message(evil),
        draw_downloads(evil, evil),
    ]
    for drawing in drawings:
        assert "img" not in Tags(drawing).tags
    assert "↵" in drawings[0]


def test_bars_and_what_follows():
    text = Text((5, 6), ("a", "b"))
    drawing = draw_next_tokens([NextToken(6, "b", (0.4, 0.1)), NextToken(7, "c", (0.2, 0.2))], ["one", "two"], text, 0)
    assert re.findall(r"width: ([\d.]+%)", drawing) == ["100.0%", "25.0%", "50.0%", "50.0%"]
    assert re.findall(r"<span>([\d.]+%)</span>", drawing) == ["40.00%", "10.00%", "20.00%", "20.00%"]
    assert drawing.count('class="follows"') == 1
    assert "follows" not in draw_next_tokens([NextToken(6, "b", (0.4,))], ["one"], text, 1)


def test_losses_and_their_differences(seen):
    _, _, before, after, _ = seen
    drawing = draw_losses({"as it is": before, "changed": after}, ["one change"])
    assert re.findall(r"<td>([^<]*)</td>", drawing) == [
        *(f"{before.loss:.4f}", ""),
        *(f"{after.loss:.4f}", f"{after.loss - before.loss:+.4f}"),
    ]
    assert "<li>one change</li>" in drawing
    runs = {"as it is": before, "changed": after, "PreNorm": before}
    assert f"loss {before.loss:.4f} → {after.loss:.4f}" in draw_connection("x", runs)
    assert "(+0.0000)" in draw_connection("x", {"as it is": before, "PreNorm": after})


def test_links_carry_the_tables():
    table = "a,b\n1,ü%\n"
    (link,) = re.findall(
        r'download="weights.csv" href="data:text/csv;charset=utf-8,([^"]+)"', draw_downloads(table, "")
    )
    assert unquote(link) == table
