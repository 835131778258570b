# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""`attnres-explore` as people meet it: its own process, a real Chromium, real clicks. Run by `make test-page`.

What the page shows is compared with what [`Explorer`] computes from the same checkpoint.
"""

import csv
import functools
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import pytest
import torch
from PIL import Image
from test_explore_cli import free_port
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_attnres import AttnResForCausalLM
from modeling_attnres.eval.explore.drawing import SHARE, TIMES_PLAIN, colour, position_on, spread_of
from modeling_attnres.eval.explore.explorer import Explorer, weights_csv


pytestmark = pytest.mark.page
playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect

MAX_TOKENS = 60
TEXT = "def add(first, second):\n    return first + second"
TOOL = [sys.executable, "-m", "modeling_attnres.eval.explore.cli"]
# A busy machine takes its time; a test that fails waits as long as that.
PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def explorer(checkpoint) -> Explorer:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return Explorer(model, AutoTokenizer.from_pretrained(checkpoint), MAX_TOKENS)


def environment() -> dict[str, str]:
    """Of a user who has never heard of Gradio's variables, and whose proxy would betray a request."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GRADIO_")}
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    return {**kept, **proxies, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def address(checkpoint):
    """Where the tool serves its page; at the end it is interrupted, as by Ctrl-C."""
    command = [*TOOL, str(checkpoint), "--port", str(free_port()), "--max-tokens", str(MAX_TOKENS)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell's background job, which this may run in, ignores SIGINT, and so would its children.
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, env=environment(), preexec_fn=heeds, **pipes)
    line = process.stdout.readline()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/ \(Ctrl-C ends it\)\n", line), process.communicate(timeout=60)
    yield line.split()[0]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "attnres-explore: interrupted; the page is closed."


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium")
    assert path, "`make test-page` installs Chromium"
    expect.set_options(timeout=PATIENCE_MS)
    with playwright.sync_playwright() as driver:
        # Names of other hosts have no address here, so that what is asked of them fails at once.
        names = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", names])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page as a person of its own. Whatever they do, no other host is asked for anything."""
    requests, errors, contexts = [], [], []

    def open_page(width: int = 1280, height: int = 900):
        context = browser.new_context(viewport={"width": width, "height": height})
        context.set_default_timeout(PATIENCE_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("websocket", lambda socket: requests.append(socket.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        expect(page.locator("#next-tokens table")).to_be_visible()
        return page

    yield open_page
    for context in contexts:
        context.close()
    hosts = {urlsplit(url).netloc for url in requests if urlsplit(url).scheme not in ("data", "blob")}
    assert hosts == {urlsplit(address).netloc}
    assert not errors


def read(page, text: str):
    page.locator("#text textarea").fill(text)
    page.locator("#read").click()


def choose(page, sublayer: int, source: int):
    page.locator(f'#heatmap [data-sublayer="{sublayer}"][data-source="{source}"]').click()
    expect(page.locator("#controls")).to_be_visible()


def shown_losses(page) -> list[str]:
    return page.locator("#losses td").all_inner_texts()


def expect_losses(page, explorer, text: str, kept=None):
    """Waits until the page shows the losses that the computation gives."""
    text = explorer.read(text)
    before, plain = explorer.run(text), explorer.run_plain(text)
    after = [explorer.run(text, kept)] if kept else []
    cells = [f"{before.loss:.4f}", ""]
    for run in (*after, plain):
        cells += [f"{run.loss:.4f}", f"{run.loss - before.loss:+.4f}"]
    expect(page.locator("#losses td")).to_have_text(cells)
    return before, *after, plain


def expect_next_tokens(page, explorer, runs, position: int):
    tokens = explorer.next_tokens(runs, position)
    cells = [f"{part:.2%}" for token in tokens for part in token.probabilities]
    expect(page.locator("#next-tokens td")).to_have_text(cells)


def test_a_text_is_read(visit, explorer):
    page = visit()
    expect(page.locator("h1")).to_have_text("tiny")
    assert page.locator("[data-token]").count() == 1 + len(
        explorer.read(page.locator("#text textarea").input_value()).ids
    )
    read(page, TEXT)
    runs = expect_losses(page, explorer, TEXT)
    pieces = explorer.read(TEXT).pieces
    expect(page.locator("[data-token]")).to_have_count(1 + len(pieces))
    assert page.locator("[data-token]").all_text_contents()[1:] == [piece.replace("\n", "↵") for piece in pieces]
    assert page.locator("#losses tbody th").all_inner_texts() == ["as it is", "equal weights"]
    expect_next_tokens(page, explorer, runs, len(pieces) - 1)


def test_a_token_is_chosen_and_a_cell_says_what_it_is(visit, explorer):
    page = visit()
    read(page, TEXT)
    run, plain = expect_losses(page, explorer, TEXT)
    page.locator('[data-token="4"]').click()
    expect(page.locator('[data-token="4"]')).to_have_attribute("aria-pressed", "true")
    expect_next_tokens(page, explorer, [run, plain], 4)

    cell, share = page.locator('#heatmap [data-sublayer="5"][data-source="2"]'), float(run.shares[4, 5, 2])
    assert cell.get_attribute("fill") == colour(position_on(SHARE, share, 0, 1))
    cell.hover()
    tip = page.locator(".depth-tip")
    expect(tip).to_be_visible()
    times = share * explorer.sources_of(5)
    expect(tip).to_have_text(
        f"layer 2 feed-forward reads block 2: {share:.1%} of the weight, {times:.3f} times an equal share"
    )
    page.locator("h1").hover()
    expect(tip).to_be_hidden()
    spread = spread_of(run.heatmap(4) * run.scale)
    page.get_by_label(TIMES_PLAIN).check()
    expect(cell).to_have_attribute("fill", colour(position_on(TIMES_PLAIN, share, times, spread)))


def test_a_connection_is_switched_off_and_restored(visit, explorer):
    page = visit()
    read(page, TEXT)
    expect_losses(page, explorer, TEXT)
    choose(page, 3, 1)
    expect(page.locator("#connection strong")).to_have_text("layer 1 feed-forward reads block 1")
    page.locator("#off").click()
    kept = {(3, 1): 0.0}
    runs = expect_losses(page, explorer, TEXT, kept)
    assert abs(runs[1].loss - runs[0].loss) > 1e-3
    expect_next_tokens(page, explorer, runs, len(runs[0].losses))
    expect(page.locator("#off")).to_be_disabled()
    expect(page.locator(".changes li")).to_have_text(["layer 1 feed-forward reads block 1: 0% kept"])
    expect(page.locator("#connection .change")).to_have_text(
        f"loss {runs[0].loss:.4f} → {runs[1].loss:.4f} ({runs[1].loss - runs[0].loss:+.4f})"
    )

    choose(page, 6, 0)  # a second one, on top
    expect(page.locator("#off")).to_be_enabled()
    page.locator("#off").click()
    expect_losses(page, explorer, TEXT, {**kept, (6, 0): 0.0})
    page.locator("#restore").click()
    expect_losses(page, explorer, TEXT, kept)
    page.locator("#restore-all").click()
    expect_losses(page, explorer, TEXT)
    expect(page.locator(".changes li")).to_have_count(0)


def test_a_weight_is_dragged(visit, explorer):
    page = visit()
    read(page, TEXT)
    expect_losses(page, explorer, TEXT)
    choose(page, 4, 0)
    slider = page.locator("#kept input[type=range]")
    expect(slider).to_have_value("100")
    slider.focus()
    for _ in range(3):
        slider.press("ArrowLeft")
    expect_losses(page, explorer, TEXT, {(4, 0): 0.97})
    box = slider.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.97 * box["width"], middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.5 * box["width"], middle, steps=4)
    page.mouse.move(box["x"] - 5, middle, steps=4)
    page.mouse.up()
    expect_losses(page, explorer, TEXT, {(4, 0): 0.0})
    expect(slider).to_have_value("0")


def test_a_connection_that_cannot_go_says_why(visit, explorer):
    page = visit()
    read(page, TEXT)
    expect_losses(page, explorer, TEXT)
    choose(page, 0, 0)
    slider = page.locator("#kept input[type=range]")
    slider.focus()
    slider.press("Home")
    expect(page.get_by_role("alert")).to_have_text(re.compile("Sublayer 0 reads the embedding alone"))
    expect(slider).to_have_value("100")
    expect_losses(page, explorer, TEXT)
    choose(page, 3, 0)
    expect(page.get_by_role("alert")).to_have_count(0)


def test_downloads(visit, explorer, tmp_path):
    page = visit()
    read(page, TEXT)
    expect_losses(page, explorer, TEXT)
    page.locator('[data-token="6"]').click()
    choose(page, 5, 1)
    page.locator("#off").click()
    kept = {(5, 1): 0.0}
    _, run, _ = runs = expect_losses(page, explorer, TEXT, kept)

    with page.expect_download() as download:
        page.get_by_text("Weights (CSV)").click()
    assert download.value.suggested_filename == "weights.csv"
    download.value.save_as(tmp_path / "weights.csv")
    assert (tmp_path / "weights.csv").read_text(encoding="utf-8") == weights_csv(explorer, run, 6, kept)

    with page.expect_download() as download:
        page.get_by_text("Next tokens (CSV)").click()
    download.value.save_as(tmp_path / "next.csv")
    rows = list(csv.reader(io.StringIO((tmp_path / "next.csv").read_text(encoding="utf-8"))))
    assert rows[0] == ["token_id", "token", "as it is", "changed", "equal weights"]
    tokens = explorer.next_tokens(runs, 6)
    assert [(int(row[0]), row[1]) for row in rows[1:]] == [(token.token_id, token.piece) for token in tokens]
    found = torch.tensor([[float(part) for part in row[2:]] for row in rows[1:]])
    torch.testing.assert_close(found, torch.tensor([token.probabilities for token in tokens]), rtol=1e-4, atol=0)

    with page.expect_download() as download:
        page.get_by_text("Heatmap (PNG)").click()
    assert download.value.suggested_filename == "depth_weights.png"
    download.value.save_as(tmp_path / "depth_weights.png")
    picture = Image.open(tmp_path / "depth_weights.png").convert("RGB")
    drawing = page.locator("svg.heatmap")
    assert picture.size == tuple(2 * int(drawing.get_attribute(side)) for side in ("width", "height"))
    for sublayer, source in ((2, 0), (4, 2), (6, 3)):
        cell = page.locator(f'#heatmap [data-sublayer="{sublayer}"][data-source="{source}"]')
        left, top, width, height = (float(cell.get_attribute(name)) for name in ("x", "y", "width", "height"))
        expected = colour(position_on(SHARE, float(run.shares[6, sublayer, source]), 0, 1))
        found = picture.getpixel((int(2 * left + width), int(2 * top + height)))
        assert "#" + bytes(found).hex() == cell.get_attribute("fill") == expected


def test_two_people_do_not_meet(visit, explorer):
    first, second = visit(), visit()
    other = "class Stack:\n    pass"
    first.locator("#text textarea").fill(TEXT)
    second.locator("#text textarea").fill(other)
    first.locator("#read").click()
    second.locator("#read").click()
    expect_losses(first, explorer, TEXT)
    expect_losses(second, explorer, other)
    choose(first, 3, 0)
    choose(second, 5, 2)
    first.locator("#off").click()
    second.locator("#off").click()
    expect_losses(first, explorer, TEXT, {(3, 0): 0.0})
    expect_losses(second, explorer, other, {(5, 2): 0.0})
    second.reload()
    expect(second.locator("#next-tokens table")).to_be_visible()
    assert not second.locator(".changes li").count()
    first.locator('[data-token="2"]').click()
    expect(first.locator('[data-token="2"]')).to_have_attribute("aria-pressed", "true")
    expect_losses(first, explorer, TEXT, {(3, 0): 0.0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "ab " * 1000,
            f"Too long: a text may have {MAX_TOKENS} tokens and 2,400 characters; this one has 3,000 characters.",
        ),
        ("x = 1\n" * 30, f"Too long: a text may have {MAX_TOKENS} tokens and 2,400 characters; this one has "),
        ("", "Too short: a text needs at least 2 tokens, this one has 0."),
    ],
    ids=["characters", "tokens", "nothing"],
)
def test_texts_that_are_refused(visit, explorer, text, message):
    page = visit()
    read(page, TEXT)
    expect_losses(page, explorer, TEXT)
    read(page, text)
    expect(page.get_by_role("alert")).to_contain_text(message)
    expect_losses(page, explorer, TEXT)  # what was there stays
    read(page, TEXT + "s")
    expect_losses(page, explorer, TEXT + "s")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_markup_in_a_text_is_text(visit, explorer):
    page = visit()
    evil = '<img src="https://example.org/x.png" onerror="document.title=1">'
    read(page, evil)
    expect_losses(page, explorer, evil)
    assert page.locator(".tokens img, .next img").count() == 0
    assert "".join(page.locator("[data-token]").all_text_contents()[1:]) == evil


def test_on_a_phone_nothing_is_cut_off(visit, explorer):
    page = visit(390, 844)
    choose(page, 3, 1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    controls = page.locator("#controls").bounding_box()
    assert controls["y"] + controls["height"] == pytest.approx(844, abs=1)
    assert controls["height"] < 250


def test_a_sum_model_is_shown_beside_prenorm(checkpoint, browser, tmp_path):
    config = AttnResForCausalLM.from_pretrained(checkpoint).config
    config.depth_weights = "sum"
    AttnResForCausalLM(config).save_pretrained(tmp_path / "sum")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "sum")
    from modeling_attnres.eval.explore.page import Page, served

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sum")
    explorer = Explorer(model, AutoTokenizer.from_pretrained(tmp_path / "sum"), MAX_TOKENS)
    with served(Page(explorer, "sum").blocks, "127.0.0.1", free_port()) as address:
        page = browser.new_page()
        page.goto(address)
        expect(page.locator("#losses tbody th")).to_have_text(["as it is", "PreNorm"])
        # Fresh queries are zero: the model is the PreNorm model.
        assert shown_losses(page)[3] == "+0.0000"
        tips = [cell.get_attribute("data-tip") for cell in page.locator("#heatmap [data-sublayer]").all()]
        assert all(tip.endswith(", 1.000 times an equal share") for tip in tips)
        page.close()


def test_a_missing_model_is_one_line_and_no_server(tmp_path):
    port = free_port()
    process = subprocess.run(
        [*TOOL, str(tmp_path / "nowhere"), "--port", str(port)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
    )
    assert process.returncode == 2
    assert process.stdout == ""
    assert re.search(r"^attnres-explore: error: MODEL is neither an existing folder", process.stderr, re.MULTILINE)
    with socket.socket() as trial:
        assert trial.connect_ex(("127.0.0.1", port))
