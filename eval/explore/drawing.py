# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The parts of the page, as HTML and SVG: tokens to choose from, the heatmap, losses, next tokens, downloads.

Plain markup, in which every value is escaped: no library of charts comes with the page, and no script beyond `page.js`.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from urllib.parse import quote

import torch

from .explorer import Connection, Explorer, NextToken, Run, Text


# Darker is more, so that the colours survive greyscale.
COLOURS = ((255, 255, 229), (173, 221, 142), (44, 127, 184), (8, 29, 88))
EMPTY_SOURCE = "#e4e4e7"

# How the heatmap is coloured.
SHARE, TIMES_PLAIN = "share of the weight", "times an equal share"
SCALES = (SHARE, TIMES_PLAIN)
# Where the second scale may end: queries that were trained for a few steps differ by a few percent.
SPREADS = (1.05, 1.1, 1.2, 1.5, 2, 4, 8)

LEFT, TOP, ROW, LEGEND = 118, 40, 14, 44  # of the picture, in pixels
WIDEST, NARROWEST, CELLS = 34, 12, 216


def colour(position: float) -> str:
    """The colour at `position`, from 0 (light) to 1 (dark), as CSS takes it."""
    step, part = divmod(min(max(position, 0), 1) * (len(COLOURS) - 1), 1)
    low, high = COLOURS[int(step)], COLOURS[min(int(step) + 1, len(COLOURS) - 1)]
    return "#" + "".join(f"{round(start + part * (end - start)):02x}" for start, end in zip(low, high))


def spread_of(times: torch.Tensor) -> float:
    """The least of `SPREADS` that all of these weights `[L + 1, N + 1]`, relative to an equal share, are within."""
    weights = times[times > 0]  # neither removed nor NaN
    farthest = float(weights.log2().abs().max().exp2())
    return next((spread for spread in SPREADS if farthest <= spread), SPREADS[-1])


def position_on(scale: str, share: float, times: float, spread: float) -> float:
    """Where a weight lies on a scale, from 0 to 1; the second ends at `1 / spread` and `spread`."""
    if scale == SHARE:
        return math.sqrt(max(share, 0))
    return 0 if times <= 0 else math.log(times, spread) / 2 + 0.5


def scale_labels(scale: str, spread: float) -> tuple[str, str, str]:
    """What is written at the ends and in the middle of a scale."""
    return ("0 %", "25 %", "100 %") if scale == SHARE else (f"1/{spread:g}", "1", f"{spread:g}")


