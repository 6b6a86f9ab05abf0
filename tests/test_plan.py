"""The plan of a run on hardware that is not there: the parser of HLO, the formulas, the command."""

import dataclasses
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gpt_jax.config import parse
from gpt_jax.errors import UserError
from gpt_jax.metrics import flops_per_token
from gpt_jax.plan import PlanConfig, plan, topology
from gpt_jax.plan.estimate import roofline
from gpt_jax.plan.hlo import Collective, collectives, totals
from gpt_jax.plan.program import Program, out_of_memory
from gpt_jax.plan.remedies import shared_rows, split
from gpt_jax.plan.report import written
from gpt_jax.plan.topology import describe_topology
from gpt_jax.sharding import make_mesh, micro_batches

ROOT = Path(__file__).parents[1]
TINY = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=16", "--vocab_size=64",
        "--batch_size=2", "--gradient_accumulation_steps=16", "--dropout=0"]  # fmt: skip


def module(body, more=""):
    return f"HloModule m\n{more}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"


# ---- what the devices say to each other ----------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "  %ag = f32[64,32]{1,0:T(8,128)S(1)} all-gather(%p), "
            "replica_groups={{0,1},{2,3}}, dimensions={0}",
            Collective("all-gather", 8192, 1, ("f32[64,32]",), 2),
        ),
        (
            "  ROOT %ar = (f32[], /*index=1*/bf16[3,5]{1,0:T(8,128)(2,1)}) all-reduce(%a, %b), "
            "replica_groups=[2,4]<=[8], to_apply=%add",
            Collective("all-reduce", 34, 1, ("f32[]", "bf16[3,5]"), 4),
        ),
        (
            "  %rs = bf16[4]{0} reduce-scatter(%p), "
            "replica_groups=mesh['a'=8,'b'=1] {'a'}, dimensions={0}",
            Collective("reduce-scatter", 8, 1, ("bf16[4]",), 8),
        ),
        (
            "  %s = (f32[4]{0}, f32[16]{0}) all-gather-start(%p), replica_groups={{0,1,2,3}}",
            Collective("all-gather", 64, 1, ("f32[16]",), 4),
        ),
        (
            "  %s = ((f32[4]{0}, s8[2]{0}), (f32[16]{0}, s8[8]{0})) all-gather-start(%p, %q), "
            "replica_groups={{0,1,2,3}}",
            Collective("all-gather", 72, 1, ("f32[16]", "s8[8]"), 4),
        ),
        (
            "  %s = ((bf16[50304,768]{0,1}), bf16[50304,384]{0,1}) reduce-scatter-start(%p), "
            "replica_groups=mesh['axis_0'=1,'axis_1'=2] {'axis_1'}, dimensions={1}",
            Collective("reduce-scatter", 2 * 50304 * 384, 1, ("bf16[50304,384]",), 2),
        ),
        (
            "  %s = (f32[4]{0}, bf16[2]{0}) all-reduce-start(%p, %q), replica_groups={{0,1}}",
            Collective("all-reduce", 20, 1, ("f32[4]", "bf16[2]"), 2),
        ),
        (
            "  %s = (bf16[1,48]{1,0:S(1)}, bf16[1,48]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) "
            "collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}",
            Collective("collective-permute", 96, 1, ("bf16[1,48]",), 0),
        ),
        (
            "  %t = (f32[2]{0}, f32[2]{0}) all-to-all(%a, %b), replica_groups={{0,1}}",
            Collective("all-to-all", 16, 1, ("f32[2]", "f32[2]"), 2),
        ),
    ],
)
def test_a_collective_is_read_with_its_shapes_and_its_group(line, expected):
    assert collectives(module(line)) == [expected]


def test_the_end_of_a_pair_and_other_operations_are_no_collectives():
    body = (
        "  %d = f32[16]{0} all-reduce-done(%s)\n"
        '  %f = f32[16]{0} fusion(%d), kind=kLoop, metadata={op_name="all-reduce(x)"}'
    )
    assert collectives(module(body)) == []


LOOP = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %ar = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
}

