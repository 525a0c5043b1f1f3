# SPDX-License-Identifier: Apache-2.0
"""`trl-parm demo`: a page where a preference slider steers a frozen model."""

from trl_parm.arguments import parse
from trl_parm.demo import command


def main(argv: list[str]) -> None:
    command.serve(parse("demo", command.DemoArguments, argv, __doc__))