def visible(piece: str) -> str:
    """A token's text with its line breaks to be seen; blanks are kept by the style sheet."""
    return escape(piece.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍"))


def draw_message(message: str) -> str:
    """Why something that was asked for is not shown."""
    return f'<div class="refused" role="alert">{escape(message)}</div>'


# --- Tokens ----------------------------------------------------------------------------------------------------------


def draw_tokens(text: Text, chosen: int | None, before: Run, after: Run) -> str:
    """Buttons, one a token and one for all of them; pressed is the one that is shown."""
    buttons = [_token_button("", "mean of all", chosen is None, "the heatmap's mean over all tokens")]
    for index, piece in enumerate(text.pieces):
        title = f"token {index + 1}"
        if index:
            title += f": loss {before.losses[index - 1]:.3f}"
            if after is not before:
                title += f", with the changes {after.losses[index - 1]:.3f}"
        buttons.append(_token_button(str(index), visible(piece), chosen == index, title))
    return f'<div class="tokens" role="group" aria-label="Tokens">{"".join(buttons)}</div>'


def _token_button(index: str, text: str, pressed: bool, title: str) -> str:
    return (
        f'<button type="button" class="token" data-token="{index}" aria-pressed="{str(pressed).lower()}" '
        f'data-tip="{escape(title)}">{text or "&nbsp;"}</button>'
    )


# --- Heatmap ---------------------------------------------------------------------------------------------------------


def draw_heatmap(
    explorer: Explorer,
    run: Run,
    token: int | None,
    kept: Mapping[Connection, float],
    chosen: Connection | None,
    scale: str,
    title: str,
) -> str:
    """An SVG with a row per sublayer and a column per source."""
    matrix, width = run.heatmap(token), max(min(CELLS // explorer.num_sources, WIDEST), NARROWEST)
    spread = spread_of(matrix * run.scale)
    right, bottom = LEFT + width * explorer.num_sources, TOP + ROW * len(matrix)
    parts = [
        f'<text x="4" y="14" class="title">{visible(title)}</text>',
        f'<text x="{LEFT}" y="{TOP - 14}">source: embedding, then blocks</text>',
    ]
    for source in range(explorer.num_sources):
        if width >= 16 or source % 5 == 0:
            middle = LEFT + width * (source + 0.5)
            parts.append(f'<text x="{middle}" y="{TOP - 3}" text-anchor="middle">{source or "e"}</text>')
    for sublayer in range(len(matrix)):
        top = TOP + ROW * sublayer
        name = explorer.name_sublayer(sublayer)
        parts.append(f'<text x="{LEFT - 5}" y="{top + ROW - 4}" text-anchor="end">{name}</text>')
        for source in range(explorer.sources_of(sublayer)):
            share = float(matrix[sublayer, source])
            times = share * float(run.scale[sublayer])
            fill = colour(position_on(scale, share, times, spread))
            part = kept.get((sublayer, source), 1.0)
            tip = f"{explorer.name((sublayer, source))}: {share:.1%} of the weight, {times:.3f} times an equal share"
            if part != 1:
                tip += f"; {part:.0%} kept"
            parts.append(_draw_cell((sublayer, source), LEFT + width * source, top, width, fill, tip, part))
    if chosen is not None:
        left, top = LEFT + width * chosen[1], TOP + ROW * chosen[0]
        parts.append(f'<rect class="chosen" x="{left}" y="{top}" width="{width}" height="{ROW}"/>')
    parts += _draw_legend(scale, spread, bottom + 12)
    height, widest = bottom + LEGEND, max(right + 4, 336)
    return (
        f'<div class="scroll"><svg class="heatmap" xmlns="http://www.w3.org/2000/svg" width="{widest}" height="{height}" '
        f'viewBox="0 0 {widest} {height}" role="img" aria-label="{escape(title)}" font-family="sans-serif" '
        f'font-size="10"><style>.title {{ font-size: 12px; font-weight: bold; }} .cross {{ stroke: #c2410c; '
        f"stroke-width: 2; fill: none; }} .chosen {{ stroke: #c2410c; stroke-width: 2.5; fill: none; "
        f'pointer-events: none; }}</style><rect width="{widest}" height="{height}" fill="white"/>{"".join(parts)}</svg></div>'
    )


def _draw_cell(connection: Connection, left: float, top: float, width: float, fill: str, tip: str, part: float) -> str:
    sublayer, source = connection
    cell = (
        f'<rect x="{left}" y="{top}" width="{width - 1}" height="{ROW - 1}" fill="{fill}" '
        f'data-sublayer="{sublayer}" data-source="{source}" data-tip="{escape(tip)}"/>'
    )
    if part == 1:
        return cell
    # A cross over what is removed, a stroke under what is weakened.
    bottom, right = top + ROW - 1, left + width - 1
    path = (
        f"M{left} {top}L{right} {bottom}M{left} {bottom}L{right} {top}" if part == 0 else f"M{left} {bottom}H{right}"
    )
    return f'{cell}<path class="cross" pointer-events="none" d="{path}"/>'


def _draw_legend(scale: str, spread: float, top: float) -> list[str]:
    steps, width = 24, 6
    parts = [
        f'<rect x="{LEFT + width * step}" y="{top}" width="{width}" height="9" fill="{colour(step / (steps - 1))}"/>'
        for step in range(steps)
    ]
    parts.append(f'<text x="{LEFT - 5}" y="{top + 8}" text-anchor="end">{scale}</text>')
    for place, label in zip((0, 0.5, 1), scale_labels(scale, spread)):
        parts.append(f'<text x="{LEFT + steps * width * place}" y="{top + 20}" text-anchor="middle">{label}</text>')
    return parts


# --- Tables ----------------------------------------------------------------------------------------------------------


def draw_connection(name: str, runs: Mapping[str, Run]) -> str:
    """The chosen connection, and the loss before and after all changes so far."""
    before, *others = runs.values()
    after = others[0] if len(others) > 1 else before
    change = f"loss {before.loss:.4f} → {after.loss:.4f} ({after.loss - before.loss:+.4f})"
    return f'<strong>{escape(name)}</strong><div class="change">{change}</div>'


def draw_losses(runs: Mapping[str, Run], weakened: Sequence[str]) -> str:
    """The mean loss of each run, by its name, how far it is from the first one's, and what the changes are."""
    first, *_ = runs.values()
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{run.loss:.4f}</td>'
        f"<td>{'' if run is first else f'{run.loss - first.loss:+.4f}'}</td></tr>"
        for name, run in runs.items()
    )
    changes = "".join(f"<li>{escape(change)}</li>" for change in weakened)
    return (
        '<table class="losses"><thead><tr><th>loss of this text</th><th>nats per token</th><th>difference</th></tr></thead>'
        f'<tbody>{rows}</tbody></table><ul class="changes">{changes}</ul>'
    )


def draw_next_tokens(tokens: Sequence[NextToken], columns: Sequence[str], text: Text, position: int) -> str:
    """Next tokens after a `position` in `text`, with a bar per run; `columns` are the runs' names."""
    follows = position + 1 if position + 1 < len(text.ids) else None
    # The likeliest fills its cell.
    longest = max(part for token in tokens for part in token.probabilities)
    rows = []
    for token in tokens:
        bars = "".join(
            f'<td><span class="bar" style="width: {part / longest:.1%}"></span><span>{part:.2%}</span></td>'
            for part in token.probabilities
        )
        mark = ' class="follows"' if follows is not None and token.token_id == text.ids[follows] else ""
        rows.append(f'<tr{mark}><th scope="row"><span class="piece">{visible(token.piece)}</span></th>{bars}</tr>')
    heads = "".join(f"<th>{escape(name)}</th>" for name in columns)
    ending = "" if follows is None else f', where <span class="piece">{visible(text.pieces[follows])}</span> follows'
    return (
        f'<p>Next token after <span class="piece">{visible(text.pieces[position])}</span>{ending}</p><table class="next">'
        f"<thead><tr><th>token</th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def draw_downloads(weights: str, predictions: str) -> str:
    """Links that carry the tables themselves, and a button that makes the picture of the heatmap."""

    def link(name: str, table: str, label: str) -> str:
        return f'<a download="{name}" href="data:text/csv;charset=utf-8,{quote(table)}">{label}</a>'

    links = [
        link("weights.csv", weights, "Weights (CSV)"),
        link("next_tokens.csv", predictions, "Next tokens (CSV)"),
        '<button type="button" data-picture="depth_weights.png">Heatmap (PNG)</button>',
    ]
    return f'<div class="downloads">Download: {" ".join(links)}</div>'
