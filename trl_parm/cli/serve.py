# SPDX-License-Identifier: Apache-2.0
"""`trl-parm serve`: an HTTP server that speaks OpenAI's API, with a preference for every request."""

from trl_parm.arguments import parse
from trl_parm.server import command


def main(argv: list[str]) -> None:
    command.serve(parse("serve", command.ServeArguments, argv, __doc__))
