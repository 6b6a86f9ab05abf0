#!/usr/bin/env bash
# Several GPU machines by hand: run it where you can ssh to each of them without a password.
# One process on each uses all its GPUs.
#
#   bash docs/launch/gpu_nodes.sh          # start, or go on from the last checkpoint
#   bash docs/launch/gpu_nodes.sh stop     # all save at the same step and end
set -euo pipefail

read -r -a NODES <<<"${NODES:-node1 node2}"  # the first is process 0, which the others call
PORT=${PORT:-1234}                           # of the first node, open to the others
REPO=${REPO:-/shared/gpt_jax}                # this repository, installed in .venv, on all nodes
SHARED=${SHARED:-/shared}                    # a disk that all nodes see: data/ and the run

pid=$SHARED/out-gpt2.pid
if [ "${1:-}" = stop ]; then
  exec ssh "${NODES[0]}" "kill -TERM \$(cat $pid)" # one process is enough
fi

started=()
for i in "${!NODES[@]}"; do
  note=
  [ "$i" != 0 ] || note="echo \$\$ > $pid &&"
  # shellcheck disable=SC2029  # the variables are meant to be filled in here
  ssh -n "${NODES[$i]}" "cd $REPO && $note XLA_PYTHON_CLIENT_MEM_FRACTION=.95 \
    exec .venv/bin/python train.py train_gpt2 --wandb_log=False \
    --data_dir=$SHARED/data --out_dir=$SHARED/out-gpt2 --init_from=auto --save_interval=500 \
    --coordinator_address=${NODES[0]}:$PORT --num_processes=${#NODES[@]} --process_id=$i" &
  started+=($!)
done

code=0
for process in "${started[@]}"; do
  wait "$process" || code=$?
done
exit "$code"
