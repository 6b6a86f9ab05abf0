"""``python -m gpt_jax.plan``."""

import os
import sys

# libtpu reads these when it is loaded. Without a TPU it would ask the cloud who it is, and complain
# that no one answers; and it would let only one process of a machine compile at a time.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "4")
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "4")

from gpt_jax.plan import main

if __name__ == "__main__":
    sys.exit(main())
