# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The page of `attnres-explore`, in Gradio: what is typed and clicked, and what is shown for it.

Every person's view is a `View` of their own, which Gradio keeps per browser tab. Nothing else is kept between two clicks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import gradio as gr

from .drawing import (
    SHARE,
    TIMES_PLAIN,
    draw_connection,
    draw_downloads,
    draw_heatmap,
    draw_losses,
    draw_message,
    draw_next_tokens,
    draw_tokens,
)
from .explorer import Connection, Explorer, RefusedError, Run, Text, predictions_csv, weights_csv


FOLDER = Path(__file__).parent
FIRST_TEXT = "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is"

AS_IT_IS, CHANGED = "as it is", "changed"


@dataclass(frozen=True)
class View:
    """What one person looks at.

    Attributes:
        before, after, plain: the runs of the model as it is, with weakened connections, and with zero queries.
        token: the token whose depth weights are shown; `None` for the mean over all.
        connection: the connection that the slider is about.
        kept: the kept part of each weakened connection.
    """

    text: Text
    before: Run
    after: Run
    plain: Run
    token: int | None = None
    connection: Connection | None = None
    kept: dict[Connection, float] = field(default_factory=dict)


class Page:
    """The parts of the page, and what each click does to them.

    Args:
        explorer: computes everything that is shown.
        name: the model's name, as the title says it.
    """

    def __init__(self, explorer: Explorer, name: str):
        self.explorer, self.name = explorer, name
        config = explorer.model.config
        self.is_sum = config.depth_weights == "sum"
        self.plain_name = "PreNorm" if self.is_sum else "equal weights"

    # --- What is shown

    @cached_property
    def blocks(self) -> gr.Blocks:
        with gr.Blocks(title=f"attnres-explore: {self.name}", analytics_enabled=False) as blocks:
            gr.Markdown(self._introduction())
            view = gr.State(None)
            self.text = gr.Textbox(FIRST_TEXT, label="Text", lines=2, max_lines=8, elem_id="text")
            self.read_button = gr.Button("Read", variant="primary", size="md", elem_id="read")
            self.message = self._html("message")
            self.tokens = self._clickable("tokens")
            with gr.Row():
                with gr.Column(scale=5, min_width=340):
                    self.scale = gr.Radio(
                        [TIMES_PLAIN, SHARE],
                        value=TIMES_PLAIN if self.is_sum else SHARE,
                        label="Colour",
                        show_label=False,
                        container=False,
                        elem_id="scale",
                    )
                    self.heatmap = self._clickable("heatmap")
                with gr.Column(scale=6, min_width=340, elem_id="results"):
                    with gr.Column(visible=False, elem_id="controls") as self.controls:
                        self.connection = self._html("connection")
                        self.slider = gr.Slider(0, 100, value=100, step=1, label="% kept", buttons=[], elem_id="kept")
                        with gr.Row():
                            self.off = gr.Button("Switch off", size="sm", min_width=80, elem_id="off")
                            self.restore = gr.Button("Restore", size="sm", min_width=80, elem_id="restore")
                            self.restore_all = gr.Button("Restore all", size="sm", min_width=80, elem_id="restore-all")
                    self.losses = self._html("losses")
                    self.next_tokens = self._html("next-tokens")
            self._listen(blocks, view)
        return blocks

    def _html(self, name: str, script: str | None = None) -> gr.HTML:
        return gr.HTML(elem_id=name, js_on_load=script, apply_default_css=False)

    def _clickable(self, name: str) -> gr.HTML:
        return self._html(name, (FOLDER / "page.js").read_text(encoding="utf-8"))

    def _introduction(self) -> str:
        config = self.explorer.model.config
        plain = (
            "PreNorm is the same model with zero queries: every source has the weight 1, as in a residual stream."
            if self.is_sum
            else "*Equal weights* is the same model with zero queries: every mix is the average of its sources."
        )
        return (
            f"# {self.name}\n{config.num_sublayers} sublayers in {config.num_blocks} blocks of up to "
            f"{config.sublayers_per_block}. Each sublayer reads a weighted mix of the embedding and the blocks before it. "
            "Click on a token to see its weights, and on a cell of the heatmap to weaken that connection. "
            f"{plain} A text may have {self.explorer.max_tokens:,} tokens."
        )

    def show(self, view: View, scale: str) -> dict:
        """All parts of the page that depend on the view, with what they show."""
        explorer, changed = self.explorer, bool(view.kept)
        runs = {AS_IT_IS: view.before, **({CHANGED: view.after} if changed else {}), self.plain_name: view.plain}
        position = len(view.text.ids) - 1 if view.token is None else view.token
        tokens = explorer.next_tokens(list(runs.values()), position)
        whose = (
            "mean over all tokens"
            if view.token is None
            else f"token {view.token + 1}, {view.text.pieces[view.token]!r}"
        )
        heatmap = draw_heatmap(
            explorer, view.after, view.token, view.kept, view.connection, scale, f"Depth weights: {whose}"
        )
        downloads = draw_downloads(
            weights_csv(explorer, view.after, view.token, view.kept), predictions_csv(tokens, list(runs))
        )
        kept = view.kept.get(view.connection, 1.0)
        connection = "" if view.connection is None else explorer.name(view.connection)
        weakened = [f"{explorer.name(connection)}: {part:.0%} kept" for connection, part in sorted(view.kept.items())]
        return {
            self.message: "",
            self.tokens: draw_tokens(view.text, view.token, view.before, view.after),
            self.heatmap: heatmap + downloads,
            self.controls: gr.Column(visible=view.connection is not None),
            self.connection: draw_connection(connection, runs),
            self.slider: 100 * kept,
            self.off: gr.Button(interactive=kept != 0),
            self.restore: gr.Button(interactive=kept != 1),
            self.restore_all: gr.Button(interactive=changed),
            self.losses: draw_losses(runs, weakened),
            self.next_tokens: draw_next_tokens(tokens, list(runs), view.text, position),
        }

    # --- What is done: from the present view to the next

    def read(self, view: View | None, text: str) -> View:
        text = self.explorer.read(text)
        run = self.explorer.run(text)
        return View(text, run, run, self.explorer.run_plain(text))

    def choose_token(self, view: View, token: int | None) -> View:
        return replace(view, token=token)

    def choose_connection(self, view: View, sublayer: int, source: int) -> View:
        return replace(view, connection=(sublayer, source))

    def keep(self, view: View, percent: float) -> View:
        return self._weaken(view, {**view.kept, view.connection: percent / 100})

    def switch_off(self, view: View) -> View:
        return self.keep(view, 0)

    def restore_chosen(self, view: View) -> View:
        return self.keep(view, 100)

    def restore_everything(self, view: View) -> View:
        return self._weaken(view, {})

    def recolour(self, view: View) -> View:
        return view

    def _weaken(self, view: View, kept: dict[Connection, float]) -> View:
        kept = {connection: part for connection, part in kept.items() if part != 1}
        return replace(view, kept=kept, after=self.explorer.run(view.text, kept) if kept else view.before)

    # --- What it is done by

    def _listen(self, blocks: gr.Blocks, view: gr.State):
        parts = [
            *(view, self.message, self.tokens, self.heatmap, self.controls, self.connection, self.slider),
            *(self.off, self.restore, self.restore_all, self.losses, self.next_tokens),
        ]

        def on(
            trigger: Callable, change: Callable, *inputs: gr.components.Component, told: Sequence[str] = (), **options
        ):
            """Shows the view that `change` makes of the present one, of `inputs` and of what the event has `told`."""

            def answer(present: View | None, scale: str, event: gr.EventData, *values) -> dict:
                if present is None and change != self.read:
                    return {self.message: draw_message("This page was started anew: press Read.")}
                try:
                    following = change(present, *values, *(getattr(event, name) for name in told))
                except RefusedError as error:
                    refused = {self.message: draw_message(str(error))}
                    if change == self.keep:
                        refused[self.slider] = 100 * present.kept.get(present.connection, 1.0)
                    return refused
                shown = self.show(following, scale)
                if change == self.keep:
                    del shown[self.slider]  # a hand may have moved it on meanwhile
                return {view: following, **shown}

            # One queue for all: what one person does is done in its order, and forwards take turns anyway.
            queue = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
            trigger(answer, [view, self.scale, *inputs], parts, **queue, **options)

        for trigger in (blocks.load, self.read_button.click, self.text.submit):
            on(trigger, self.read, self.text)
        on(self.tokens.select, self.choose_token, told=["token"])
        on(self.heatmap.select, self.choose_connection, told=["sublayer", "source"])
        on(self.slider.input, self.keep, self.slider, trigger_mode="always_last", show_progress="hidden")
        on(self.off.click, self.switch_off)
        on(self.restore.click, self.restore_chosen)
        on(self.restore_all.click, self.restore_everything)
        on(self.scale.input, self.recolour)


@contextmanager
def served(blocks: gr.Blocks, host: str, port: int) -> Iterator[str]:
    """Serves a page for as long as the block runs, and gives its address. Nobody but this machine is asked or told."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    # Each of these has a default, or an environment variable, that would open a door or write something down.
    closed = {"share": False, "enable_monitoring": False, "run_history": False, "mcp_server": False, "pwa": False}
    _, address, _ = blocks.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        inline=False,
        ssr_mode=False,
        footer_links=[],
        theme=theme,
        css_paths=FOLDER / "page.css",
        state_session_capacity=100,
        **closed,
    )
    try:
        yield address
    finally:
        blocks.close(verbose=False)
