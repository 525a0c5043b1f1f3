#!/usr/bin/env bash
# PEFT: OFT on a Conv2d with a kernel larger than 1 changes the model from the start, and merging changes it back.
#
# Expected: a new OFT adapter rotates by the identity, so that it is a no-op, as it is on linear layers, and a merged
#   model answers as the one with the adapter.
# What happens: what the layer reads is cut into the kernel's patches, rotated, and put together again by a sum, for
#   which places and the kernel's offsets come in the wrong order. So the convolution reads another image, in which
#   pixels of several places are added up, with padding and without. A merged adapter is the plain model, so that what
#   was trained is not what is merged. No warning. With a kernel of 1x1 a patch is a pixel, and all is right. A
#   convolution in groups runs, and fails when it is merged.
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0.
# Output seen: kernels of 3x3 off by 6, where the largest output is 2; 1x1 by 0, merged ones by 0. Two groups, merged:
#   RuntimeError: shape '[6, 36]' is invalid for input of size 108.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install transformers==5.24.0 peft==0.21.2

cd "$folder"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
"$folder/venv/bin/python" - <<'PYTHON'
import copy

import torch
from peft import OFTConfig, get_peft_model
from torch import nn
from torch.nn import functional as F


torch.set_grad_enabled(False)
torch.manual_seed(0)
images = torch.randn(2, 4, 9, 9)


def adapted(net):
    return get_peft_model(copy.deepcopy(net), OFTConfig(target_modules=["0"], oft_block_size=4)).eval()


def off(one, other):
    return (one - other).abs().max().item()


for settings in ({"kernel_size": 1}, {"kernel_size": 3}, {"kernel_size": 3, "padding": 1}):
    net = nn.Sequential(nn.Conv2d(4, 6, **settings)).eval()
    before, model = net(images), adapted(net)
    after = model(images)
    size = settings["kernel_size"]
    patches = F.unfold(images, size)  # (images, channels and offsets, places)
    mixed = patches.unflatten(1, (4, size * size)).transpose(2, 3).reshape(patches.shape)
    mixed = F.fold(mixed, (9, 9), size)
    model.merge_adapter()
    merged = model(images)
    print(
        f"{settings}: untrained off by {off(after, before):.2g} (the largest output is {before.abs().max():.2g}), "
        f"merged by {off(merged, before):.2g}, from the answer to the mixed-up image by {off(after, net(mixed)):.2g}"
    )
    assert off(after, net(mixed)) < 1e-4 and off(merged, before) < 1e-4, "OFT starts in another way now"
    assert (off(after, before) > 1) == (size > 1), "OFT is a no-op at the start now"

model = adapted(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).eval())
model(images)
try:
    model.merge_adapter()
except RuntimeError as error:
    print(f"two groups, merged: RuntimeError: {error}")
else:
    raise SystemExit("OFT merges a convolution in groups now")
print("seen: OFT on a Conv2d is no no-op at the start, and merges into another model")
PYTHON
