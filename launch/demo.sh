#!/usr/bin/env bash
# Trains a tiny Mixtral on real text, its experts split over two processes, then lets transformers load what came of it.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if [ -e runs/demo ]; then # nothing is thrown away: the last demo moves aside
  if [ -e runs/demo/.lock ] && ! flock --nonblock runs/demo/.lock true; then
    echo "error: a demo is running in runs/demo ($(cat runs/demo/.lock))" >&2
    exit 6
  fi
  mv runs/demo "runs/demo-$(date +%Y%m%d-%H%M%S)"
fi
export OMP_NUM_THREADS=1 # two processes on a small machine: one thread each
torchrun --nproc_per_node 2 --rdzv-backend c10d --rdzv-endpoint localhost:0 -m train recipe=demo \
  parallel.expert=2 parallel.zero=1 run.dir=runs/demo "$@"
OMP_NUM_THREADS=2 python launch/compare_export.py runs/demo/export 256
echo "the curve: runs/demo/plots/loss.png   the experts' load: runs/demo/plots/expert_load.png"
