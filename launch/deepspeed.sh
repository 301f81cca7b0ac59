#!/usr/bin/env bash
# Starts a run by DeepSpeed's launcher: PROCESSES=8 launch/deepspeed.sh recipe=R KEY=VALUE ...; with HOSTFILE, on its hosts.
set -euo pipefail
port=${PORT:-29500}
if [ -n "${HOSTFILE:-}" ]; then
  where=(--hostfile "$HOSTFILE") # lines such as: node0 slots=8
else
  where=(--num_gpus "${PROCESSES:?how many processes: one for each GPU}")
  port=${PORT:-$(python -c 'import socket; print(socket.create_server(("", 0)).getsockname()[1])')} # any free one
fi
exec deepspeed "${where[@]}" --master_port "$port" --module train "$@"
