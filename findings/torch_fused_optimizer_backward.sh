#!/usr/bin/env bash
# PyTorch: after a step of a fused optimizer a backward through the weights of before gives wrong gradients, silently.
#
# Expected: backward needs the values that the forward had. A weight that was changed in place since then raises "one
#   of the variables needed for gradient computation has been modified by an inplace operation", as it does after a
#   step of an optimizer that is not fused.
# What happens: fused steps (fused=True, on a CPU too) change weights without counting it in `_version`. Backward does
#   not notice, and takes the new weights for the old ones. The same call raises with fused=False and foreach=True.
#   Whatever else tells by `_version` whether a weight has changed does not notice either.
# Versions: torch 2.13.0.
# Output seen: d (w v) / d w, which is v = 3 in the forward, is 2.485 (AdamW), 2.5 (Adam and Adagrad) or 2.0 (SGD), the v
#   of after the step; `_version` stays 0.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --no-compile --disable-pip-version-check torch==2.13.0

cd "$folder"
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
import torch


def gradient_after_a_step(kind, **how):
    """d (w v) / d w by a graph that was made before the step; v was 3 then."""
    w, v = (torch.nn.Parameter(torch.tensor([value])) for value in (2.0, 3.0))
    product = w * v
    product.sum().backward(retain_graph=True)
    optimizer = kind([w, v], lr=0.5, **how)
    optimizer.step()
    optimizer.zero_grad()
    product.sum().backward()
    return w.grad.item(), v.item(), v._version


for kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad):
    gradient, value, version = gradient_after_a_step(kind, fused=True)
    print(f"{kind.__name__}, fused: gradient {gradient}, not 3; v is {value} now, version {version}")
    assert gradient == value != 3 and version == 0, "a fused step is noticed now"
    for how in ({"fused": False, "foreach": False}, {"foreach": True}):
        try:
            gradient_after_a_step(kind, **how)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            raise AssertionError(f"{kind.__name__} with {how} does not raise")
print("seen: backward after a fused step takes the new weights for the old ones")
PYTHON
