# SPDX-License-Identifier: Apache-2.0
"""The page: where everything stands, and what happens when a slider is moved or a question is asked."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from . import markup
from .answering import MOST_NEW_TOKENS, Answering
from .picture import picture
from .questions import Entry, Question, Reply, add
from .simplex import rescale, uniform
from .uploads import NoUploads


EXAMPLES = (
    "What do you think about a rainy Monday?",
    "My friend forgot my birthday. What should I do?",
    "How do I get better at cooking?",
)
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"]
MONO = ["ui-monospace", "Menlo", "Consolas", "monospace"]
STYLE = Path(__file__).with_name("style.css")
VISITORS = 32
"""How many questions may wait at once; gradio refuses further ones with a message of its own."""
OWN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""Of events that only this page has."""

logger = logging.getLogger(__name__)


class Page:
    """The demo's page for one set of models. It keeps nothing of a visitor: that is in the session.

    Args:
        answering ([`Answering`]): Answers the questions.
        beta (`float`, *optional*, defaults to 1.0): β at the start.
    """

    def __init__(self, answering: Answering, beta: float = 1.0) -> None:
        self.answering = answering
        self.objectives = answering.models.objectives
        with gr.Blocks(title="trl-parm demo", analytics_enabled=False) as self.blocks:
            _html(markup.head(_short(answering.models.base_name), _short(answering.models.arm_name)))
            entries = gr.State([])
            with gr.Row(equal_height=False):
                with gr.Column(scale=2, min_width=280):
                    weights = self._sliders()
                    settings = _settings(beta)
                with gr.Column(scale=5, min_width=320):
                    prompt, send, stop = _question_box()
                    shown = self._answers()
            clear, session = self._session()
            session.append(entries)
            asked = gr.on(
                [send.click, prompt.submit], self.ask, [prompt, *settings, entries, *weights], [*shown, *session],
                show_progress="hidden", trigger_mode="once", api_name="ask",
            )  # fmt: skip
            stopped = markup.status("Stopped.")
            stop.click(lambda: stopped, None, shown[0], cancels=[asked], queue=False, **OWN)
            clear.click(lambda: self._shown_session([]), None, session, **OWN)

    def launch(self, host: str = "127.0.0.1", port: int | None = None, share: bool = False, block: bool = True) -> str:
        """Serves the page and returns its URL; if `block`, not before the process is interrupted.

        Raises:
            OSError: the port is taken.
        """
        # Fonts of the visitor's machine: nothing comes from elsewhere.
        theme = gr.themes.Soft(font=FONTS, font_mono=MONO).set(
            body_background_fill="*neutral_50", body_background_fill_dark="*neutral_950",
            block_title_background_fill="none", block_title_background_fill_dark="none",
            block_title_text_color="*body_text_color", block_title_text_color_dark="*body_text_color",
            block_title_padding="0",
        )  # fmt: skip
        self.blocks.queue(max_size=VISITORS, default_concurrency_limit=VISITORS)
        _, url, _ = self.blocks.launch(
            server_name=host, server_port=port, share=share, prevent_thread_lock=not block, quiet=not block,
            footer_links=[], ssr_mode=False, theme=theme, css_paths=STYLE,
            app_kwargs={"middleware": [Middleware(NoUploads)]},
        )  # fmt: skip
        return url

    def follow(self, moved: int, *weights: float | None) -> Any:
        """What the other sliders say after one was moved. That one is left alone: nothing fights the hand on it."""
        others = rescale(weights, moved)
        del others[moved]
        return others[0] if len(others) == 1 else others

    def ask(
        self, prompt: str, beta: Any, most: Any, temperature: Any, seed: Any, entries: list[Entry], *weights: Any
    ) -> Iterator[tuple]:
        """Yields while the answers grow: the status, both answers, what their colours mean, the cost, and the
        session's picture, table and entries."""
        reply = None
        try:
            for name, value in (("β", beta), ("max new tokens", most), ("temperature", temperature), ("seed", seed)):
                if value is None:
                    raise ValueError(f"The field “{name}” is empty. Give a number.")
            clean = [float(weight or 0) for weight in weights]
            if not sum(clean) > 0:
                raise ValueError("All weights are 0. Move a slider.")
            shares = tuple(weight / sum(clean) for weight in clean)
            question = Question(prompt or "", shares, beta, int(most), temperature, int(seed))
            with closing(self.answering.ask(question)) as replies:
                for reply in replies:
                    yield *self._shown(question, reply), *[gr.skip()] * 3
        except Exception as error:
            text = str(error)
            if not isinstance(error, ValueError):
                logger.exception("A question could not be answered.")
                text = "Something went wrong. The log of the demo says what."
            yield markup.status(text, error=True), *[gr.skip()] * 7
            return
        if reply is not None and reply.done:
            yield *self._shown(question, reply), *self._shown_session(add(entries, question, reply))

    def _shown(self, question: Question, reply: Reply) -> tuple[str, ...]:
        if reply.done:
            text = "Done. Move a slider and send again."
        elif reply.ahead:
            text = f"Waiting: {reply.ahead} other question{'s' * (reply.ahead > 1)} first."
        else:
            text = "Writing…"
        named = zip(self.objectives, question.weights, strict=True)
        preference = " · ".join([*(f"{name} {weight:.2f}" for name, weight in named), f"β {question.beta:g}"])
        cards = markup.cards(reply, preference, self.answering.measures)
        return markup.status(text), *cards, markup.colour_legend(reply), markup.cost(reply)

    def _shown_session(self, entries: list[Entry]) -> tuple[str, str, list[Entry]]:
        return picture(entries, self.objectives), markup.table(entries, self.objectives), entries

    def _sliders(self) -> list[gr.Slider]:
        several = len(self.objectives) > 1
        with gr.Group():
            sliders = [
                gr.Slider(0, 1, start, step=0.01, label=name, interactive=several, buttons=[], elem_id=f"weight-{i}")
                for i, (name, start) in enumerate(zip(self.objectives, uniform(len(self.objectives)), strict=True))
            ]
        text = (
            "The weights sum to 1: move one, the others follow." if several else "The only objective has all weight."
        )
        _html(f'<div class="parm-note">{text}</div>')
        for moved, slider in enumerate(sliders if several else []):
            others = [other for other in sliders if other is not slider]
            follow = partial(self.follow, moved)
            slider.input(follow, list(sliders), others, queue=False, trigger_mode="always_last", **OWN)
        return sliders

    def _answers(self) -> list[gr.HTML]:
        """The status, both answers, the legend of their colours, and the cost."""
        status = _html(markup.status("Move a slider, ask, and compare."), elem_id="status")
        base, guided = markup.cards(Reply(), "at your preference", self.answering.measures)
        with gr.Row(equal_height=True):
            answers = [_html(base, min_width=260, elem_id="base"), _html(guided, min_width=260, elem_id="guided")]
        return [status, *answers, _html("", elem_id="legend"), _html("", elem_id="cost")]

    def _session(self) -> tuple[gr.Button, list[Any]]:
        """The button that clears the session, its picture and its table."""
        drawn, table, _ = self._shown_session([])
        with gr.Row(equal_height=True):
            _html('<h2 class="parm-title">This session</h2>')
            clear = gr.Button("Clear", size="sm", elem_id="clear")
        with gr.Row() if len(self.objectives) <= 2 else gr.Column():
            with gr.Column(scale=4, min_width=320):
                shown: list[Any] = [_html(drawn, elem_id="picture")]
            with gr.Column(scale=3, min_width=320):
                shown.append(_html(table, elem_id="table"))
                _html(markup.explained(self.answering.measures))
        return clear, shown


