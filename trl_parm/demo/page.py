# SPDX-License-Identifier: Apache-2.0
"""What happens on the page: a slider is moved, a question is asked, and the outputs follow. `layout` places them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr

from . import markup
from .answering import Answering
from .layout import Layout
from .picture import picture
from .questions import Entry, Question, Reply, add
from .simplex import rescale


FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"]
MONO = ["ui-monospace", "Menlo", "Consolas", "monospace"]
STYLE = Path(__file__).with_name("style.css")
VISITORS = 32
"""How many questions may wait at once; gradio refuses further ones with a message of its own."""

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
