# SPDX-License-Identifier: Apache-2.0
"""Where everything stands on the page."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import gradio as gr

from . import markup
from .answering import MOST_NEW_TOKENS, Answering
from .picture import picture
from .questions import Reply
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
            with gr.Column(scale=5, min_width=320):
                self._question()
                self._answers()
        self._session()
        self.inputs = [self.prompt, self.beta, self.most, self.temperature, self.seed, self.entries, *self.weights]
        self.outputs = [
            self.status, self.base, self.guided, self.legend, self.cost, self.picture, self.table, self.entries
        ]  # fmt: skip

    def _head(self, answering: Answering) -> None:
        base, arm = (html.escape(_short(name)) for name in (answering.models.base_name, answering.models.arm_name))
        _html(
            f'<div class="parm-head"><h1>Steer a frozen model with a slider</h1><p>The base model <b>{base}</b> stays '
            f"as it is. The reward model <b>{arm}</b> guides each token towards your preference.</p></div>"
        )
        self.entries = gr.State([])

    def _preference(self, beta: float) -> None:
        k = len(self.objectives)
        with gr.Group():
            self.weights = [
                gr.Slider(0, 1, start, step=0.01, label=name, interactive=k > 1, buttons=[], elem_id=f"weight-{i}")
                for i, (name, start) in enumerate(zip(self.objectives, uniform(k), strict=True))
            ]
        text = "The weights sum to 1: move one, the others follow." if k > 1 else "The only objective has all weight."
        _html(f'<div class="parm-note">{text}</div>')
        info = "Guidance has strength 1/β: smaller is stronger."
        self.beta = gr.Number(beta, label="β", info=info, step=0.1, elem_id="beta")
        with gr.Accordion("Sampling", open=False):
            self.most = gr.Slider(1, MOST_NEW_TOKENS, 60, step=1, label="Max new tokens", elem_id="most")
            self.temperature = gr.Slider(
                0, 2, 1.0, step=0.05, label="Temperature", info="0 is greedy.", elem_id="temperature"
            )
            self.seed = gr.Number(0, precision=0, label="Seed", info="Both answers share its noise.", elem_id="seed")

    def _question(self) -> None:
        with gr.Row(equal_height=False, elem_classes="parm-ask"):
            self.prompt = gr.Textbox(
                label="Prompt", placeholder="Ask something, then press Enter", lines=1, max_lines=6, autofocus=True,
                scale=6, min_width=260, elem_id="prompt",
            )  # fmt: skip
            self.send = gr.Button("Send", variant="primary", scale=1, min_width=100, elem_id="send")
            self.stop = gr.Button("Stop", scale=1, min_width=80, elem_id="stop")
        gr.Examples([[text] for text in EXAMPLES], inputs=[self.prompt], label="For example", elem_id="examples")
        self.status = _html(markup.status("Move a slider, ask, and compare."), elem_id="status")

    def _answers(self) -> None:
        base, guided = markup.cards(Reply(), "at your preference", self.measures)
        with gr.Row(equal_height=True):
            self.base = _html(base, min_width=260, elem_id="base")
            self.guided = _html(guided, min_width=260, elem_id="guided")
        self.legend = _html("", elem_id="legend")
        self.cost = _html("", elem_id="cost")

    def _session(self) -> None:
        with gr.Row(equal_height=True):
            _html('<h2 class="parm-title">This session</h2>')
            self.clear = gr.Button("Clear", size="sm", elem_id="clear")
        with gr.Row() if len(self.objectives) <= 2 else gr.Column():
            with gr.Column(scale=4, min_width=320):
                self.picture = _html(picture([], self.objectives), elem_id="picture")
            with gr.Column(scale=3, min_width=320):
                self.table = _html(markup.table([], self.objectives), elem_id="table")
                _html(markup.explained(self.measures))


def _html(text: str, **options: Any) -> gr.HTML:
    return gr.HTML(text, elem_classes="parm", **options)


def _short(name: str) -> str:
    """A folder without the path to it; an id on the Hub as it is."""
    return Path(name).resolve().name if Path(name).exists() else name
