# SPDX-License-Identifier: Apache-2.0
"""One of two processes of the distributed tests: trains one step of half the batch and saves the gradients.

python distributed_worker.py RANK WORLD MEETING {ddp,fsdp,fsdp-factors} OUTPUT

`fsdp-factors` makes every trained matrix a unit of its own, as PEFT's `fsdp_auto_wrap_policy` does.
"""

import sys

import torch
import torch.distributed as dist
from conftest import tiny_arm
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from peft_pblora import set_preference


PREFERENCES = torch.tensor([[1.0, 0.0], [0.2, 0.8], [0.5, 0.5], [0.0, 1.0]])


def batch() -> torch.Tensor:
    return torch.randint(2, 64, (4, 7), generator=torch.Generator().manual_seed(5))


def loss_of(model, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits.float().log_softmax(-1)[..., 3].mean()


def gradients(model) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            found[name.removeprefix("module.")] = (
                gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            ).clone()
    return found


def main() -> None:
    rank, world, meeting, kind, output = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    model = tiny_arm().train()
    if kind.startswith("fsdp"):
        mesh = init_device_mesh("cpu", (world,))
        if kind == "fsdp-factors":
            wraps = fsdp_auto_wrap_policy(model).keywords["policies"][0].keywords["lambda_fn"]
            for module in [module for module in model.modules() if wraps(module)]:
                fully_shard(module, mesh=mesh)
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = DistributedDataParallel(model)
    rows = slice(rank * 2, rank * 2 + 2)
    # A first step at other preferences: what it set must not linger.
    set_preference(model, [0.9, 0.1])
    loss_of(model, batch()[rows]).backward()
    model.zero_grad()
    set_preference(model, PREFERENCES[rows])
    loss_of(model, batch()[rows]).backward()
    found = gradients(model)
    if rank == 0:
        torch.save(found, output)
    dist.barrier()
    del model  # DDP must not be the last to hold the process group: its end could wait for a thread that waits for it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
