# SPDX-License-Identifier: Apache-2.0
"""The comparison of all methods on two CPU cores: the tasks of `configs/small/tasks`, one piece after the other.

    python examples/reproduce_small.py --task stories --model MODEL --pairs PAIRS.jsonl
    python examples/reproduce_small.py --task stories --only stories/200/5     # one piece
    python examples/reproduce_small.py --page                                  # the published page, from its tables

Every method is trained on the same pairs, with as many steps of pairs, and judged on the same prompts. A piece, one
budget and seed of a task, leaves a table of rewards in `--results`, from which the page is computed; what is complete
is not done again, and a piece that was stopped goes on. Adapters and answers go to `--work`, which is not needed
afterwards. The published tables are in `benchmarks/results/small`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path


CONFIGS = Path(__file__).parent / "configs" / "small" / "tasks"
PUBLISHED = Path(__file__).parents[1] / "benchmarks" / "results" / "small"
RESULTS = Path("runs/small/results")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not args.page:
        run(args)
    from results_page import write_page

    if page := write_page(args.results, args.work / "page", CONFIGS):
        print(f"\nThe results are in {page}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="*", help="tasks, of configs/small/tasks (default: all)")
    parser.add_argument("--only", nargs="*", default=[], help="pieces by the beginning of their names")
    parser.add_argument("--list", action="store_true", help="name the pieces, and run none")
    parser.add_argument("--page", action="store_true", help="only write the page, of the published tables by default")
    parser.add_argument("--model", help="a task's base model, in the place of the configuration's")
    parser.add_argument("--pairs", help="a task's pairs, in the place of the configuration's")
    parser.add_argument("--results", type=Path, help=f"where tables of rewards are kept (default: {RESULTS})")
    parser.add_argument("--work", type=Path, default=Path("runs/small"), help="where adapters and answers go")
    args = parser.parse_args(argv)
    args.results = args.results or (PUBLISHED if args.page else RESULTS)
    return args


def run(args: argparse.Namespace) -> None:
    """Runs the pieces that are asked for. Raises `ValueError` for tasks and pieces that there are not."""
    import datasets
    from comparison.field import field_pieces
    from comparison.piece import pieces
    from comparison.task import Task

    datasets.disable_progress_bars()  # of hundreds of short trainings
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    names = args.task or known
    if unknown := set(names) - set(known):
        raise ValueError(f"There is no task {sorted(unknown)[0]!r}. The tasks are {', '.join(known)}.")
    changes = {key: value for key in ("model", "pairs") if (value := getattr(args, key))}
    if changes and len(names) > 1:
        raise ValueError("`--model` and `--pairs` are of one task. Name it with `--task`.")
    every = [
        piece
        for name in names
        for made in (pieces, field_pieces)
        for piece in made(Task.read(CONFIGS / f"{name}.yaml", **changes), args.results, args.work)
    ]
    asked = [piece for piece in every if piece.is_asked(args.only)]
    if not asked:
        raise ValueError(f"No piece begins with {args.only}. `--list` names them.")
    for piece in asked:
        if args.list:
            print(piece.name)
            continue
        start = time.process_time()
        piece.run()
        print(f"{piece.name}: {time.process_time() - start:.0f} CPU-seconds", flush=True)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
