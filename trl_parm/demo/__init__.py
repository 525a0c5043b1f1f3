# SPDX-License-Identifier: Apache-2.0
"""The demo app: a page where a preference slider steers a frozen model. Needs the extra `demo`.

    python -m trl_parm.demo --arm folder-or-id [--model folder-or-id] [--host 127.0.0.1] [--port 7860] [--share]

From bottom to top: `simplex` (sliders), `questions` (plain data), `loading` (the models), `measures` (what the picture
shows), `answering` (questions, one at a time), `picture` and `markup` (HTML), `page` (gradio), and `command`.
"""

from .command import main


__all__ = ["main"]
