# SPDX-License-Identifier: Apache-2.0
"""The page of `docs/results.md`, worked out from the tables that `reproduce_small.py` keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from comparison.field import FIELD, beyond_table, read_field
from comparison.figures import draw
from comparison.methods import BASE, METHODS, UNTRAINED, methods_of
from comparison.pooled import ABOVE_MINUS_ONE, ABOVE_ZERO, GENARM, PARM, PRODUCT, Budget
from comparison.results import joined_versions
from comparison.settings import BETA, RATE, SCALE, Settings, best
from comparison.statements import at_policies_kl, edges, interval, other_products, others, statements, with_range
from comparison.task import Task
from comparison.training import FURTHER_KINDS

from peft_pblora.output import output_folder
from trl_parm.evaluation import Interval, markdown


WRITER = "results_page.py"
VERSIONS = ("python", "torch", "transformers", "peft", "trl")

INTRODUCTION = """# Results on two cores

Every method on the same prompts, trained on the same pairs with as many steps of pairs, on CPUs.
`make reproduce-small` trains, evaluates and writes this page from the tables in `benchmarks/results/small`: numbers
and sentences about them are worked out from these. Models and rewards are small, so that it shows whether methods
steer, not how well they would steer a large model towards helpful and harmless answers.

Rewards are *standardised*: minus the mean, by the standard deviation, of the base's answers. **MIP** is the mean inner
product of α and standardised rewards, **HV** the hypervolume of mean standardised rewards above −1 or 0 in all
objectives. Brackets are 95 % intervals over prompts *and* training seeds, where there are several; the scale, and with
it the point above which HV counts, is resampled with the prompts. Differences are paired, prompt by prompt and seed by
seed."""

SETTINGS = """- **Model**: `{model}`, frozen; also the backbone of all ARMs and policies. Adapters have rank 8 and
  lie on the attention's q, k and v.
- **Pairs** of its own answers, labelled for {objectives}: {pairs}. PARM, SVD-LoRA and UniARM see all of
  them; each ARM of GenARM, and each policy, has a part for itself, {share}, with its own label. Pairs of the
  part that this does not tell apart are left out, and others come again in their place.
- **Losses**: β is {reward_beta:g} in that of ARMs and {policy_beta:g} in DPO's, and was not searched. It is all that
  sets the strength of Rewarded Soups and MOD.
- **Evaluation**: {prompts} prompts that no training has seen, {points} preferences, {tokens} new tokens sampled from
  the {top_k} likeliest with the same noise for each prompt. {judges}
