"""Who writes what a run tells of itself."""

import os

import jax
import jax.numpy as jnp
import pytest

from gpt_jax import reporting
from gpt_jax.config import GPTConfig, TrainConfig
from gpt_jax.model import GPT
from gpt_jax.sharding import make_mesh

MODEL = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=11))


@pytest.mark.parametrize("first", [True, False])
def test_the_first_process_alone_writes_files(tmp_path, monkeypatch, first):
    """Even os.devnull: renamed over by root, it is a regular file for the whole machine."""
    monkeypatch.setattr(reporting, "is_first", lambda: first)
    nowhere = tmp_path / "null"
    nowhere.touch()
    monkeypatch.setattr(os, "devnull", str(nowhere))
    before = nowhere.stat()
    out = tmp_path / "out"
    out.mkdir()
    params = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    config = TrainConfig(out_dir=str(out))
    report = reporting.Report(config, make_mesh(), MODEL, params, 8, {"iter": 3})
    report.evaluation(3, 2.5, 2.75, 1e-3)
    report.close()
    assert [path.name for path in out.iterdir()] == ["metrics.jsonl"] * first
    assert nowhere.stat()[:7] == before[:7]  # the same inode, as long as it was
    assert sorted(path.name for path in tmp_path.iterdir()) == ["null", "out"]
