# SPDX-License-Identifier: Apache-2.0
"""The demo app: a page where a preference slider steers a frozen model. Needs the extra `demo`.

python -m trl_parm.demo --arm folder-or-id [--model folder-or-id] [--host 127.0.0.1] [--port 7860] [--share]
"""

from .command import main


__all__ = ["main"]