- **Cost** on one thread: {costs}.
- **Versions**: {versions}."""

CHOSEN = """- **`lora_alpha`**, in multiples of the usual one (8 of PARM's PBLoRA, 16 of others), has the least loss
  on {held_out} held-out pairs after {scale_steps:,} steps with the learning rate {middle:g}, in the mean over training
  seeds of their own, {scale_seeds}: {scales}. {scale_edges}
- **Learning rates** have the least loss with that, of the same pairs, after {steps:,} steps with the seeds {seeds}:
  {rates}. {rate_edges}
- **β** is the weakest guidance whose MIP is within a standard error of the best, on {validation} prompts of their
  own, of the same trainings: {betas}. {beta_edges}
- {policies}"""

METHODS_TEXT = """*GenARM's LoRAs as one* is `peft_pblora.from_loras` of GenARM's ARMs: their soup in one guide row,
without training. *ARM alone* is PARM's ARM without the base model. Rewarded Soups and MOD combine DPO policies, which
are another kind of model than an ARM. *PARM, disjoint start* begins as a LoRA of rank 4 for each objective (`r1=0`,
`r2=8`, `disjoint_start=True`), with about as many parameters as PARM by default; on the stories task it was added when
PARM's results after 200 steps were known. *Base × untrained ARM* multiplies the base by itself as strongly as PARM
guides it, which sharpens without any preference; *PARM, α permuted* guides by the wrong preference."""

JUDGES = {
    False: "The scorers that judge are those that labelled the pairs.",
    True: "Other scorers judge than those that labelled the pairs; β was chosen with these judges.",
}
FIGURES = """Crosses in the first figure are 95 % intervals over prompts and training seeds. Open marks in the second
are the same methods at the β with which they were to be as far from the base as PARM: the grey line, and its range
over seeds."""

FIELD_TEXT = """### {title}: the rest of the field, {steps} steps, training seed {seed}

Beside PARM and GenARM of the same seed; brackets are intervals over prompts alone. *UniARM by descriptions* and
*PARM, α in the prompt*, whose preference stands in the text that a plain LoRA reads, have `lora_alpha`, learning
rates and β chosen as above ({rates}; β {betas}). CAGE reads PARM at its vertices, or GenARM's ARMs, with its own
defaults (temperature 0.1, 50 candidates). *Worst case* has PARM's and GenARM's β, and no preference: its rewards are
those of one point."""

BEYOND_TEXT = """Beyond the simplex, where weights extrapolate (`allow_off_simplex=True`), mean rewards, and the
distance of the outer two by that of the vertices:"""

AGAIN = """## Run it

`make reproduce-small MODEL=...` runs all pieces one after the other; a piece that was stopped goes on, and one that is
complete is not done again. Another task is another file in `examples/configs/small/tasks`. Single pieces, such as one
seed, by the beginning of their names:

    python examples/reproduce_small.py --list
    python examples/reproduce_small.py --task stories --model MODEL --only stories/settings/200 stories/200/5
    python examples/reproduce_small.py --page"""

LIMITS = """## What this does not show

Small models, and rewards that short happy phrases satisfy; no judge but scorers. Learning rates and β were chosen with
few seeds of training, and are used for all. Prompts are a few templates, which training has seen too, with topics that
it has not; intervals take them for independent. That is about right for other topics, and too narrow for prompts of
another kind: counted by templates, some standard errors are more than twice as large
(`benchmarks/results/prompt_groups.md`). Of many comparisons some are told apart by chance: nothing is corrected for
their number. Hypervolume of few prompts is biased upwards, and of several noisy points more than of a control's one.
KL is the mean log-ratio of the tokens that were sampled, from the likeliest, so that it is no divergence of the whole
distributions. The noise of sampling is the same for all seeds of training. Times are those of a shared machine;
[decoding](decoding.md) has paired measurements."""


def write_page(results: Path, page: Path, configs: Path, resamples: int = 2000) -> Path | None:
    """Writes `results.md` and its figures into a folder, of every task with pieces; `None` if there is none.

    Args:
        results (`Path`): The folder with tables, of all tasks.
        page (`Path`): The folder to write.
        configs (`Path`): The folder with the tasks' configurations.
        resamples (`int`): Of the bootstrap.
    """
    tasks = [Task.read(path) for path in sorted(configs.glob("*.yaml"), reverse=True)]
    every = {task.name: (task, read_budgets(results / task.name, task, resamples)) for task in tasks}
    found = {name: (task, budgets) for name, (task, budgets) in every.items() if budgets}
    if not found:
        return None
    with output_folder(page, WRITER) as staging:
        (staging / "images").mkdir()
        parts = [INTRODUCTION, summary(found), METHODS_TEXT]
        for task, budgets in found.values():
            parts += section(task, budgets, results, staging / "images")
        parts += [AGAIN, LIMITS]
        (staging / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page / "results.md"


def read_budgets(results: Path, task: Task, resamples: int) -> list[Budget]:
    found = [Budget.read(results, steps, seeds, resamples, task.kinds) for steps, seeds in task.budgets.items()]
    return [budget for budget in found if budget]


def summary(found: Mapping[str, tuple[Task, Sequence[Budget]]]) -> str:
    """The claims of the project in one table."""
    rows = []
    for task, budgets in found.values():
        for budget in budgets:
            row = {"task": task.title, "steps": budget.steps, "seeds": len(budget.seeds)}
            for other, called in ((UNTRAINED, "untrained"), (GENARM, GENARM)):
                differences = budget.difference(PARM, other)
                row |= {f"{PARM} − {called}: {name}": interval(differences[name]) for name in (PRODUCT, ABOVE_ZERO)}
            found_ranks = budget.correlations(PARM)
            ranks = zip(budget.objectives, found_ranks[0], found_ranks[1:].min(0), found_ranks[1:].max(0))
            said = ", ".join(f"{name} {with_range(*values)}" for name, *values in ranks)
            rows.append({**row, "rank correlations (single seeds)": said})
    return "## In one table\n\n" + markdown(rows)


def section(task: Task, budgets: Sequence[Budget], results: Path, images: Path) -> list[str]:
    """What was run for a task, and what was found with each budget."""
    parts = [f"## {task.title}", settings_text(task, budgets) + lacking(task, budgets[0])]
    for budget in budgets:
        settings = Settings(task, task.settings_of(budget.steps), results / task.name, Path())
        check_chosen(settings, budget)
        name = f"results_{task.name}_{budget.steps}"
        draw(budget, images, name)
        parts += [
            f"### {task.title}: {budget.steps:,} steps, training seeds: {len(budget.seeds)}",
            chosen_text(task, budget, settings),
            "**What holds**\n\n" + "\n".join(f"- {line}" for line in statements(budget)),
            f"![Mean rewards of all methods at every preference](images/{name}.png)",
            f"![Mean inner product over KL to the base](images/{name}_kl.png)",
            FIGURES,
            markdown(measures_table(budget)),
            markdown(answers_table(budget)),
        ]
        if found := read_field(results / task.name, task, budget):
            parts += field_section(task, *found)
    for file in images.glob(f"results_{task.name}_*"):
        if file.suffix != ".png":
            file.unlink()
    return parts


def field_section(task: Task, field: Budget, beyond: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rest of the field, with one seed."""
    facts = field.facts[0]
    trained = [(kind, facts["trained"][kind]) for kind in FURTHER_KINDS]
    rates = ", ".join(f"{kind} {one['scale']:g} × `lora_alpha`, rate {one['rate']:g}" for kind, one in trained)
    betas = ", ".join(f"{m.title} {facts['betas'][name]:g}" for name, m in FIELD.items() if m.searched)
    head = FIELD_TEXT.format(title=task.title, steps=field.steps, seed=field.seeds[0], rates=rates, betas=betas)
    tables = (measures_table(field), answers_table(field))
    return [head, others(field), *map(markdown, tables), BEYOND_TEXT, markdown(beyond_table(field, beyond))]


def settings_text(task: Task, budgets: Sequence[Budget]) -> str:
    """What was run, from what the pieces say of themselves."""
    facts, every = budgets[0].facts[0], [one for budget in budgets for one in budget.facts]
    versions = joined_versions([{name: one["versions"][name] for name in VERSIONS} for one in every])
    return SETTINGS.format(
        model=facts["model"],
        pairs="; ".join(map(pairs_text, budgets)),
        objectives=" and ".join(facts["objectives"]),
        share=f"one of {len(facts['objectives'])}",
        judges=JUDGES[task.other_judges],
        prompts=len(budgets[0].fronts[BASE].rewards),
        points=len(budgets[0].fronts[PARM].labels),
        tokens=facts["max_new_tokens"],
        top_k=facts["top_k"],
        reward_beta=task.reward_beta,
        policy_beta=task.policy_beta,
        costs="; ".join(map(cost, budgets)),
        versions=", ".join(f"{name} {found}" for name, found in versions.items()),
    )


def lacking(task: Task, budget: Budget) -> str:
    """Which methods are not compared on a task, or not yet."""
    planned = {method.title for method in methods_of(task.kinds).values()}
    found = [method.title for method in METHODS.values() if method.title not in budget.fronts]
    to_come = [title for title in found if title in planned]
    never = [title for title in found if title not in planned]
    said = f"\n- **Still to come** on this task: {'; '.join(to_come)}." if to_come else ""
    return said + (f"\n- **Not compared** on this task: {'; '.join(never)}." if never else "")


def pairs_text(budget: Budget) -> str:
    """How many pairs a training of a budget has, and how many of them say that one objective costs another."""
    facts = budget.facts[0]
    against = 1 - np.mean([one["agreement"] for one in budget.facts])
    return (
        f"{facts['steps'] * facts['batch']:,} for {facts['steps']:,} steps of {facts['batch']}, in {against:.0%} of "
        "which the labels contradict each other"
    )


def check_chosen(settings: Settings, budget: Budget) -> None:
    """Raises `ValueError` if pieces have other settings than those that were chosen, as the page says of them."""
    facts = budget.facts[0]
    used = [(what, kind, one[what]) for kind, one in facts["trained"].items() for what in (SCALE, RATE) if what in one]
    used += [(BETA, name, beta) for name, beta in facts["betas"].items() if beta is not None]
    for what, of, found in used:
        chosen = best(settings.tried(what, of))["at"]
        if found != chosen:
            raise ValueError(
                f"The pieces of {budget.steps} steps have the {what} {found} of {of}, but {chosen} was chosen. Run "
                "them again, or put the settings back that they were run with."
            )


def chosen_text(task: Task, budget: Budget, settings: Settings) -> str:
    """The settings of a budget, with all that was tried."""
    kinds, products = budget.kinds, budget.facts[0].get("products")
    scales, rates = ({kind: settings.tried(what, kind) for kind in kinds} for what in (SCALE, RATE))
    betas = {m.title: settings.tried(BETA, name) for name, m in methods_of(kinds).items() if m.has_beta}
    return CHOSEN.format(
        held_out=task.validation_pairs,
        steps=settings.steps,
        seeds=", ".join(map(str, settings.seeds)),
        scale_steps=settings.of_scales.steps,
        scale_seeds=", ".join(map(str, settings.of_scales.seeds)),
        middle=task.middle_rate,
        scales=_chosen(scales, losses=True),
        scale_edges=edges(scales, SCALE) + other_products(scales, products),
        rates=_chosen(rates, losses=True),
        rate_edges=edges(rates, RATE) + other_products(rates, products),
        validation=task.validation_prompts,
        betas=_chosen(betas, losses=False),
        beta_edges=edges(betas, BETA) + other_products(betas, products),
        policies=at_policies_kl(settings, kinds),
    )


def cost(budget: Budget) -> str:
    """How long a piece takes."""
    training = np.mean([sum(kind["seconds"] for kind in one["trained"].values()) for one in budget.facts]) / 60
    decoding = sum(row["seconds"] for row in budget.rows) / len(budget.seeds) / 60
    spent = f"{training:.0f} CPU-minutes of training and {decoding:.0f} minutes of decoding"
    return f"a seed of {budget.steps:,} steps {spent}"


def measures_table(budget: Budget) -> list[dict[str, Any]]:
    """The measures of each method, a column for each."""
    found: dict[str, dict[str, Any]] = {}
    for row in budget.measures:
        text = str(Interval(row["value"], row["low"], row["high"]))
        found.setdefault(row["method"], {"method": row["method"]})[row["measure"]] = text
    columns = [PRODUCT, ABOVE_MINUS_ONE, ABOVE_ZERO, *(f"spread of {name}" for name in budget.objectives)]
    rows = []
    for method, cells in found.items():
        steered = {}
        if budget.fronts[method].preferences is not None:
            steered = dict(zip(budget.objectives, budget.correlations(method)[0].tolist()))
        rank = {f"rank, {name}": f"{steered[name]:.2f}" if name in steered else None for name in budget.objectives}
        rows.append({"method": method, **{name: cells.get(name) for name in columns}, **rank})
    return rows


def answers_table(budget: Budget) -> list[dict[str, Any]]:
    """What answers are like, and what they cost."""
    rows = []
    for method in dict.fromkeys(budget.names.values()):
        own = [row for row in budget.rows if budget.names[row["method"]] == method]
        tokens = sum(row["tokens"] for row in own)
        repeated = [row["repetition"] for row in own if row["repetition"] is not None]
        rows.append(
            {
                "method": method,
                **{name: f"{np.mean([row[name] for row in own]):.2f}" for name in budget.objectives},
                "KL to the base": f"{budget.kl(method):.2f}",
                "log π_base": f"{sum(row['log_prob_base'] for row in own) / tokens:.2f}",
                "repeated 4-grams": f"{np.mean(repeated):.1%}" if repeated else None,
                "at the cap": f"{np.mean([row['capped'] for row in own]):.0%}",
                "tokens": f"{tokens / len(own):.0f}",
                "extra parameters": budget.fronts[method].extra_parameters,
            }
        )
    return rows


def _chosen(tried: Mapping[str, Sequence[Mapping[str, Any]]], losses: bool) -> str:
    """The best of each, and all that was tried."""
    parts = []
    for name, rows in tried.items():
        own = best(rows)
        values = " ".join(
            f"{row['at']:g}: {row['value']:.3f}" if losses else f"{row['at']:g}: {-row['value']:.2f}" for row in rows
        )
        parts.append(f"{name} **{own['at']:g}** ({values})")
    return ", ".join(parts)
