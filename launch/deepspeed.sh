#!/usr/bin/env bash
# Starts a run by DeepSpeed's launcher: PROCESSES=8 launch/deepspeed.sh recipe=R KEY=VALUE ...; with HOSTFILE, on its hosts.
set -euo pipefail
if [ -n "${HOSTFILE:-}" ]; then
  where=(--hostfile "$HOSTFILE") # lines such as: node0 slots=8
else
  where=(--num_gpus "${PROCESSES:?how many processes: one for each GPU}")
fi
exec deepspeed "${where[@]}" --master_port "${PORT:-29500}" --module train "$@"
