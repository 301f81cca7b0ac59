#!/usr/bin/env bash
# Starts a run by accelerate launch: PROCESSES=8 launch/accelerate.sh recipe=R KEY=VALUE ...; several hosts: launch/multi_node.md.
set -euo pipefail
hosts=${HOSTS:-1}
total=$((hosts * ${PROCESSES:?how many processes on this host: one for each GPU}))
port=${PORT:-0} # 0: any free port, on one host
[ "$hosts" = 1 ] || port=${PORT:-29500}
several=--multi_gpu
[ "$total" != 1 ] || several= # of one process accelerate refuses it
# The rest answers what accelerate would ask its own configuration file for; parallel.* decides how work is shared.
exec accelerate launch $several --num_processes "$total" --num_machines "$hosts" --machine_rank "${HOST_RANK:-0}" \
  --main_process_ip "${FIRST_HOST:-127.0.0.1}" --main_process_port "$port" \
  --mixed_precision no --dynamo_backend no -m train "$@"
