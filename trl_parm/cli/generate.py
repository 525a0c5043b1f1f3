# SPDX-License-Identifier: Apache-2.0
"""`trl-parm generate`: decodes prompts with one method, at one preference or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from trl_parm.arguments import decoded, option, parse, required

from .common import load_data, progress, say


if TYPE_CHECKING:
    from trl_parm.evaluation.models import Models


@dataclass(kw_only=True)
class DecodingArguments:
    """The base model, the prompts, and how tokens are chosen."""

    model_name_or_path: str = option("", "The frozen base model: a folder or Hub id.")
    dtype: str = option("auto", "Of weights, such as bfloat16; auto: as they were saved.")
    model_kwargs: dict | str | None = option(None, "Further arguments of from_pretrained, such as {device_map: auto}.")
    template: str | None = option(None, "How the base reads a prompt: a text with {prompt}. Its chat template if not.")
    prompts: list[str] | None = option(None, "The prompts themselves.")
    prompts_data: dict | str | None = option(
        None, "A data set of prompts: a file or Hub id, or {path: , split: , where: }."
    )
    prompt_column: str = option("prompt", "Its column.")
    num_prompts: int | None = option(None, "So many of them, chosen by the seed.")
    max_prompt_length: int | None = option(None, "Most tokens of a prompt; its end stays.")
    seed: int = option(0, "Of the noise of all prompts, and of their choice.")
    batch_size: int = option(16, "Prompts decoded at once.")
    max_new_tokens: int = option(128, "Most tokens of a response.")
    do_sample: bool = option(False, "Sample, instead of taking the likeliest token.")
    temperature: float | None = option(None, "Of sampling.")
    top_k: int | None = option(None, "Of sampling; without effect if not given.")
    top_p: float | None = option(None, "Of sampling; without effect if not given.")
    min_p: float | None = option(None, "Of sampling; without effect if not given.")

    def __post_init__(self) -> None:
        self.model_kwargs, self.prompts_data = decoded(self.model_kwargs), decoded(self.prompts_data)
        required(self, "model_name_or_path")
        if bool(self.prompts) == bool(self.prompts_data):
            raise ValueError("Give either `prompts` or `prompts_data`.")

    def models(self) -> Models:
        """The base model and how to load others, nothing of which is loaded yet."""
        from trl_parm.evaluation.models import Models

        kwargs: Any = self.model_kwargs or {}
        return Models(self.model_name_or_path, self.dtype, **kwargs)

    def read_prompts(self) -> list[Any]:
        """The distinct prompts in their order, or `num_prompts` of them.

        Which of them are chosen depends on the seed and on the prompts alone, not on their order.

        Raises:
            ValueError: no such column, or fewer prompts than asked for.
        """
        from trl_parm.noise import row_seed
        from trl_parm.texts import prompt_key

        found: dict[str, Any] = {prompt_key(prompt): prompt for prompt in self.prompts or self._column()}
        if self.num_prompts is None:
            return list(found.values())
        if not 0 < self.num_prompts <= len(found):
            raise ValueError(f"`num_prompts` is {self.num_prompts}, but there are {len(found)} distinct prompts.")
        chosen = set(sorted(found, key=lambda key: row_seed(self.seed, ["choice", key]))[: self.num_prompts])
        return [prompt for key, prompt in found.items() if key in chosen]

    def settings(self) -> dict[str, Any]:
        """Arguments of [`evaluate`] that are the same for all methods."""
        sampling = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        return {
            "batch_size": self.batch_size,
            "seed": self.seed,
            "template": self.template,
            "max_prompt_length": self.max_prompt_length,
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.do_sample,
            **{name: value for name, value in sampling.items() if value is not None},
        }

    def _column(self) -> Sequence[Any]:
        data = load_data(self.prompts_data)
        if self.prompt_column not in data.column_names:
            raise ValueError(
                f"The prompts' data has no column {self.prompt_column!r}; it has {', '.join(data.column_names)}."
            )
        return data[self.prompt_column][:]


@dataclass(kw_only=True)
class GenerateArguments(DecodingArguments):
    """Arguments of `trl-parm generate`."""

    method: dict | str | None = option(
        "base", "A method: its name, or {method: parm, arm: , beta: }, as JSON in a flag."
    )
    preferences: list[str] | None = option(None, "Each a mapping by objective, such as {helpful: 0.7, harmless: 0.3}.")
    output: str | None = option(None, "A JSONL file for the responses; else they are printed.")

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
