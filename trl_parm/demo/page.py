# SPDX-License-Identifier: Apache-2.0
"""The page: where everything stands, and what happens when a slider is moved or a question is asked."""

from __future__ import annotations

import html
import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr

from . import markup
from .answering import MOST_NEW_TOKENS, Answering
from .picture import picture
from .questions import Entry, Question, Reply, add
from .simplex import rescale, uniform


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

logger = logging.getLogger(__name__)


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
            self._connect(Layout(answering, beta))

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
            server_name=host, server_port=port, share=share, prevent_thread_lock=True, quiet=not block,
            footer_links=[], ssr_mode=False, theme=theme, css_paths=STYLE,
        )  # fmt: skip
        if block:
            self.blocks.block_thread()
        return url

    def follow(self, moved: int, *weights: float | None) -> Any:
        """What the other sliders say after one was moved. That one is left alone: nothing fights the hand on it."""
        others = [weight for i, weight in enumerate(rescale(weights, moved)) if i != moved]
        return others[0] if len(others) == 1 else others

    def ask(
        self, prompt: str, beta: Any, most: Any, temperature: Any, seed: Any, entries: list[Entry], *weights: Any
    ) -> Iterator[tuple]:
        """Yields what [`Layout.outputs`] show, while the answers grow."""
        last = None
        try:
            question = self._question(prompt, beta, most, temperature, seed, weights)
            with closing(self.answering.ask(question)) as replies:
                for last in replies:
                    yield *self._shown(question, last), *[gr.skip()] * 3
        except ValueError as error:
            yield markup.status(str(error), error=True), *[gr.skip()] * 7
            return
        except Exception:
            logger.exception("A question could not be answered.")
            yield markup.status("Something went wrong. The log of the demo says what.", error=True), *[gr.skip()] * 7
            return
        if last is not None and last.done:
            yield *self._shown(question, last), *self._session(add(entries, question, last))

    def _question(
        self, prompt: str, beta: Any, most: Any, temperature: Any, seed: Any, weights: Sequence[Any]
    ) -> Question:
        """What the page's fields ask. Raises `ValueError` for an empty one."""
        for name, value in (("β", beta), ("max new tokens", most), ("temperature", temperature), ("seed", seed)):
            if value is None:
                raise ValueError(f"The field “{name}” is empty. Give a number.")
        clean = [float(weight or 0) for weight in weights]
        if not sum(clean) > 0:
            raise ValueError("All weights are 0. Move a slider.")
        return Question(prompt or "", tuple(w / sum(clean) for w in clean), beta, int(most), temperature, int(seed))

    def _shown(self, question: Question, reply: Reply) -> tuple[str, ...]:
        """The status, both answers, what their colours mean, and the cost."""
        if reply.done:
            text = "Done. Move a slider and send again."
        elif reply.ahead:
            text = f"Waiting: {reply.ahead} other question{'s' * (reply.ahead > 1)} first."
        else:
            text = "Writing…"
        named = zip(self.objectives, question.weights, strict=True)
        preference = " · ".join([*(f"{name} {weight:.2f}" for name, weight in named), f"β {question.beta:g}"])
        legend = markup.colour_legend(markup.colour_scale(reply))
        cards = markup.cards(reply, preference, self.answering.measures)
        return markup.status(text), *cards, legend, markup.cost(reply)

    def _session(self, entries: list[Entry]) -> tuple[str, str, list[Entry]]:
        return picture(entries, self.objectives), markup.table(entries, self.objectives), entries

    def _connect(self, layout: Layout) -> None:
        sliders = layout.weights
        for moved, slider in enumerate(sliders if len(sliders) > 1 else []):

            def follow(*weights: float | None, moved: int = moved) -> Any:
                return self.follow(moved, *weights)

            others = [one for one in sliders if one is not slider]
            slider.input(
                follow, list(sliders), others, queue=False, show_progress="hidden", trigger_mode="always_last",
                api_visibility="private",
            )  # fmt: skip
        asked = gr.on(
            [layout.send.click, layout.prompt.submit], self.ask, layout.inputs, layout.outputs,
            show_progress="hidden", trigger_mode="once", api_name="ask",
        )  # fmt: skip
        layout.stop.click(
            lambda: markup.status("Stopped."), None, layout.status, cancels=[asked], queue=False,
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        layout.clear.click(
            lambda: self._session([]), None, layout.outputs[-3:], show_progress="hidden", api_visibility="private"
        )


def _html(text: str, **options: Any) -> gr.HTML:
    return gr.HTML(text, elem_classes="parm", **options)


def _short(name: str) -> str:
    """A folder without the path to it; an id on the Hub as it is."""
    return Path(name).resolve().name if Path(name).exists() else name
