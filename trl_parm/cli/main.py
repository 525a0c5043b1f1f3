# SPDX-License-Identifier: Apache-2.0
"""Which verbs there are, and how a command ends: 0, 2 with one line about bad input, or 130 if it was interrupted."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import warnings

from trl_parm.version import __version__


VERBS = {
    "relabel": "label pairs of responses with reward models",
    "train": "train an autoregressive reward model",
    "generate": "decode prompts with a method",
    "evaluate": "decode and score prompts with all methods at all preferences",
    "rescore": "other rewards for the responses of an evaluation",
    "plot": "measures, tables and figures of an evaluation",
    "export": "write an adapter at fixed preferences as plain LoRA",
    "demo": "serve a page where a preference slider steers a model",
}
"""Verb → what it does. Each is a module of this package with a function `main`."""
HELP = {"-h", "--help"}
TRACEBACK = "TRL_PARM_TRACEBACK"
"""Set in the environment, an error ends with where it came from instead of one line."""


def main(argv: list[str] | None = None) -> int:
    """Runs a command, by default that of the process, and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    verb = argv[0] if argv else ""
    if verb == "--version":
        print(f"trl-parm {__version__}")
        return 0
    if verb in HELP:
        print(overview())
        return 0
    name = f"trl-parm {verb}" if verb in VERBS else "trl-parm"
    try:
        if verb not in VERBS:
            close = difflib.get_close_matches(verb, VERBS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"the verb {verb!r} is not known; there are {', '.join(VERBS)}.{hint}")
        module = importlib.import_module(f"{__package__}.{verb}")
        if not HELP & set(argv):
            _prepare()
        module.main(argv[1:])
        return 0
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on from here", file=sys.stderr, flush=True)
        return 130
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get(TRACEBACK) or getattr(error, "__notes__", None):  # a note says whose code it is
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
        "when it is given again. `trl-parm VERB --help` lists the keys of a verb."
    )


def _prepare() -> None:
    """Before anything heavy is imported: no progress bars in a file, and no warnings that a user can't act on."""
    if not sys.stderr.isatty():
        for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ[name] = "1"
    # transformers announces renamed arguments of its version 6; TRL and PEFT still use the old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
