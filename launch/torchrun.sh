#!/usr/bin/env bash
# Starts a run by torchrun: PROCESSES=8 launch/torchrun.sh recipe=R KEY=VALUE ...; several hosts: launch/multi_node.md.
set -euo pipefail
trap 'exit 2' EXIT # of a variable that is missing, which no restart mends; else torchrun takes this shell's place
processes=${PROCESSES:?how many processes on this host: one for each GPU}
if [ "${HOSTS:-1}" = 1 ]; then
  meeting=(--rdzv-backend c10d --rdzv-endpoint localhost:0) # 0: any free port
else
  meeting=(--nnodes "$HOSTS" --node_rank "${HOST_RANK:?0 on the first host, then 1, 2, ...}"
    --master_addr "${FIRST_HOST:?address of the first host}" --master_port "${PORT:-29500}"
    --rdzv_conf "timeout=${MEETING_SECONDS:-60}") # torchrun's own patience is 10 minutes
fi
exec torchrun --nproc_per_node "$processes" "${meeting[@]}" -m train "$@"
