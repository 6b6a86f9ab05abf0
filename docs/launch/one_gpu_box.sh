#!/usr/bin/env bash
# One machine with one or more NVIDIA GPUs: run it on that machine, in the repository's folder.
# One process uses all GPUs. Run again after a stop, it goes on from the last checkpoint.
# Flags are passed on to train.py.
set -euo pipefail

OUT_DIR=${OUT_DIR:-out-gpt2}  # where the run lives

[ -d .venv ] || { python3 -m venv .venv && .venv/bin/pip install -e ".[cuda,data]"; }
[ -f data/openwebtext/train.bin ] || .venv/bin/python -m gpt_jax.prepare openwebtext

export XLA_PYTHON_CLIENT_MEM_FRACTION=.95  # else XLA takes three quarters of a GPU's memory
exec .venv/bin/python train.py train_gpt2 --wandb_log=False --out_dir="$OUT_DIR" \
  --init_from=auto --save_interval=500 "$@"
