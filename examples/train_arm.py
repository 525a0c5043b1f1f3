# SPDX-License-Identifier: Apache-2.0
#
# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-parm"]
# ///
"""Trains an autoregressive reward model from YAML, on one CPU or, with `accelerate launch`, on a cluster.

    python examples/train_arm.py --config examples/train_arm.yaml
    accelerate launch --config_file examples/accelerate_configs/fsdp2.yaml examples/train_arm.py --config my.yaml

Every key of the file is a flag too: those of `ARMArguments` (model, adapter, data) and of `PreferenceARMConfig`. It is
`trl-parm train`, as a file that launchers can be given.
"""

import sys

from trl_parm.cli.main import main


if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