%cond (t: (f32[8], s32[])) -> pred[] {
  %n = s32[] constant(9)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (t: (f32[8], s32[])) -> (f32[8], s32[]) {
  %two = s32[] constant(2)
  %i = s32[] get-tuple-element(%t), index=1
  %next = s32[] add(%i, %two)
  %w = (s32[], f32[8]) while(%t), body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %r = (f32[8]{0}, s32[]) tuple(%x, %next)
}
"""


def test_what_a_loop_holds_happens_as_often_as_it_goes_round():
    """Nested; by XLA's note, and where there is none by the bound and the step of the counter."""
    body = "  %w = (f32[8]{0}, s32[]) while(%t), condition=%cond, body=%body"
    rounds = 5 * 3  # 0, 2, 4, 6, 8
    assert collectives(module(body, LOOP)) == [
        Collective("all-reduce", 32 * rounds, rounds, ("f32[8]",), 2)
    ]


def test_a_fusion_that_reduces_and_scatters_is_a_reduce_scatter():
    called = """
%all-reduce-scatter.1 (p: f32[8]) -> f32[2] {
  %ar = f32[8]{0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
}
"""
    body = "  %f = f32[2]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1"
    assert collectives(module(body, called)) == [Collective("reduce-scatter", 8, 1, ("f32[8]",), 4)]


def test_bytes_sent_are_those_of_a_ring():
    sent = {
        kind: Collective(kind, 800, 1, (), 4).sent
        for kind in ("all-gather", "all-reduce", "reduce-scatter", "collective-permute")
    }
    assert sent == {"all-gather": 600, "all-reduce": 1200, "reduce-scatter": 2400,
                    "collective-permute": 800}  # fmt: skip


def test_a_program_that_jax_compiled_is_read():
    """A loop of 5 all-reduces of (8, 4) float32, then one gather."""
    mesh = make_mesh()

    def program(x, w):
        def body(w, _):
            return jnp.sin(w + x.T @ (x @ w)), None

        return jax.lax.scan(body, w, None, length=5)[0].sum() + x

    rows = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=rows)
    w = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=whole)
    text = jax.jit(program, out_shardings=whole).lower(x, w).compile().as_text()
    found = totals(collectives(text))
    assert found["all-reduce"]["count"] == 5
    assert found["all-reduce"]["bytes"] == 5 * 8 * 4 * 4
    assert found["all-gather"] == {"count": 1, "bytes": 16 * 8 * 4, "sent": 16 * 8 * 4 * 7 / 8}


# ---- formulas ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (20.50G) exceeds available HBM (15.75G).",
            (20.5 * 2**30, 15.75 * 2**30),
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 30.17G of 15.75G hbm. Exceeded hbm capacity by 14.42G.",
            (29.17 * 2**30, 15.75 * 2**30),
        ),
        ("INTERNAL: something else", None),
    ],
)
def test_a_refusal_of_the_compiler_is_read(message, expected):
    found = out_of_memory(message, arguments=2**30)
    assert found == (pytest.approx(expected) if expected else None)


def test_the_peak_counts_donated_outputs_once():
    assert Program(10, 9, 8, 5, 1, False, None, {}, 0).peak == 17


def test_the_estimate_is_bound_by_the_slowest_part():
    chip = topology.Chip(1e9, 100.0, 10.0, 1.0, 0.5, False)
    program = Program(0, 0, 0, 50, 0, False, None, {"all-reduce": {"sent": 30}}, 0)
    target = topology.Target([None] * 4, "tpu", chip, False)
    found = roofline(program, target, 4000.0, 100.0, 2, 100, "none")
    assert (found.products, found.memory, found.links) == (10, 9, 3)
    assert (found.at_least, found.expected) == (10, 10 / 0.5 + 3)
    assert (found.mfu_at_most, found.mfu) == (1, 10 / 23)
    nodes = roofline(program, target._replace(several=True), 4000.0, 100.0, 2, 100, "full")
    assert nodes.links == nodes.at_least == 30
    assert nodes.expected == pytest.approx(30 + 4 / 3 * 10 / 0.5)
    assert roofline(program, target._replace(chip=None), 4000.0, 100.0, 2, 100, "none") is None


def test_rows_that_devices_cannot_share_become_the_nearest_that_they_can():
    preset = parse(["train_gpt2"])  # 12 x 40 rows
    assert shared_rows(preset, 16) == {}
    assert shared_rows(preset, 64) == {"batch_size": 8, "gradient_accumulation_steps": 64}
    one = dataclasses.replace(preset, batch_size=4, gradient_accumulation_steps=29)
    for shards in (3, 7, 8, 16, 1000):
        better = dataclasses.replace(one, **shared_rows(one, shards))
        A, B = micro_batches(better, SimpleNamespace(shape={"data": shards, "fsdp": 1}))
        assert B // shards <= 4
        assert abs(A * B - 116) <= shards / 2 or shards == A * B


