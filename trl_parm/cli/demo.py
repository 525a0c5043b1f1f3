# SPDX-License-Identifier: Apache-2.0
"""`trl-parm demo`: a page where a preference slider steers a frozen model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from .common import parse, required


@dataclass
class DemoArguments:
    """Arguments of `python -m trl_parm.demo`."""

    arm: str = field(default="", metadata={"help": "The preference-conditioned adapter: a folder or Hub id."})
    model: str | None = field(default=None, metadata={"help": "The base model; the adapter's own if not given."})
    beta: float = field(default=1.0, metadata={"help": "β at the start; guidance has strength 1/β."})
    dtype: str = field(default="auto", metadata={"help": "Of the weights, such as float32."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on."})
    port: int | None = field(default=None, metadata={"help": "Port; the first free one from 7860 if not given."})
    share: bool = field(default=False, metadata={"help": "Make a public link through gradio's servers."})

    def __post_init__(self) -> None:
        required(self, "arm")


def main(argv: list[str]) -> int:
    arguments: DemoArguments = parse("demo", DemoArguments, argv, __doc__)
    from trl_parm.demo import main as serve

    return serve(words(arguments))


def words(arguments: DemoArguments) -> list[str]:
    """The arguments as the app's own command takes them."""
    given = {key: value for key, value in asdict(arguments).items() if value not in (None, False)}
    return [
        word for key, value in given.items() for word in ([f"--{key}"] if value is True else [f"--{key}", str(value)])
    ]
