# SPDX-License-Identifier: Apache-2.0
"""Guidance: a formula of language models as a model that generates, or as a logits processor."""

from trl_parm.algebra import BASE, LinearCombination, PowerMean, Scorer, Step

from .methods import MOD, PARM, GenARM, MODWeakToStrong, genarm, mod, mod_w2s, parm
from .model import Guided
from .processor import (
    GenARMLogitsProcessor,
    GuidedLogitsProcessor,
    MODLogitsProcessor,
    MODWeakToStrongLogitsProcessor,
    PARMLogitsProcessor,
    Prompt,
)
from .terms import LM
from .vocabulary import Vocabulary
