#!/usr/bin/env bash
# torchrun on several nodes, protected: one call on each node.
#
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 examples/torchrun/launch.sh pretrain_gpt.py ARGUMENTS…
#     NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 examples/torchrun/launch.sh pretrain_gpt.py ARGUMENTS…
set -euo pipefail

# Here, where it reaches every node, and not in the shell of one of them. torchrun hands it to its ranks.
export MEGATRON_FP32_ROUTER=1

exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes "${NNODES:?how many nodes}" \
  --node-rank "${NODE_RANK:?which of them this is, from 0}" \
  --nproc-per-node "${GPUS_PER_NODE:-8}" \
  --master-addr "${MASTER_ADDR:?the host of node 0}" \
  --master-port "${MASTER_PORT:-29500}" \
  "$@"
