"""What devices say to each other in a train step, read from the compiled program (C29, C30)."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from gpt_jax.config import GPTConfig, TrainConfig
from gpt_jax.model import GPT
from gpt_jax.optimizer import make_optimizer
from gpt_jax.plan.hlo import collectives
from gpt_jax.sharding import batch_sharding, make_mesh, placed
from gpt_jax.train_step import init_state, make_train_step

T = 24  # no size of a parameter's axis, so that an activation is known by it
A, B = 4, 16


def found(*sizes, layers=2, **changes):
    """The collectives of a step of a small network on a mesh of eight CPU devices, or fewer."""
    mesh = make_mesh("auto", *sizes)
    model = GPT(
        GPTConfig(**{"n_layer": layers, "n_head": 8, "n_embd": 64, "block_size": 32,
                     "vocab_size": 160, "bias": False, **changes})
    )  # fmt: skip
    tx = make_optimizer(TrainConfig())

    def first():
        params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        return init_state(params, tx)

    batch = jax.ShapeDtypeStruct((A, B, T), jnp.int32, sharding=batch_sharding(mesh, 3))
    state = placed(mesh, jax.eval_shape(first))
    text = make_train_step(model, tx, mesh).lower(state, batch, batch).compile().as_text()
    return collectives(text), sum(x.size for x in jax.tree.leaves(state.params))


def of_activations(collective):
    """Whether a collective moves what has positions, other than the first rows of wpe."""
    for shape in set(collective.shapes) - {f"f32[{T},64]"}:
        sizes = [int(n) for n in shape[:-1].split("[")[1].split(",") if n]
        if any(size % T == 0 for size in sizes):
            return True
    return False


def test_data_parallelism_adds_the_gradients_once_a_step_and_gathers_nothing():
    moved, n_params = found(8, 1, 1)
    assert {x.kind for x in moved} == {"all-reduce"}
    assert not any(map(of_activations, moved))
    # float32 gradients, and the loss; not once for each of the accumulation steps
    assert 4 * n_params <= sum(x.bytes for x in moved) <= 4 * n_params + 100


@pytest.mark.parametrize(
    "changes", [{}, {"scan_layers": True}, {"remat": "full"}, {"dropout": 0.1}], ids=str
)
def test_fsdp_gathers_weights_and_sums_their_gradients_but_no_activations(changes):
    """On CPUs XLA writes a reduce-scatter as an all-reduce that is then cut."""
    moved, _ = found(1, 8, 1, **changes)
    kinds = Counter(x.kind for x in moved)
    assert kinds["all-gather"] > 0
    sums = [x for x in moved if x.kind in ("all-reduce", "reduce-scatter")]
    assert sums
    assert not any(map(of_activations, sums))
    # ids, and the gradient of the looked-up embedding, may be handed round
    handed = [x for x in moved if x.kind == "all-gather" and of_activations(x)]
    assert all(shape.startswith("s32") for x in handed for shape in x.shapes)


@pytest.mark.parametrize("sizes", [(2, 4, 1), (2, 2, 2)], ids=str)
def test_mixed_meshes_move_no_activations_but_tensors(sizes, capfd):
    moved, _ = found(*sizes)
    # as XLA warns where it hands a whole tensor to every device: lookups in a cut wte made it
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    busy = [x for x in moved if of_activations(x) and x.kind in ("all-reduce", "reduce-scatter")]
    # what is summed over rows' positions is only what "tensor" shares
    assert not busy or sizes[2] > 1
    assert all(x.devices in (0, sizes[2]) for x in busy)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 1, 4)], ids=str)
def test_dropout_moves_no_random_bits_and_no_masks(sizes):
    """Each device makes those of its own rows and heads."""
    moved, _ = found(*sizes, dropout=0.1)
    assert not [x for x in moved for shape in x.shapes if shape.startswith(("u", "pred"))]


def test_a_block_under_tensor_parallelism_sums_activations_twice_each_way():
    def sums(layers):
        moved, _ = found(1, 1, 4, layers=layers)
        assert {x.kind for x in moved} <= {"all-reduce"}
        return sum(x.count for x in moved if of_activations(x))

    assert sums(3) - sums(2) == 4 * A


PROGRAM = """
import json, sys
from gpt_jax.runtime import use_platform
use_platform("cpu")
import jax, jax.numpy as jnp
from dataclasses import replace
from gpt_jax.config import TrainConfig
from gpt_jax.model import GPT
from gpt_jax.optimizer import make_optimizer
from gpt_jax.plan.hlo import collectives
from gpt_jax.plan.program import state_shapes
from gpt_jax.plan.topology import as_if_there, attention_for, describe_topology
from gpt_jax.sharding import batch_sharding, make_mesh
from gpt_jax.train_step import make_train_step

target = describe_topology(sys.argv[1])
mesh = make_mesh("auto", *map(int, sys.argv[2].split(",")), devices=target.devices)
config = TrainConfig(n_layer=2, n_head=16, n_embd=1024, block_size=256)
model = config.model_config(4096, "bfloat16")
model = replace(model, attention=attention_for(target, model))
batch = jax.ShapeDtypeStruct((1, 16, 256), jnp.int32, sharding=batch_sharding(mesh, 3))
step = make_train_step(GPT(model), make_optimizer(config), mesh)
with as_if_there(target):
    traced = step.trace(state_shapes(config, model, mesh), batch, batch)
    text = traced.lower(lowering_platforms=(target.platform,)).compile().as_text()
print(json.dumps([list(x) for x in collectives(text)]))
print(text.count('custom_call_target="__cudnn$fmhaSoftmax"'),
      text.count('custom_call_target="__cudnn$fmhaSoftmaxBackward"'))
"""


def ahead_of_time(topology, sizes):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, topology, sizes],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]),
             "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    *_, moved, kernels = done.stdout.strip().splitlines()
    sums = Counter()
    for kind, n, *_ in json.loads(moved):
        sums[kind] += n
    return sums, kernels


def parameters():
    """Of PROGRAM's network, in and out of the embeddings."""
    return 2 * (12 * 1024**2 + 2 * 1024), 4096 * 1024 + 256 * 1024


@pytest.mark.parametrize("topology", ["h200:4"])
def test_gpus_that_are_not_there(topology):
    pytest.importorskip("jax_cuda13_plugin")
    blocks, embeddings = parameters()
    sums, kernels = ahead_of_time(topology, "4,1,1")
    assert set(sums) == {"all-reduce"}
    assert sums["all-reduce"] <= 4.1 * (blocks + embeddings)
    assert kernels == "2 2"  # C30: each layer's attention is cuDNN's, and none is done twice
    sums, kernels = ahead_of_time(topology, "1,4,1")
    assert sums["reduce-scatter"] > 0
    assert sums["all-reduce"] < 1000  # norms and counts
    assert sums["all-gather"] > 2 * blocks  # bfloat16, once or twice
    assert kernels == "2 2"
