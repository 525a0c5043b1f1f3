# SPDX-License-Identifier: Apache-2.0
"""`trl-parm generate`: decodes prompts with one method, at one preference or several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from .common import decoded, parse, progress, say
from .decoding import DecodingArguments


@dataclass(kw_only=True)
class GenerateArguments(DecodingArguments):
    """Arguments of `trl-parm generate`."""

    method: dict | str | None = field(
        default="base", metadata={"help": "A method: its name, or {method: parm, arm: , beta: }, as JSON in a flag."}
    )
    preferences: list[str] | None = field(
        default=None, metadata={"help": "Each a mapping by objective, such as {helpful: 0.7, harmless: 0.3}."}
    )
    output: str | None = field(
        default=None, metadata={"help": "A JSONL file for the responses; else they are printed."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.method, self.preferences = decoded(self.method), decoded(self.preferences)
        if not all(isinstance(preference, Mapping) for preference in self.preferences or []):
            raise ValueError(
                f"`preferences` are {self.preferences}, but each must name its objectives, such as "
                '{"helpful": 0.7, "harmless": 0.3}.'
            )


def main(argv: list[str]) -> None:
    arguments: GenerateArguments = parse("generate", GenerateArguments, argv, __doc__)
    from trl_parm.evaluation.evaluate import Entry, evaluate

    preferences = cast(list[dict[str, float]], arguments.preferences or [])
    entry, prompts = Entry.of(cast(Any, arguments.method)), arguments.read_prompts()
    if not preferences and not entry.method.control:
        raise ValueError(f"The method {entry.name!r} needs `preferences`.")
    batches = len(entry.runs(preferences)) * -(-len(prompts) // arguments.batch_size)
    with progress(batches, "batch") as bar:
        table = evaluate(
            arguments.models(),
            [cast(Any, arguments.method)],
            preferences,
            prompts,
            dict.fromkeys(preferences[0] if preferences else ()),
            arguments.output,
            on_batch=lambda run: bar.update(),
            **arguments.settings(),
        )
    if arguments.output:
        from trl_parm.records import beside, write_run

        write_run(beside(arguments.output, "run.yaml"), "generate", vars(arguments))
        say(f"{len(table)} responses in {arguments.output}")
        return
    for row in cast(Any, table):
        say(f"# {row['method']}, {row['label']}: {row['prompt']}\n{row['response']}\n")
