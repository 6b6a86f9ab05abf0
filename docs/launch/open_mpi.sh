#!/usr/bin/env bash
# Open MPI: run it on one node, in the repository's folder, on a disk that all nodes see.
# mpirun starts this file once more for each GPU, and that part names the process to JAX. Flags
# are passed on to train.py.
#
# JAX finds Open MPI 4 by itself, but looks for a variable (OMPI_MCA_orte_hnp_uri) that Open MPI 5
# does not promise. So the three flags and the GPU are given here, which works with both.
set -euo pipefail

HOSTS=${HOSTS:-node1:8,node2:8}   # each with its number of GPUs; the first has process 0
PORT=${PORT:-1234}                # of the first host, open to the others
OUT_DIR=${OUT_DIR:-out-gpt2}      # where the run lives, on a disk that all nodes see
PYTHON=${PYTHON:-.venv/bin/python}

if [ -z "${IS_RANK:-}" ]; then
  export IS_RANK=1 HOSTS PORT OUT_DIR PYTHON XLA_PYTHON_CLIENT_MEM_FRACTION=.95
  n=$(tr ',' '\n' <<<"$HOSTS" | awk -F: '{ n += $2 } END { print n }')
  exec mpirun -np "$n" --host "$HOSTS" --bind-to none \
    -x IS_RANK -x HOSTS -x PORT -x OUT_DIR -x PYTHON -x XLA_PYTHON_CLIENT_MEM_FRACTION \
    bash "$0" "$@"
fi

first=${HOSTS%%[:,]*}
export JAX_LOCAL_DEVICE_IDS=$OMPI_COMM_WORLD_LOCAL_RANK # one GPU each, by number on the node
exec "$PYTHON" train.py train_gpt2 --wandb_log=False --out_dir="$OUT_DIR" \
  --init_from=auto --save_interval=500 --coordinator_address="$first:$PORT" \
  --num_processes="$OMPI_COMM_WORLD_SIZE" --process_id="$OMPI_COMM_WORLD_RANK" "$@"