def _settings(beta: float) -> list[Any]:
    """β, the most new tokens, the temperature and the seed."""
    info = "Guidance has strength 1/β: smaller is stronger."
    fields: list[Any] = [gr.Number(beta, label="β", info=info, step=0.1, elem_id="beta")]
    with gr.Accordion("Sampling", open=False):
        return [
            *fields,
            gr.Slider(1, MOST_NEW_TOKENS, 60, step=1, label="Max new tokens", elem_id="most"),
            gr.Slider(0, 2, 1.0, step=0.05, label="Temperature", info="0 is greedy.", elem_id="temperature"),
            gr.Number(0, precision=0, label="Seed", info="Both answers share its noise.", elem_id="seed"),
        ]


def _question_box() -> tuple[gr.Textbox, gr.Button, gr.Button]:
    with gr.Row(equal_height=False, elem_classes="parm-ask"):
        prompt = gr.Textbox(
            label="Prompt", placeholder="Ask something, then press Enter", lines=1, max_lines=6, autofocus=True,
            scale=6, min_width=260, elem_id="prompt",
        )  # fmt: skip
        send = gr.Button("Send", variant="primary", scale=1, min_width=100, elem_id="send")
        stop = gr.Button("Stop", scale=1, min_width=80, elem_id="stop")
    gr.Examples([[text] for text in EXAMPLES], inputs=[prompt], label="For example", elem_id="examples")
    return prompt, send, stop


def _html(text: str, **options: Any) -> gr.HTML:
    return gr.HTML(text, elem_classes="parm", **options)


def _short(name: str) -> str:
    """A folder without the path to it; an id on the Hub as it is."""
    return Path(name).resolve().name if Path(name).exists() else name
