# SPDX-License-Identifier: Apache-2.0
"""`trl-parm lm_eval`: the harness's own command, which knows the model `trl_parm` here."""

from __future__ import annotations

import sys

from trl_parm.extras import require


HELP = """usage: trl-parm lm_eval [WORDS OF lm_eval ...]

Runs the command of lm-evaluation-harness, which knows one model more, `trl_parm`, a guided one:

  trl-parm lm_eval --model trl_parm --tasks arc_easy,gsm8k --batch_size 8 \\
      --model_args base=FOLDER,arm=FOLDER,beta=1.0,preference=helpful:0.7+harmless:0.3

`--model_args` takes base, preference, method (parm, genarm, mod, ...) and the method's settings, as in `trl-parm
evaluate`; mappings as JSON, --model_args '{"base": "FOLDER", "method": "genarm", "arms": {"helpful": "FOLDER"}, ...}'.
The other words are the harness's: see `lm_eval --help`. Needs the extra lm_eval."""


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return
    require("lm_eval", "`trl-parm lm_eval`", "lm_eval")
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    import trl_parm.evaluation.harness  # noqa: F401 - registers the model

    words = sys.argv
    sys.argv = ["lm_eval", *argv]  # the harness reads nothing else
    try:
        cli_evaluate()
    finally:
        sys.argv = words
