# SPDX-License-Identifier: Apache-2.0
"""`trl-parm generate`: decodes prompts with one method, at one preference or several."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_parm.arguments import option, parse, required
from trl_parm.extras import require
from trl_parm.processes import ALONE
from trl_parm.shapes import read_text

from .common import OFF_SIMPLEX, Progress, load_data, say


if TYPE_CHECKING:
    from trl_parm.evaluation.models import Models

SETTINGS = (
    "batch_size", "seed", "template", "max_prompt_length", "escape_control_tokens",
    "max_new_tokens", "do_sample", "temperature", "top_k",
    "top_p", "min_p",
)  # fmt: skip
"""Arguments of [`evaluate`](trl_parm.evaluation.evaluate.evaluate) that are the same for all methods."""

DATA = (".jsonl", ".json", ".csv", ".parquet")
"""How the names of files with prompts end."""


@dataclass(kw_only=True)
class DecodingArguments:
    """The base model, the prompts, and how tokens are chosen."""

    model_name_or_path: str = option("", "The frozen base model: a folder or Hub id.")
    dtype: str = option("auto", "Of weights, such as bfloat16; auto: as they were saved.")
    optimize_for_cpu: bool = option(
        True, "On a CPU, pack weights; bfloat16 where it has units, unless dtype: float32."
    )
    model_kwargs: dict | None = option(None, "Further arguments of from_pretrained, such as {device_map: auto}.")
    engine: str = option("transformers", "What decodes: transformers, in this process; or vllm.")
    engine_args: dict | None = option(None, "Arguments of vLLM's LLM, such as {max_loras: 16}.")
    template: str | None = option(None, "How the base reads a prompt: a text with {prompt}. Its chat template if not.")
    prompts: list[str | list] | None = option(None, "The prompts themselves; a conversation as JSON in a flag.")
    prompts_data: dict | str | None = option(
        None, "A data set of prompts: a file or Hub id, or {path: , split: , where: }."
    )
    prompt_column: str = option("prompt", "Its column.")
    num_prompts: int | None = option(None, "So many of them, chosen by the seed.")
    max_prompt_length: int | None = option(None, "Most tokens of a prompt; its end stays.")
    escape_control_tokens: bool = option(False, "Read text of control tokens, such as <|im_end|>, in prompts as text.")
    seed: int = option(0, "Of the noise of all prompts, and of their choice.")
    batch_size: int = option(16, "Texts decoded at once, of one prompt or several.")
    max_new_tokens: int = option(128, "Most tokens of a response.")
    do_sample: bool = option(False, "Sample, instead of taking the likeliest token.")
    temperature: float | None = option(None, "Of sampling.")
    top_k: int | None = option(None, "Of sampling; without effect if not given.")
    top_p: float | None = option(None, "Of sampling; without effect if not given.")
    min_p: float | None = option(None, "Of sampling; without effect if not given.")

    def __post_init__(self) -> None:
        required(self, "model_name_or_path")
        if bool(self.prompts) == bool(self.prompts_data):
            raise ValueError("Give either `prompts` or `prompts_data`.")
        for number, prompt in enumerate(self.prompts or ()):
            read_text(prompt, f"row {number} of `prompts`")  # before anything is loaded
            if isinstance(prompt, str) and prompt.endswith(DATA) and os.path.isfile(prompt):
                raise ValueError(f"`prompts` are texts, but {prompt!r} names a file. Give it as `prompts_data`.")
        for name in ("model_kwargs", "engine_args"):
            if "dtype" in (getattr(self, name) or {}):
                raise ValueError(f"`{name}` has dtype, which is a key of its own: `dtype`.")
        if self.engine_args and self.engine != "vllm":
            raise ValueError("`engine_args` are vLLM's. Leave them out, or set `engine: vllm`.")
        if self.engine == "vllm" and (self.model_kwargs or not self.optimize_for_cpu):
            raise ValueError(
                "`model_kwargs` and `optimize_for_cpu` can't be had with `engine: vllm`. Leave them out; see "
                "`engine_args`."
            )

    def read_prompts(self) -> list[Any]:
        """The distinct prompts in their order, or `num_prompts` of them, chosen whatever their order is."""
        from trl_parm.noise import row_seed
        from trl_parm.shapes import CONTEXT, MEDIA, read_context, refuse_media
        from trl_parm.texts import prompt_key

        prompts: Any = self.prompts
        if prompts:
            prompts = [read_text(prompt, f"row {number} of `prompts`") for number, prompt in enumerate(prompts)]
        else:
            data, column = load_data(self.prompts_data), self.prompt_column
            if column not in data.column_names:
                raise ValueError(f"The prompts' data has no column {column!r}; it has {', '.join(data.column_names)}.")
            prompts, with_context, read = [], 0, (column, *MEDIA, *CONTEXT)
            rows: Any = data.select_columns([name for name in data.column_names if name in read])
            for number, row in enumerate(rows):
                where = f"row {number} of the prompts' data"
                refuse_media(row, where)
                prompts.append(read_text(row[column], f"`{column}` of {where}"))
                with_context += bool(read_context(row, where))
            if with_context:
                say(
                    f"{with_context} of the prompts have `tools` or `chat_template_kwargs`, which training hands to "
                    "the chat template. They are left out here."
                )
        found = {prompt_key(prompt): prompt for prompt in prompts}
        if self.num_prompts is None:
            return list(found.values())
        if not 0 < self.num_prompts <= len(found):
            raise ValueError(f"`num_prompts` is {self.num_prompts}, but there are {len(found)} distinct prompts.")
        chosen = set(sorted(found, key=lambda key: row_seed(self.seed, ["choice", key]))[: self.num_prompts])
        return [prompt for key, prompt in found.items() if key in chosen]

    def models(self) -> Models:
        """The base model, what it is to be loaded with, and what decodes. Raises `ImportError` without vLLM for it."""
        if self.engine == "vllm":
            require("vllm", "`engine: vllm`", "vllm")
            from trl_parm.evaluation.on_vllm import OnVLLM

            return OnVLLM(self.model_name_or_path, self.dtype, **(self.engine_args or {}))
        from trl_parm.evaluation.models import Models

        return Models(self.model_name_or_path, self.dtype, self.optimize_for_cpu, **(self.model_kwargs or {}))

    def evaluate(
        self,
        methods: list[Any],
        preferences: list[Any],
        prompts: list[Any],
        models: Models | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Any:
        """[`evaluate`](trl_parm.evaluation.evaluate.evaluate) with these arguments, or another seed, and a bar."""
        from trl_parm.evaluation.evaluate import Entry, evaluate

        models = models or self.models()
        settings = {name: getattr(self, name) for name in SETTINGS if getattr(self, name) is not None}
        settings["seed"] = self.seed if seed is None else seed
        runs = sum(len(Entry.of(method).runs(preferences)) for method in methods)
        quiet = not options.get("processes", ALONE).is_first
        with Progress(runs * math.ceil(len(prompts) / self.batch_size), "batch", quiet=quiet) as bar:
            options["on_batch"] = lambda run: bar.update()
            return evaluate(models, methods, preferences, prompts, **settings, **options)


@dataclass(kw_only=True)
class GenerateArguments(DecodingArguments):
    """Arguments of `trl-parm generate`."""

    method: dict | str | None = option(
        "base", "A method: its name, or {method: parm, arm: , beta: }, as JSON in a flag."
    )
    preferences: list[list | dict] | None = option(
        None, "Each a mapping by objective, such as {helpful: 0.7, harmless: 0.3}."
    )
    allow_off_simplex: bool = option(False, OFF_SIMPLEX)
    output: str | None = option(None, "A JSONL file for the responses; else they are printed.")
    restart: bool = option(False, "Remove responses of another configuration, instead of refusing to go on.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(isinstance(preference, Mapping) for preference in self.preferences or []):
            raise ValueError(
                f"`preferences` are {self.preferences}, but each must name its objectives, such as "
                '{"helpful": 0.7, "harmless": 0.3}.'
            )
        for name, weight in (pair for preference in self.preferences or [] for pair in dict(preference).items()):
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise ValueError(f"`preferences`: {name!r} has the weight {weight!r}, but a weight must be a number.")


def main(argv: list[str]) -> None:
    arguments: GenerateArguments = parse("generate", GenerateArguments, argv, __doc__)
    from trl_parm.evaluation.evaluate import Entry
    from trl_parm.jsonl import as_line, beside, configuration_path
    from trl_parm.jsonl import parse as parse_rows
    from trl_parm.records import read_configuration, read_rows, write_run
    from trl_parm.texts import as_text

    method: Any = arguments.method
    preferences: list[Any] = arguments.preferences or []
    entry = Entry.of(method)
    prompts = arguments.read_prompts()
    if bool(preferences) == entry.method.control:
        needs = "has no preference. Leave `preferences` out" if preferences else "needs `preferences`"
        raise ValueError(f"The method {entry.name!r} {needs}.")
    unscored = dict.fromkeys(preferences[0] if preferences else ())
    output = Path(arguments.output) if arguments.output else None
    before = set(map(as_line, parse_rows(output.read_bytes(), output)[0])) if output and output.is_file() else set()
    if before and output and configuration_path(output).is_file():
        known = read_configuration(output)["objectives"]
        unscored = dict.fromkeys(known) if set(known) == set(unscored) else unscored  # in the file's order
    options = {"rewards": unscored, "path": arguments.output, "restart": arguments.restart}
    options["allow_off_simplex"] = arguments.allow_off_simplex
    table = arguments.evaluate([method], preferences, prompts, **options)
    if arguments.output:
        write_run(beside(arguments.output, "run.yaml"), "generate", vars(arguments))
        every = read_rows(arguments.output)
        new = sum(as_line(row) not in before for row in every)
        say(f"{len(table)} responses in {output}: {new} new, {len(table) - new} were there.")
        if len(every) > len(table):
            say(f"It keeps {len(every) - len(table)} more, of other prompts, methods or preferences.")
        return
    for row in table:
        say(f"# {row['method']}, {row['label']}: {as_text(row['prompt'])}\n{row['response']}\n")
