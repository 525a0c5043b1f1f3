# SPDX-License-Identifier: Apache-2.0
"""`python -m trl_parm.demo`"""

import sys

from .command import main


sys.exit(main())
