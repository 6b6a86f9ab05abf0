#!/usr/bin/env bash
# One TPU VM (v5litepod-8, say): run it on that VM, in the repository's folder.
# One process uses all chips. Run again after a stop, it goes on from the last checkpoint.
# Flags are passed on to train.py.
set -euo pipefail

OUT_DIR=${OUT_DIR:-out-gpt2}  # where the run lives
PYTHON=${PYTHON:-3.12}        # TPU VM images of Ubuntu 22.04 have 3.10 only: uv brings this one

if [ ! -d .venv ]; then
  python3 -m pip install --user uv
  python3 -m uv venv --python "$PYTHON" .venv
  python3 -m uv pip install --python .venv/bin/python -e ".[tpu,data]"
fi
[ -f data/openwebtext/train.bin ] || .venv/bin/python -m gpt_jax.prepare openwebtext

exec .venv/bin/python train.py train_gpt2 --wandb_log=False --out_dir="$OUT_DIR" \
  --init_from=auto --save_interval=500 "$@"
