# SPDX-License-Identifier: Apache-2.0
"""Products with packed weights beside PyTorch's own, by rows, on the CPU at hand: `trl_parm.cpu.FEW` is chosen by it.

    python benchmarks/linear_layers.py [--products bfloat16] [--table linear_layers_avx2]

The layers are those of SmolLM2-135M and of a model of 1B: some blocks, one layer after the other as in a forward, and
the output layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import argument_parser, interleave, paired_ratio, report

from trl_parm.cpu import FEWEST_ROWS, PackedLinear


MODELS = {
    "SmolLM2-135M": ([(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)], 49152),
    "Llama 1B": (
        [(2048, 2048), (2048, 512), (2048, 512), (2048, 2048), (2048, 8192), (2048, 8192), (8192, 2048)],
        32000,
    ),
}
OWN = "PyTorch's"
BLOCKS = 2
"""Of a model, so that the table does not take long: what is timed is their ratio."""


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    rows = (row for name in args.models for row in of_model(name, args))
    report("linear_layers", rows, notes(args), args.results, args.table)


def parse_args() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 3, 4, 8, 16, 32, 48, 64, 96, 128, 256, 512])
    parser.add_argument("--products", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=9)
    return parser.parse_args()


def of_model(name: str, args: argparse.Namespace):
    """For the blocks, and for the output layer, the time relative to PyTorch's own products in float32."""
    shapes, words = MODELS[name]
    parts = {"blocks": shapes * BLOCKS, "output layer": [(shapes[0][0], words)]}
    for part, layers in parts.items():
        every = [torch.nn.Linear(*shape, bias=False).requires_grad_(False) for shape in layers]
        packed = [PackedLinear.of(layer, getattr(torch, args.products)).packed() for layer in every]
        for rows in args.rows:
            inputs = {shape[0]: torch.randn(rows, shape[0]) for shape in layers}
            variants = {
                OWN: lambda every=every, x=inputs: [layer(x[layer.in_features]) for layer in every],
                "packed": product(every, packed, inputs, rows),
            }
            if rows < FEWEST_ROWS:
                variants["packed, filled up"] = product(every, packed, inputs, FEWEST_ROWS)
            with torch.no_grad():
                times = interleave(variants, args.repeats)
            found = {variant: paired_ratio(times, variant, OWN) for variant in list(variants)[1:]}
            yield {
                "": f"{name}, {part}",
                "rows": rows,
                f"{OWN}, ms": f"{1e3 * min(times[OWN]):.2f}",
                **{f"{of} / {OWN}": f"{mid:.2f} [{low:.2f}, {high:.2f}]" for of, (mid, low, high) in found.items()},
            }


def product(every, packed, inputs, rows: int) -> Callable[[], object]:
    """All products with packed weights, the inputs filled up to a number of rows and cast as a layer does it."""

    def run() -> None:
        for layer, weight in zip(every, packed, strict=True):
            x = inputs[layer.in_features]
            given = F.pad(x, (0, 0, 0, rows - len(x))) if rows > len(x) else x
            found = torch.ops.mkldnn._linear_pointwise(given.to(weight.dtype), weight, None, "none", [], "")
            found[: len(x)].to(x.dtype)

    return run


def notes(args: argparse.Namespace) -> list[str]:
    return [
        f"The CPU has {torch.backends.cpu.get_cpu_capability()}. Products in {args.products} with packed weights, "
        f"beside PyTorch's own in float32, of {BLOCKS} blocks of each model; median [quartiles] of the ratio of "
        f"{args.repeats} paired rounds, and PyTorch's least time."
    ]


if __name__ == "__main__":
    main()