def test_smaller_micro_batches_keep_the_global_batch():
    mesh = make_mesh(fsdp=8)
    config = dataclasses.replace(parse(["train_gpt2"]), batch_size=256,
                                 gradient_accumulation_steps=1)  # fmt: skip
    assert micro_batches(config, mesh) == (1, 256)
    halved = dataclasses.replace(config, **split(config, mesh, 2))
    assert micro_batches(halved, mesh) == (2, 128)


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v9z:4x4", "topology='v9z:4x4' is not known: give one such as v5e:4x4"),
        ("v5e", "is not known"),
        ("v5e:0x4", "is not known"),
        ("h200:9", "a node has up to 8 GPUs"),
        ("2xh200:8", "h200:MxN for M nodes of N"),
    ],
)
def test_a_topology_that_does_not_exist_is_refused_in_a_line(name, words, monkeypatch):
    monkeypatch.setattr(topology, "entry_points", lambda group: [SimpleNamespace(name="cuda13")])
    with pytest.raises(UserError) as error:
        describe_topology(name)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_compiler_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(topology, "find_spec", lambda name: None)
    monkeypatch.setattr(topology, "entry_points", lambda group: [])
    with pytest.raises(UserError, match=r"libtpu.*pip install 'gpt_jax\[tpu\]'"):
        describe_topology("v5e:4x4")
    with pytest.raises(UserError, match=r"CUDA plugin.*pip install 'gpt_jax\[cuda\]'"):
        describe_topology("h200:8")


def command(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "gpt_jax.plan", *arguments],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip


def test_wrong_input_is_exit_code_2_and_one_line():
    done = command("--topology=v5x:4x4")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: topology='v5x:4x4' is not known")
    assert done.stderr.count("\n") == 1


def test_a_plan_for_this_machine_is_one_json_object_with_the_numbers_of_the_step():
    done = command(*TINY, "--fsdp=2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    config = parse([*TINY, "--fsdp=2"], PlanConfig)
    assert found["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1}
    assert found["parameters"] == 64 * 32 + 16 * 32 + 2 * (12 * 32 * 32 + 2 * 32) + 32
    step = found["step"]
    assert step["tokens"] == 2 * 16 * 16
    per_token = flops_per_token(
        SimpleNamespace(n_layer=2, n_embd=32, block_size=16), found["parameters"] - 16 * 32
    )
    assert step["flops"] == per_token * step["tokens"]
    memory = found["memory_bytes"]
    assert found["fits"] is None  # a CPU is not in the table
    assert memory["peak"] >= memory["arguments"] > 0
    assert {"all-gather", "all-reduce"} <= set(found["collectives"])
    assert found["run"]["tokens"] == config.max_iters * step["tokens"]


def small(*more):
    return parse([*TINY, *more], PlanConfig)


def test_what_does_not_fit_comes_with_the_nearest_settings_that_do(monkeypatch):
    """With a chip so small that the rows asked for are too many."""
    config = small("--batch_size=64", "--gradient_accumulation_steps=8", "--fsdp=8", "--device=cpu")
    target = describe_topology("local")
    needed = plan(config, target)["memory_bytes"]["peak"]
    chip = topology.CHIPS["v5e"]._replace(memory=0.7 * needed)
    found = plan(config, target._replace(chip=chip))
    assert found["fits"] is False
    best = found["remedies"][0]
    assert best["compiled"]
    assert best["peak_bytes"] <= chip.memory
    assert best["settings"].startswith("--batch_size=")
    page = written(found)
    assert "DOES NOT FIT" in page
    assert best["settings"] in page
    assert max(map(len, page.splitlines())) <= 80


@pytest.mark.parametrize("name", ["v5e:2x2", "h200:4"])
def test_a_step_compiles_for_hardware_that_is_not_there(name):
    """C29, C30: on a machine with neither; libtpu or the CUDA plugin must be installed."""
    if name.startswith("v"):
        pytest.importorskip("libtpu")
    elif not any("cuda" in plugin.name for plugin in entry_points(group="jax_plugins")):
        pytest.skip("JAX's CUDA plugin is not installed")
    done = command(*TINY, f"--topology={name}", "--fsdp=4", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"]
    assert found["n_devices"] == 4
    assert found["model"]["dtype"] == "bfloat16"
    assert found["model"]["attention"] == ("reference" if name[0] == "v" else "cudnn")
    assert found["time"]["at_least"] < found["time"]["expected"]
    assert found["collectives"]


def test_a_shape_that_no_slice_has_is_refused_in_a_line():
    pytest.importorskip("libtpu")
    done = command("--topology=v5e:3x5")
    assert done.returncode == 2
    assert done.stderr.startswith("error: topology=v5e:3x5: libtpu knows no v5e slice of 3x5")
    assert done.stderr.count("\n") == 1
