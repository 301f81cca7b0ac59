#!/usr/bin/env bash
# Starts a run again until it is done: PROCESSES=8 launch/supervise.sh recipe=R run.dir=runs/X KEY=VALUE ...
# Each time it goes on from its newest whole checkpoint. RESTARTS (10) bounds the deaths in a row that saved nothing new.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=
for word in "$@"; do
  if [[ $word == run.dir=* ]]; then folder=${word#run.dir=}; fi
done
if [[ $folder == "~/"* ]]; then folder=$HOME/${folder:2}; fi # as the run reads it
[ -n "$folder" ] || { echo "error: run.dir=FOLDER is needed: a restart goes on in the same folder" >&2; exit 2; }

started=$(mktemp)
export CIERZO_CODE_FILE=$started.code # where a run that ends before it has a folder says why
trap 'rm -f "$started" "$CIERZO_CODE_FILE"' EXIT
stopped=
trap 'stopped=yes; kill -TERM "$child" 2>/dev/null || true' TERM INT # the run saves, and is not started again
left=${RESTARTS:-10}
while true; do
  before=$(cat "$folder/checkpoints/latest" 2>/dev/null || true)
  touch "$started"
  rm -f "$CIERZO_CODE_FILE"
  bash launch/torchrun.sh "$@" &
  child=$!
  code=0
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do code=0; wait "$child" || code=$?; done # a signal ends `wait` early
  [ "$code" = 0 ] && exit 0
  # torchrun's own code says nothing of why
  if [ "$folder/exit.json" -nt "$started" ]; then
    code=$(sed -n 's/.*"code": \([0-9]*\).*/\1/p' "$folder/exit.json")
  elif [ -s "$CIERZO_CODE_FILE" ]; then
    code=$(cat "$CIERZO_CODE_FILE")
  fi
  [ -n "$stopped" ] && exit "${code:-1}"
  case $code in 2 | 3 | 4 | 5) exit "$code" ;; esac # what no restart mends
  [ "$(cat "$folder/checkpoints/latest" 2>/dev/null || true)" = "$before" ] || left=${RESTARTS:-10}
  if [ "$left" -le 0 ]; then
    echo "error: $folder died ${RESTARTS:-10} times more without a new checkpoint: it is not started again" >&2
    exit "${code:-1}"
  fi
  left=$((left - 1))
  echo "supervise: ended with ${code:-no code}; starts again, at most $left times more without a new checkpoint" >&2
done
