# SPDX-License-Identifier: Apache-2.0
"""`trl-parm make_pairs`: several answers of a model to each prompt, the best and the worst by each reward as pairs."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_parm.arguments import option, parse, required

from .common import load_rewards, say, tell_costs
from .generate import DecodingArguments
from .relabel import check_sizes, label


ANSWERS = "answers"
"""The folder with all answers so far, one file for the first answers, one for the second, and so on."""


@dataclass(kw_only=True)
class MakePairsArguments(DecodingArguments):
    """Arguments of `trl-parm make_pairs`."""

    rewards: dict | None = option(None, "Objective to module:function, a model, or {source: , template: , ...}.")
    num_answers: int = option(8, "Answers to each prompt, 2 or more.")
    keep_unfinished: bool = option(False, "Keep answers that ended at max_new_tokens, too.")
    output_dir: str = option("", "Where answers and pairs go.")
    do_sample: bool = option(True, "Sample, as several answers to a prompt need it.")
    test_size: float = option(0.1, "Pairs in the test split: a share below 1, or a number.")
    validation_size: float = option(0.0, "The same for the validation split.")
    tie_margin: float = option(0.0, "How much rewards of a tie may differ.")
    ranked: bool = option(False, "Also write chosen and rejected for each objective.")
    restart: bool = option(False, "Remove answers of another configuration, instead of refusing to go on.")

    def __post_init__(self) -> None:
        super().__post_init__()
        required(self, "rewards", "output_dir")
        check_sizes(self)
        if self.num_answers < 2:
            raise ValueError(f"`num_answers` is {self.num_answers}, but a pair needs 2 or more.")
        if not self.do_sample:
            raise ValueError("`do_sample` is false, but greedy answers to a prompt are all the same. Let it be true.")


def main(argv: list[str]) -> None:
    arguments: MakePairsArguments = parse("make_pairs", MakePairsArguments, argv, __doc__)
    from datasets import Dataset

    from peft_pblora.output import check_output
    from peft_pblora.preference import check_objectives
    from trl_parm.relabel import WRITER

    folder, sources = Path(arguments.output_dir), load_rewards(arguments.rewards)
    objectives = check_objectives(sources)
    for name in ("train", "validation", "test"):
        check_output(folder / f"{name}.jsonl", WRITER)  # before anything is decoded
    prompts = arguments.read_prompts()
    say(f"{arguments.num_answers} answers to each of {len(prompts)} prompts go to {folder / ANSWERS}")
    rows, chat = _answers(arguments, folder, prompts, sources)
    judged = [row for row in rows if all(row[name] is not None for name in objectives)]
    unjudged = ""
    if len(judged) < len(rows):
        unjudged = f"A judge failed on {len(rows) - len(judged)} of {len(rows)} answers: the same command asks again. "
        say(f"{unjudged}Here they are left out.")
    kept = [row for row in judged if arguments.keep_unfinished or not is_cut(row, arguments.max_new_tokens)]
    pairs = choose_pairs(kept, objectives, arguments.tie_margin)
    left_out = f"{len(judged) - len(kept)} of {len(rows)} answers were left out, having no end"
    if not pairs:
        raise ValueError(
            f"There are no pairs: no prompt has two answers that differ in a reward, and {left_out}. {unjudged}Sample "
            "more with `num_answers`, longer ones with `max_new_tokens`, or keep those without an end with "
            "`keep_unfinished`."
        )
    say(f"{len(pairs)} pairs of answers to {len({str(pair['prompt']) for pair in pairs})} prompts; {left_out}.")
    template = arguments.template
    given = [as_conversation(pair) for pair in pairs] if chat else pairs
    data = Dataset.from_list(given, on_mixed_types="use_json")  # prompts may have messages of several shapes
    options = {"template": None if chat else template, "restart": True}  # scores of other pairs are no use any more
    written = label(data, sources, folder, arguments, "make_pairs", **options)
    tell_costs(sources)
    train = ["trl-parm", "train", "--model_name_or_path", arguments.model_name_or_path]
    train += ["--train_data", str(written["train"])]
    train += ["--eval_data", str(written["test"])] if "test" in written else []
    say(f"A reward model for them: {shlex.join([*train, '--output_dir', str(folder / 'arm')])}")


def _answers(
    arguments: MakePairsArguments, folder: Path, prompts: list[Any], sources: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], bool]:
    """All answers with their rewards, and whether the model read its prompts as conversations."""
    from trl_parm.noise import row_seed

    models = arguments.models()
    rows: list[dict[str, Any]] = []
    for number in range(arguments.num_answers):
        rows += arguments.evaluate(
            ["base"], [], prompts, models, row_seed(arguments.seed, ["answer", number]), rewards=sources,
            path=folder / ANSWERS / f"{number}.jsonl", restart=arguments.restart,
        )  # fmt: skip
    chat = arguments.template is None and models.tokenizer.chat_template is not None
    return rows, chat or not isinstance(prompts[0], str)


def is_cut(row: Mapping[str, Any], most: int) -> bool:
    """Whether an answer was cut off at so many tokens. A row of a release that did not note it is taken for one if it
    has as many."""
    noted = row.get("capped")
    return row["tokens"] >= most if noted is None else noted


def choose_pairs(
    answers: Iterable[Mapping[str, Any]], objectives: Sequence[str], tie_margin: float = 0.0
) -> list[dict[str, Any]]:
    """The best and the worst answer to each prompt by each objective; two objectives may choose the same pair.

    Which of a pair comes first is chance that depends on nothing but its texts, so that a place tells nothing.

    Args:
        answers (`Iterable[Mapping]`): Rows with `prompt`, `response` and a column for each objective.
        objectives (`Sequence[str]`): The objectives, higher is better.
        tie_margin (`float`, *optional*, defaults to 0.0): Best and worst answers that differ by no more make no pair.

    Returns:
        `list[dict]` with `prompt`, `response_0` and `response_1`, each pair of texts once.
    """
    from trl_parm.noise import row_seed
    from trl_parm.texts import prompt_key

    by_prompt: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in answers:
        if row["response"].strip():
            by_prompt.setdefault(prompt_key(row["prompt"]), {}).setdefault(row["response"], row)
    pairs: dict[tuple, dict[str, Any]] = {}
    for key, found in by_prompt.items():
        for objective in objectives:
            ranked = sorted(found.values(), key=lambda row: (row[objective], row["response"]))
            worst, best = ranked[0], ranked[-1]
            if best[objective] - worst[objective] > tie_margin:
                texts = sorted((best["response"], worst["response"]), key=lambda text: row_seed(0, [key, text]))
                pair = {"prompt": best["prompt"], "response_0": texts[0], "response_1": texts[1]}
                pairs.setdefault((key, *texts), pair)
    return list(pairs.values())


def as_conversation(pair: Mapping[str, Any]) -> dict[str, Any]:
    """A pair as messages, which training reads by the chat template, as the model read the prompt."""
    from trl_parm.texts import as_messages

    roles = {"prompt": "user", "response_0": "assistant", "response_1": "assistant"}
    return {name: as_messages(pair[name], role) for name, role in roles.items()}
