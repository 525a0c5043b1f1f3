# SPDX-License-Identifier: Apache-2.0
"""Whole models from files that may be damaged, or of another kind: what transformers warns of is an error here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_whole(load: Callable[..., Any], name: str, **kwargs: Any) -> Any:
    """A model by transformers' `from_pretrained`, or what calls it.

    Args:
        load (`Callable`): Such as `AutoModelForCausalLM.from_pretrained`.
        name (`str`): A folder or an id on the Hub.
        **kwargs: For `load`.

    Raises:
        ValueError: weights that the checkpoint lacks, so that they would be random, such as the head of a classifier
            in the checkpoint of a language model; or that are NaN or infinite.
    """
    model, found = load(name, output_loading_info=True, **kwargs)
    here = {name: p for name, p in model.named_parameters() if p.dtype in FLOATS and p.device.type != "meta"}
    faults = {
        "are not in its checkpoint": sorted(found["missing_keys"]),
        "are NaN or infinite": [key for key, p in here.items() if not torch.isfinite(p).all()],
    }
    for fault, names in faults.items():
        if names:
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ValueError(
                f"The model {name!r} can't be used as a {type(model).__name__}: {len(names)} of its weights {fault} "
                f"({some}). Get the files again, or name a model of this kind."
            )
    return model
