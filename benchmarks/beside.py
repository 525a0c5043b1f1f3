# SPDX-License-Identifier: Apache-2.0
"""Guided calls beside those of another checkout, such as an older commit: one process for each, call by call in turn.

    git worktree add ../before 7a1e14c
    python benchmarks/beside.py ../before [--base "Llama 68M"] [--guide "Llama 17M"] [--repeats 9] [--only TEXT]

Each process imports the packages of its own checkout and makes the same models of random weights. Where that checkout
has guided models (0.2), they are what is called; before, logits processors.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    args = parse_args()
    if args.worker:
        return work(args)
    here, other = Path(__file__).resolve().parent.parent, Path(args.other).resolve()
    checkouts = {"this": here, "other": other}
    workers = {name: start(path, args) for name, path in checkouts.items()}
    names = workers["this"].stdout.readline().split("|")[1:-1]
    assert workers["other"].stdout.readline().split("|")[1:-1] == names
    rows = []
    for name in names:
        times: dict[str, list[float]] = {checkout: [] for checkout in workers}
        texts = {}
        for round_ in range(args.repeats + 1):
            for checkout in workers if round_ % 2 else reversed(workers):
                seconds, texts[checkout] = ask(workers[checkout], name)
                if round_:
                    times[checkout].append(seconds)
        ratios = [a / b for a, b in zip(times["this"], times["other"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        same = texts["this"] == texts["other"]
        rows.append(
            {
                "": name,
                "this / other": f"{middle:.2f} [{low:.2f}, {high:.2f}]",
                "least / least": f"{min(times['this']) / min(times['other']):.2f}",
                "the same text": str(same),
            }
        )
        print(rows[-1], flush=True)
    for worker in workers.values():
        worker.stdin.close()
    from common import report

    commit = subprocess.run(["git", "-C", other, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    kernels = "with packed weights"
    if args.as_users_call:
        kernels = f"after `optimize_for_cpu` with products in {args.products}, where a checkout has it"
    sys.argv = ["OTHER" if argument == args.other else argument for argument in sys.argv]  # as the table names it
    report(
        "beside",
        rows,
        [
            f"Other: commit {commit.stdout.strip()}. Base {args.base}, guide of its own {args.guide}, random weights, "
            f"float32 {kernels}; {args.tokens} tokens after prompts of 32, whole calls; median [quartiles] "
            f"of the ratio of {args.repeats} paired rounds, and the ratio of the least times.",
        ],
        args.results,
        args.table,
    )


def parse_args() -> argparse.Namespace:
    from common import argument_parser

    parser = argument_parser(__doc__)
    parser.add_argument("other", help="another checkout")
    parser.add_argument("--base", default="Llama 68M")
    parser.add_argument("--guide", default="Llama 17M")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", default="", help="cases whose name has this text")
    parser.add_argument(
        "--as-users-call", action="store_true", help="models after `optimize_for_cpu`, where a checkout has it"
    )
    parser.add_argument("--products", default="bfloat16", help="their dtype, for --as-users-call")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def start(checkout: Path, args: argparse.Namespace) -> subprocess.Popen:
    """A process that imports the packages of a checkout."""
    command = [sys.executable, __file__, args.other, "--worker", "--base", args.base, "--guide", args.guide]
    command += ["--tokens", str(args.tokens), "--only", args.only, "--products", args.products]
    command += ["--as-users-call"] if args.as_users_call else []
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(worker: subprocess.Popen, name: str) -> tuple[float, str]:
    worker.stdin.write(name + "\n")
    worker.stdin.flush()
    seconds, text = worker.stdout.readline().split(" ", 1)
    return float(seconds), text


def work(args: argparse.Namespace) -> None:
    output, sys.stdout = sys.stdout, sys.stderr
    cases = {name: run for name, run in make_cases(args).items() if args.only in name}
    print("|" + "|".join(cases) + "|", file=output, flush=True)
    for line in sys.stdin:
        start = time.process_time()
        found = cases[line.strip()]()
        print(time.process_time() - start, found.flatten().tolist(), file=output, flush=True)


def make_cases(args: argparse.Namespace):
    import copy
    from itertools import count, cycle

    import torch
    from models import load, prompts, with_arm, with_loras

    import trl_parm
    from peft_pblora import preference_grid
    from trl_parm import LM, SpeculativeDecoding

    torch.set_num_threads(1)
    cpu, grid, preference = torch.device("cpu"), preference_grid(["a", "b"], 10), [0.3, 0.7]
    new = hasattr(trl_parm, "PARM")

    def fresh(name):
        model = load(name, torch.float32, cpu)
        if not args.as_users_call:
            use_onednn(model)
        elif hasattr(trl_parm, "optimize_for_cpu"):
            trl_parm.optimize_for_cpu(model, getattr(torch, args.products))
        return model

    def shared_copy(model):
        memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        packed = (getattr(m.__dict__.get("forward"), "weight", None) for m in model.modules())
        return copy.deepcopy(model, memo | {id(tensor): tensor for tensor in packed if tensor is not None})

    def generate(base, formula, ids, **more):
        """`formula` names a method and its arguments, which both kinds of call take."""
        method, *arguments = formula
        settings = {
            "do_sample": False,
            "max_new_tokens": args.tokens,
            "min_new_tokens": args.tokens,
            "pad_token_id": 0,
        }
        settings |= {"attention_mask": torch.ones_like(ids), **more}
        if method is None:
            return base.generate(ids, **settings)
        keywords = arguments.pop() if isinstance(arguments[-1], dict) and "adapters_of" in arguments[-1] else {}
        if new and not settings.pop("processor", False):
            return getattr(trl_parm, method)(base, *arguments, **keywords).generate(ids, **settings)
        settings.pop("processor", None)
        guide = getattr(trl_parm, f"{method}LogitsProcessor")(*arguments, **keywords)
        return base.generate(ids, logits_processor=[guide], **settings)

    base = fresh(args.base)
    on_base, loras = with_arm(shared_copy(base)), with_loras(shared_copy(base), ["a", "b"])
    small = fresh(args.guide)
    arm, three = with_arm(shared_copy(small)), with_loras(shared_copy(small), ["a", "b", "c"])
    arms = {"a": "a", "b": "b"}
    of_three = {"a": "a", "b": "b", "c": "c"}
    alphas = cycle(grid.tolist())
    speculative = SpeculativeDecoding(draft_tokens=3)
    cases = {}
    calls = count()

    def texts(batch):
        """Other prompts in every call: what an earlier one has read may still be there."""
        return (prompts(batch, 32, cpu) + next(calls)) % 30000

    for batch in (1, 8):
        cases |= {
            f"PARM on the base, batch {batch}": lambda batch=batch: generate(
                on_base.get_base_model(), ("PARM", on_base, preference), texts(batch)
            ),
            f"PARM on the base by a processor, batch {batch}": lambda batch=batch: generate(
                on_base.get_base_model(), ("PARM", on_base, preference), texts(batch), processor=True
            ),
            f"GenARM k=2 on the base, batch {batch}": lambda batch=batch: generate(
                loras.get_base_model(), ("GenARM", arms, preference, 1.0, {"adapters_of": loras}), texts(batch)
            ),
            f"PARM weak to strong, batch {batch}": lambda batch=batch: generate(
                base, ("PARM", arm, preference), texts(batch)
            ),
            f"PARM weak to strong by a processor, batch {batch}": lambda batch=batch: generate(
                base, ("PARM", arm, preference), texts(batch), processor=True
            ),
        }
    cases |= {
        "a new α in every call": lambda: generate(on_base.get_base_model(), ("PARM", on_base, next(alphas)), texts(1)),
        "eleven α of one prompt": lambda: generate(
            on_base.get_base_model(), ("PARM", on_base, grid), texts(1).repeat(11, 1)
        ),
        "GenARM k=3 weak to strong": lambda: generate(
            base, ("GenARM", of_three, [0.5, 0.3, 0.2], 1.0, {"adapters_of": three}), texts(1)
        ),
        "MOD-w2s weak to strong": lambda: generate(
            base,
            (
                "MODWeakToStrong", of_three, LM(three, adapter_name="a", disable_adapter=True), [0.5, 0.3, 0.2],
                {"adapters_of": three},
            ),
            texts(1),
        ),
        "beams, PARM weak to strong": lambda: generate(base, ("PARM", arm, preference), texts(1), num_beams=4),
        "speculative, drafts of 3": lambda: generate(
            base, ("PARM", arm, preference), texts(1), custom_generate=speculative
        ),
        "speculative, drafts of 3, batch 4": lambda: generate(
            base, ("PARM", arm, preference), texts(4), custom_generate=speculative
        ),
    }  # fmt: skip
    if args.as_users_call:
        cases["a training step of the demo"] = training_step(args)
    return cases


def training_step(args):
    """Forward and backward of SmolLM2 with the demo's adapter, settings and pairs, another batch in every call."""
    import tempfile
    from itertools import count

    import torch
    from models import load

    import trl_parm

    sys.path.insert(0, str(Path(trl_parm.__file__).parents[1] / "examples"))  # of its own checkout
    from quickstart import OBJECTIVES, PAIRS, by_objective, read_pairs
    from smollm2 import smollm2
    from transformers import AutoTokenizer

    from peft_pblora import PBLoraConfig

    model, tokenizer = (
        load("SmolLM2-135M", torch.float32, torch.device("cpu")),
        AutoTokenizer.from_pretrained(smollm2()),
    )
    if hasattr(trl_parm, "optimize_for_cpu"):
        trl_parm.optimize_for_cpu(model, getattr(torch, args.products))
    adapter = PBLoraConfig(objectives=OBJECTIVES, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    settings = {"use_cpu": True, "bf16": False, "share_prompt": True, "gradient_checkpointing": False}
    trainer = trl_parm.PreferenceARMTrainer(
        model,
        trl_parm.PreferenceARMConfig(
            tempfile.mkdtemp(), per_device_train_batch_size=4, beta=0.05, report_to="none", **settings
        ),
        train_dataset=by_objective(read_pairs(PAIRS)["train"][:200], tokenizer),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    batches, number = [trainer._prepare_inputs(batch) for batch in trainer.get_train_dataloader()], count()
    trainer.model.train()

    def step():
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, batches[next(number) % len(batches)])
        loss.backward()
        return loss.detach()

    return step


def use_onednn(model) -> None:
    """Lets linear layers multiply by oneDNN with packed weights, in the same way in both checkouts."""
    import torch

    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.forward = _Packed(torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), 8), module.bias)


class _Packed:
    def __init__(self, weight, bias) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x):
        import torch

        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


if __name__ == "__main__":
    main()
