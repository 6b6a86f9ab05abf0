#!/usr/bin/env bash
# A TPU slice of several hosts: run it on your own computer, in the repository's folder, with gcloud.
#
#   bash docs/launch/tpu_pod.sh create     # the slice
#   bash docs/launch/tpu_pod.sh install    # the shared disk and this repository, on all hosts
#   bash docs/launch/tpu_pod.sh run        # start it, or go on from the last checkpoint
#   bash docs/launch/tpu_pod.sh log        # what process 0 says; Ctrl-C leaves the run alone
#   bash docs/launch/tpu_pod.sh stop       # all save at the same step and end
#   bash docs/launch/tpu_pod.sh delete     # the slice; the shared disk stays
set -euo pipefail

NAME=${NAME:-gpt2}                           # of the slice
ZONE=${ZONE:-europe-west4-b}
TYPE=${TYPE:-v5litepod-16}                   # four hosts of four chips
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}      # the image that belongs to TYPE
NFS=${NFS:-10.0.0.2:/share}                  # an NFS export (Filestore, say) that all hosts reach
SHARED=${SHARED:-/mnt/shared}                # where they mount it: data/ and the run lie there
PYTHON=${PYTHON:-3.12}                       # images of Ubuntu 22.04 have 3.10 only

on() { # on all|N COMMAND: run it on all hosts, or on host N
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" --command="$2"
}

train="train.py train_gpt2 --wandb_log=False --data_dir=$SHARED/data --out_dir=$SHARED/out-gpt2 \
  --init_from=auto --save_interval=500"

case ${1:-} in
create)
  # OS Login gives you the same user on all hosts, which NFS needs
  gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" \
    --version="$RUNTIME" --metadata=enable-oslogin=TRUE
  ;;
install)
  git archive --prefix=gpt_jax/ --output=/tmp/gpt_jax.tar.gz HEAD
  gcloud compute tpus tpu-vm scp /tmp/gpt_jax.tar.gz "$NAME": --zone="$ZONE" --worker=all
  on all "sudo apt-get update -q && sudo apt-get install -q -y nfs-common &&
    sudo mkdir -p $SHARED && { mountpoint -q $SHARED || sudo mount -t nfs $NFS $SHARED; } &&
    tar xzf gpt_jax.tar.gz && cd gpt_jax && python3 -m pip install --user uv &&
    python3 -m uv venv --allow-existing --python $PYTHON .venv &&
    python3 -m uv pip install --python .venv/bin/python -e '.[tpu,data]'"
  # once, by one host: the others find it on the shared disk
  on 0 "sudo mkdir -p $SHARED/data && sudo chown \$(id -u) $SHARED $SHARED/data && cd gpt_jax &&
    { [ -f $SHARED/data/openwebtext/train.bin ] ||
      .venv/bin/python -m gpt_jax.prepare openwebtext --data_dir=$SHARED/data; }"
  ;;
run)
  # nohup: it outlives this connection
  on all "cd gpt_jax || exit; nohup .venv/bin/python $train >> train.log 2>&1 < /dev/null &
    echo \$! > gpt_jax.pid"
  ;;
log) on 0 "tail -n 100 -f gpt_jax/train.log" ;;
stop) on 0 "kill -TERM \$(cat gpt_jax/gpt_jax.pid)" ;; # one host is enough
delete) gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE" ;;
*)
  echo "usage: $0 create|install|run|log|stop|delete" >&2
  exit 2
  ;;
esac
