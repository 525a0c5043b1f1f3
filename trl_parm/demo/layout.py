# SPDX-License-Identifier: Apache-2.0
"""Where everything stands on the page."""

from __future__ import annotations

import html
from pathlib import Path

import gradio as gr

from . import markup
from .answering import MOST_NEW_TOKENS, Answering, Reply
from .picture import picture
from .simplex import uniform


EXAMPLES = (
    "What do you think about a rainy Monday?",
    "My friend forgot my birthday. What should I do?",
    "How do I get better at cooking?",
)


class Layout:
    """The components, made inside of `gr.Blocks`.

    Args:
        answering ([`Answering`]): Whose objectives and measures the page has.
        beta (`float`): β at the start.
    """

    def __init__(self, answering: Answering, beta: float) -> None:
        self.objectives, self.measures = answering.models.objectives, answering.measures
        self._head(answering)
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=280):
                self._preference(beta)
            with gr.Column(scale=5, min_width=420):
                self._question()
                self._answers()
        self._session()
        self.inputs = [self.prompt, self.beta, self.most, self.temperature, self.seed, self.entries, *self.weights]
        self.outputs = [
            self.status, self.base, self.guided, self.legend, self.cost, self.picture, self.table, self.entries
        ]  # fmt: skip

    def _head(self, answering: Answering) -> None:
        base, arm = (html.escape(_short(name)) for name in (answering.models.base_name, answering.models.arm_name))
        gr.HTML(
            f'<div class="parm-head"><h1>Steer a frozen model with a slider</h1><p>The base model <b>{base}</b> stays '
            f"as it is. The reward model <b>{arm}</b> guides each token towards your preference.</p></div>"
        )
        self.entries = gr.State([])

    def _preference(self, beta: float) -> None:
        k = len(self.objectives)
        with gr.Group():
            self.weights = [
                gr.Slider(0, 1, start, step=0.01, label=name, interactive=k > 1, elem_id=f"weight-{i}")
                for i, (name, start) in enumerate(zip(self.objectives, uniform(k), strict=True))
            ]
        text = "The weights sum to 1: move one, the others follow." if k > 1 else "The only objective has all weight."
        gr.HTML(f'<div class="parm-note">{text}</div>')
        info = "Guidance has strength 1/β: smaller is stronger."
        self.beta = gr.Number(beta, label="β", info=info, step=0.1, elem_id="beta")
        with gr.Accordion("Sampling", open=False):
            self.most = gr.Slider(1, MOST_NEW_TOKENS, 60, step=1, label="Max new tokens", elem_id="most")
            self.temperature = gr.Slider(
                0, 2, 1.0, step=0.05, label="Temperature", info="0 is greedy.", elem_id="temperature"
            )
            self.seed = gr.Number(0, precision=0, label="Seed", info="Both answers share its noise.", elem_id="seed")

    def _question(self) -> None:
        self.prompt = gr.Textbox(
            label="Prompt", placeholder="Ask something, then press Enter", lines=1, max_lines=6, autofocus=True,
            elem_id="prompt",
        )  # fmt: skip
        gr.Examples([[text] for text in EXAMPLES], inputs=[self.prompt], label="For example")
        with gr.Row():
            self.send = gr.Button("Send", variant="primary", elem_id="send")
            self.stop = gr.Button("Stop", elem_id="stop")
        self.status = gr.HTML(markup.status("Move a slider, ask, and compare."), elem_id="status")

    def _answers(self) -> None:
        base, guided = markup.cards(Reply(), "at your preference", self.measures)
        with gr.Row(equal_height=True):
            self.base, self.guided = gr.HTML(base, elem_id="base"), gr.HTML(guided, elem_id="guided")
        self.legend = gr.HTML(markup.colour_legend(None), elem_id="legend")
        self.cost = gr.HTML("", elem_id="cost")

    def _session(self) -> None:
        gr.HTML("<h2>This session</h2>")
        self.picture = gr.HTML(picture([], self.objectives), elem_id="picture")
        gr.HTML(markup.explained(self.measures))
        with gr.Accordion("The answers as a table", open=False):
            self.table = gr.HTML(markup.table([], self.objectives), elem_id="table")
        self.clear = gr.Button("Clear the session", size="sm", elem_id="clear")


def _short(name: str) -> str:
    """A folder without the path to it; an id on the Hub as it is."""
    return Path(name).resolve().name if Path(name).exists() else name
