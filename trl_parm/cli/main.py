# SPDX-License-Identifier: Apache-2.0
"""Which verbs there are, and how a command ends: 0, 2 with one line about bad input, or 130 if it was interrupted."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

from trl_parm.processes import Stopped
from trl_parm.version import __version__


VERBS = {
    "make_pairs": "sample answers of a model, and pair the best and the worst by each reward",
    "relabel": "label pairs of responses with reward models",
    "train": "train an autoregressive reward model",
    "generate": "decode prompts with a method",
    "evaluate": "decode and score prompts with all methods at all preferences",
    "rescore": "other rewards for the responses of an evaluation",
    "lm_eval": "tasks of lm-evaluation-harness with a guided model",
    "plot": "measures, tables and figures of an evaluation",
    "compare": "two evaluations, or two methods, prompt by prompt",
    "convert": "responses of an evaluation for AlpacaEval, or as a data set",
    "export": "write an adapter at fixed preferences as plain LoRA",
    "demo": "serve a page where a preference slider steers a model",
    "serve": "serve OpenAI's API, with a preference for every request",
}
"""Verb → what it does. Each is a module of this package with a function `main`."""
SHARED = ("train", "evaluate", "relabel", "lm_eval")
"""Verbs whose work several processes share."""
HELP = {"-h", "--help"}
GOES_ON = {
    "compare": "what was not complete is not there; a judge's answers are kept",
    "convert": "what was not complete is not there",
    "train": "the same command with --resume true goes on from its last checkpoint",
    "export": "what was not complete is not there",
    "plot": "what was not complete is not there",
    "lm_eval": "the harness starts anew, but for what `--use_cache` has kept",
    "demo": "the page is closed",
    "serve": "what it had begun was answered",
}
"""What an interrupted command has left, of those that don't just go on."""
TRACEBACK = "TRL_PARM_TRACEBACK"
"""Set in the environment, an error ends with where it came from instead of one line."""


def main(argv: list[str] | None = None) -> int:
    """Runs a command, by default that of the process, and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    verb = argv[0].replace("-", "_") if argv and not argv[0].startswith("-") else "".join(argv[:1])
    if verb == "--version":
        print(f"trl-parm {__version__}")
        return 0
    if not argv or verb in HELP:
        print(overview())
        return 0
    name = f"trl-parm {verb}" if verb in VERBS else "trl-parm"
    try:
        if verb not in VERBS:
            close = difflib.get_close_matches(verb, VERBS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"the verb {verb!r} is not known; there are {', '.join(VERBS)}.{hint}")
        if verb not in SHARED and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                f"it was launched in {os.environ['WORLD_SIZE']} processes, which {', '.join(SHARED)} can share. Start "
                f"{verb} without `accelerate launch`."
            )
        module = importlib.import_module(f"{__package__}.{verb}")
        with _plain_output(quiet=not HELP & set(argv)):
            module.main(argv[1:])
        return 0
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        left = GOES_ON.get(verb, "the same command goes on from here")
        print(f"{name}: interrupted; {left}", file=sys.stderr, flush=True)
        return 130
    except Stopped:  # another process has said why
        return 2
    except (ValueError, TypeError, OSError, ImportError) as error:
        # A note says whose code it was.
        if os.environ.get(TRACEBACK) or getattr(error, "__notes__", None) or _is_of_others(error):
            raise
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2


def overview() -> str:
    """What `trl-parm --help` says."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {text}" for verb, text in VERBS.items())
    return (
        "usage: trl-parm VERB [--config FILE.yaml] [--KEY VALUE ...]\n\n"
        "Preference-conditioned alignment at decoding time, from data to a Pareto front.\n\n"
        f"verbs:\n{verbs}\n\n"
        "Every key of a configuration file is a flag too; flags win. A command that was killed goes on where it was\n"
        "when it is given again, train with --resume true. `trl-parm VERB --help` lists the keys of a verb."
    )


@contextlib.contextmanager
def _plain_output(quiet: bool) -> Iterator[None]:
    """Every warning as one line, the first time it is given, but none that a user can't act on; and, since this is
    before anything heavy is imported, no frames of progress bars in a file."""
    seen: set[str] = set()

    def show(message: Warning | str, *_: object) -> None:
        text = " ".join(str(message).split())
        if text not in seen:
            seen.add(text)
            print(f"warning: {text}", file=sys.stderr, flush=True)

    if quiet and not sys.stderr.isatty():
        for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ[name] = "1"
    with warnings.catch_warnings():
        # transformers announces renamed arguments of its version 6; TRL and PEFT still use the old names.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        warnings.showwarning = show
        yield


def _is_of_others(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, was raised in a user's own code, such as a reward: then he needs to see
    where."""
    ours = [Path(__file__).parents[2] / name for name in ("trl_parm", "peft_pblora")]
    theirs = map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib"))
    known = [Path(folder).resolve() for folder in (*ours, *theirs)]
    while error is not None:
        files = [Path(frame.filename).resolve() for frame in traceback.extract_tb(error.__traceback__)]
        if any(file.is_file() and not any(file.is_relative_to(folder) for folder in known) for file in files):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False
