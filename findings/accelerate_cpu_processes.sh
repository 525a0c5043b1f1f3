#!/usr/bin/env bash
# accelerate: on CPUs several processes become one, or do not know of each other, without a word.
#
# Expected: `accelerate launch --cpu --num_processes 2` starts two processes, or says that it does not; and of two
#   processes that torchrun has started on a machine without an accelerator, PartialState() says that they are two.
# What happens: the launcher starts one process, with exit code 0 and nothing about the other. Under torchrun
#   PartialState() says num_processes=1 in both, as if each were alone, so that both write what the first one should;
#   PartialState(cpu=True) says 2.
# Versions: accelerate 1.15.0, torch 2.13.0.
# Output seen: launch --cpu: WORLD_SIZE unset, once; torchrun: 1 1 without cpu=True, 2 2 with it.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install accelerate==1.15.0

cd "$folder"
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=""
cat > state.py <<'PYTHON'
import os
import sys

from accelerate import PartialState

state = PartialState(cpu=True) if "cpu" in sys.argv else PartialState()
print(f"SEEN {os.environ.get('WORLD_SIZE')} {state.num_processes}", flush=True)
PYTHON
seen() { "$folder/venv/bin/python" -m "$@" 2>/dev/null | grep -o 'SEEN .*' | sort | tr '\n' ' '; }
launched=$(seen accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no \
    --dynamo_backend no state.py)
plain=$(seen torch.distributed.run --standalone --nproc_per_node 2 state.py)
told=$(seen torch.distributed.run --standalone --nproc_per_node 2 state.py cpu)
echo "accelerate launch --cpu --num_processes 2: $launched"
echo "torchrun, PartialState(): $plain"
echo "torchrun, PartialState(cpu=True): $told"
[ "$launched" = "SEEN None 1 " ] && [ "$plain" = "SEEN 2 1 SEEN 2 1 " ] && [ "$told" = "SEEN 2 2 SEEN 2 2 " ]
