# SPDX-License-Identifier: Apache-2.0
"""Every decoder in every mode of `generate`, by both doors, against its formula in float64, without any cache.

A new decoder is one row of `DECODERS`, a new mode one row of `MODES`. `make test` runs the corners of this table,
`make test-slow` the rest.
"""

import pytest
import torch
from decoding.tables import DECODERS, DOORS, MODES, Models, generate


IN_EVERY_MODE = ("PARM", "GenARM, α and β a row", "MOD-w2s", "ARGS", "Transfer-Q")
FOR_EVERY_DECODER = ("greedy", "beam search", "several sequences", "prompt lookup")


def table():
    """Every decoder in every mode. What differs from its neighbours in the formula alone is for `make test-slow`."""
    for name in DECODERS:
        for mode in MODES:
            quick = name in IN_EVERY_MODE or mode in FOR_EVERY_DECODER
            yield pytest.param(name, mode, id=f"{name}-{mode}", marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "mode"), list(table()))
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("on_base", [False, True], ids=["apart", "on the base"])
def test_every_decoder_in_every_mode(on_base, door, name, mode):
    decoder, settings = DECODERS[name], MODES[mode]
    if on_base and not decoder.has_arm:
        pytest.skip("it has no ARM")
    if decoder.rows and settings.get("prompts") == 1:
        pytest.skip("it has a preference for each of three rows")
    if door == "model" and mode == "assisted sampling":
        pytest.skip("it drafts with other numbers, since the assistant gets no processor; see below")
    models = Models.make(on_base)
    guided = generate(models, decoder, door, **settings)
    naive = generate(Models.make(on_base), decoder, f"naive {door}", **settings)
    assert torch.equal(guided.sequences, naive.sequences)
    for ours, theirs in zip(guided.scores, naive.scores, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
