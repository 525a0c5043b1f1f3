# SPDX-License-Identifier: Apache-2.0
"""`trl-parm evaluate` on a share of `examples/configs/small` beside another checkout, case by case in turn.

    git worktree add ../before 7a1e14c
    python benchmarks/evaluation.py ../before [--prompts 16] [--tokens 40] [--steps 4] [--repeats 1] [--only TEXT]
    python benchmarks/evaluation.py ../before --only ARGS Transfer --products bfloat16 --table evaluation_bfloat16

One process for each checkout and kind of weights, plain or packed by [`optimize_for_cpu`](trl_parm.cpu), one thread,
CPU time. The settings are those of the folder, with the prompts and tokens that are named here; its adapters, which
`make reproduce-small` trains, are random ones of the same settings, so that texts have about the same length. ARGS
with a classifier, and Transfer-Q, are judged by a classifier of SmolLM2's size.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


HERE = Path(__file__).resolve().parent.parent
CONFIGS = HERE / "examples" / "configs" / "small"
ADAPTERS = ("parm", "svd_lora", "uniarm", "genarm_positive", "genarm_concise", "dpo_positive", "dpo_concise")
VARIANTS = (("this", True), ("other", True), ("other", False))
"""Checkout, and whether weights are packed."""
SEARCH = (("ARGS, a classifier, k 10, batch 1", 1, False), ("ARGS, a classifier, k 10, batch 4", 4, False),
          ("Transfer-Q, a classifier, k 10, batch 1", 1, True))  # fmt: skip


def main() -> None:
    args = parse_args()
    if args.worker:
        return work(args)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(args.folder or made)
        make_models(folder)
        compare(args, folder)


def compare(args: argparse.Namespace, folder: Path) -> None:
    checkouts = {"this": HERE, "other": Path(args.other).resolve()}
    workers = {variant: start(checkouts[variant[0]], variant[1], folder, args) for variant in VARIANTS}
    names = [worker.stdout.readline().split("|")[1:-1] for worker in workers.values()]
    rows, total = [], {variant: [0.0] * args.repeats for variant in VARIANTS}
    for name in names[0]:
        times: dict = {variant: [] for variant in VARIANTS}
        texts = {}
        for round_ in range(args.repeats):
            for variant in VARIANTS if round_ % 2 else VARIANTS[::-1]:
                seconds, texts[variant] = ask(workers[variant], name)
                times[variant].append(seconds)
                if name not in {case for case, *_ in SEARCH}:
                    total[variant][round_] += seconds
        rows.append(as_row(name, times, texts))
        print(rows[-1], flush=True)
    if any(map(any, total.values())):
        rows.append(as_row("these of the configuration", total, {}))
    for worker in workers.values():
        worker.stdin.close()
    from common import report

    commit = subprocess.run(["git", "-C", args.other, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    report(
        "evaluation",
        rows,
        [
            f"Other: commit {commit.stdout.strip()}. SmolLM2-135M-Instruct in float32, {args.prompts} prompts, "
            f"{args.tokens} new tokens, preferences in {args.steps} steps, sampled from the 50 likeliest; "
            f"`batch_size` {args.batch} here, {args.batch_before} there, which has one preference in a batch. Rows of "
            f"a classifier: {args.search_tokens} tokens of one text or four, greedy, after a call that warms up; a "
            "quarter of it for Transfer-Q. "
            f"CPU seconds, median of {args.repeats}; `packed` are weights packed by `optimize_for_cpu`, with products "
            f"in {args.products}; `both` is this checkout with packed weights beside the other one with plain ones.",
        ],
        table=args.table,
    )


def as_row(name: str, times: dict, texts: dict) -> dict[str, str]:
    least = {variant: statistics.median(values) for variant, values in times.items()}
    ours, theirs = texts.get(("this", True), []), texts.get(("other", True), [])
    same = sum(a == b for a, b in zip(ours, theirs))
    return {
        "": name,
        "other, plain": f"{least['other', False]:.1f} s",
        "other, packed": f"{least['other', True]:.1f} s",
        "this, packed": f"{least['this', True]:.1f} s",
        "packing alone": f"{least['other', True] / least['other', False]:.2f}",
        "this on top of packing": f"{least['this', True] / least['other', True]:.2f}",
        "both": f"{least['this', True] / least['other', False]:.2f}",
        "the same texts": f"{same} of {len(theirs)}" if theirs else "",
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", help="another checkout")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--steps", type=int, default=4, help="of the grid of preferences")
    parser.add_argument("--batch", type=int, default=80, help="texts in a batch here")
    parser.add_argument("--batch-before", type=int, default=16, help="prompts in a batch of the other checkout")
    parser.add_argument("--search-tokens", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], help="cases, by the beginning of their names")
    parser.add_argument("--products", default="float32", help="of `optimize_for_cpu`: float32 or bfloat16")
    parser.add_argument("--table", help="name of the table's files, that of the benchmark if not given")
    parser.add_argument("--folder", help="where models are kept, instead of a temporary folder")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--packed", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def start(checkout: Path, packed: bool, folder: Path, args: argparse.Namespace) -> subprocess.Popen:
    """A process that imports the packages of a checkout."""
    command = [sys.executable, __file__, args.other, "--worker", "--folder", str(folder), "--only", *args.only]
    command += ["--packed"] if packed else []
    for name in ("prompts", "tokens", "steps", "search_tokens", "products"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    command += ["--batch", str(args.batch if checkout == HERE else args.batch_before)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(worker: subprocess.Popen, name: str) -> tuple[float, list]:
    worker.stdin.write(name + "\n")
    worker.stdin.flush()
    seconds, texts = worker.stdout.readline().split(" ", 1)
    return float(seconds), json.loads(texts)


def work(args: argparse.Namespace) -> None:
    output, sys.stdout = sys.stdout, sys.stderr
    cases = {name: run for name, run in make_cases(args).items() if name.startswith(tuple(args.only or [""]))}
    cold = {name for name, *_ in SEARCH}
    print("|" + "|".join(cases) + "|", file=output, flush=True)
    for line in sys.stdin:
        name = line.strip()
        if name in cold:
            cold.remove(name)
            cases[name](count=2)
        start = time.process_time()
        found = cases[name]()
        print(time.process_time() - start, json.dumps(found), file=output, flush=True)


def make_models(folder: Path) -> None:
    """SmolLM2, and adapters on it that differ from trained ones in their numbers alone."""
    sys.path.append(str(HERE / "examples"))
    import torch
    import yaml
    from peft import LoraConfig, get_peft_model
    from smollm2 import smollm2
    from transformers import AutoModelForCausalLM

    from peft_pblora import MoSLoraConfig, PBLoraConfig, SVDLoraConfig

    kinds = {"pblora": PBLoraConfig, "svdlora": SVDLoraConfig, "moslora": MoSLoraConfig, "lora": LoraConfig}
    base = smollm2(folder / "runs" / "models" / "smollm2-135m-instruct")
    for seed, name in enumerate(ADAPTERS):
        if (folder / "runs" / "small" / name).exists():
            continue
        config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        kind = config.get("adapter", "lora")
        settings = config.get("adapter_kwargs", {"r": 8, "lora_alpha": 16})
        if kind != "lora":
            settings["objectives"] = ["positive", "concise"]
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base)
        targets = ["q_proj", "k_proj", "v_proj"]
        adapted = get_peft_model(model, kinds[kind](target_modules=targets, task_type="CAUSAL_LM", **settings))
        for parameter in adapted.parameters():
            if parameter.requires_grad and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        adapted.save_pretrained(folder / "runs" / "small" / name)


def make_cases(args: argparse.Namespace) -> dict:
    import torch
    import yaml
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    from peft_pblora import preference_grid
    from trl_parm import rewards as functions
    from trl_parm.evaluation.evaluate import evaluate
    from trl_parm.evaluation.models import Models

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    os.chdir(args.folder)
    # That of this checkout for both: the other may have none.
    spec = importlib.util.spec_from_file_location("packing", HERE / "trl_parm" / "cpu.py")
    packing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(packing)

    def packed(model):
        there = any(type(module).__name__ == "PackedLinear" for module in model.modules())
        return packing.optimize_for_cpu(model, getattr(torch, args.products)) if args.packed and not there else model

    class Loaded(Models):
        def _load(self, name):
            return packed(super()._load(name))

    config = yaml.safe_load((CONFIGS / "evaluate.yaml").read_text())
    lines = [json.loads(line) for line in (HERE / "examples" / "data" / "pairs.jsonl").read_text().splitlines()]
    prompts = list({str(row["prompt"]): row["prompt"] for row in lines if row["split"] == "test"}.values())
    rewards = {name: getattr(functions, path.split(":")[1]) for name, path in config["rewards"].items()}
    models = Loaded(config["model_name_or_path"])
    settings = {name: config[name] for name in ("do_sample", "top_k", "seed")}
    grid = preference_grid(list(rewards), args.steps).tolist()

    def run(method):
        table = evaluate(
            models, [method], grid, prompts[: args.prompts], rewards, None, batch_size=args.batch,
            max_new_tokens=args.tokens, **settings,
        )  # fmt: skip
        return table["response"][:]

    entries = [{"method": method} if isinstance(method, str) else method for method in config["methods"]]
    cases = {entry["method"]: lambda entry=entry: run(entry) for entry in entries}
    judge: list = []

    def search(rows, rolls_out, count=None):
        from trl_parm import decoding

        if not judge:
            torch.manual_seed(0)
            model = AutoModelForSequenceClassification.from_pretrained(models.name, num_labels=1)
            model.config.pad_token_id = models.tokenizer.pad_token_id
            judge.append(packed(model.eval()))
        tokenizer = AutoTokenizer.from_pretrained(models.name, padding_side="left")
        chats = tokenizer.apply_chat_template(
            prompts[:rows], add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
        )
        count = count or (max(2, args.search_tokens // 4) if rolls_out else args.search_tokens)
        settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        given = (judge[0], models.base) if rolls_out else (judge[0],)
        more = {"k": 10, **({"rollout_tokens": 10} if rolls_out else {})}
        name = "TransferQ" if rolls_out else "ARGS"
        if hasattr(decoding, name):
            return getattr(decoding, name)(models.base, *given, **more).generate(**chats, **settings).tolist()
        guide = getattr(decoding, f"{name}LogitsProcessor")(*given, **more)
        return models.base.generate(**chats, logits_processor=[guide], **settings).tolist()

    cases |= {
        name: lambda count=None, rows=rows, rolls=rolls: search(rows, rolls, count) for name, rows, rolls in SEARCH
    }
    _ = models.base
    return cases


if __name__ == "__main__":
    main()
