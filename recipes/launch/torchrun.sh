#!/bin/bash
# One command on several machines, without a scheduler: call this on each of them.
# Run     on the first:   NODES=2 NODE=0 FIRST=10.0.0.1 recipes/launch/torchrun.sh train --model M --data ROWS --output-dir OUT
#         on the second:  NODES=2 NODE=1 FIRST=10.0.0.1 recipes/launch/torchrun.sh train --model M --data ROWS --output-dir OUT
#         `steer --prompts` and `eval` share their work in the same way.
# Needs   braces on each machine, in the same version; model, rows and --output-dir at the same path, the folder on a disk that all
#         share; a network on which the machines reach port PORT of the first. NCCL_SOCKET_IFNAME names the interface where there
#         are several.
# Env     NODES    machines (default 2)                     NODE    number of this machine, from 0
#         FIRST    name or address of the first machine     PORT    a free port of it (default 29500)
#         PROCESSES  processes of each machine (default: its GPUs)
# Note    --batch-size counts the examples of one process. The first process of the first machine writes and prints.
#         Ctrl-C on one machine ends that one; torchrun on the others then ends as well, after a checkpoint.
set -eu
exec torchrun --nnodes "${NODES:-2}" --node-rank "${NODE:?number of this machine, from 0}" \
    --master-addr "${FIRST:?address of the first machine}" --master-port "${PORT:-29500}" \
    --nproc-per-node "${PROCESSES:-gpu}" -m braces_cli "$@"
