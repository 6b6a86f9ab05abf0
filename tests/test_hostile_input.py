"""Files, prompts and settings made to do harm are refused in a line: nothing in them is run.

Through the commands, as a user meets them.
"""

import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from contextlib import chdir, contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import sample
import train
from gpt_jax import checkpoint, evaluate
from gpt_jax.errors import exit_code
from gpt_jax.integrity import amend
from gpt_jax.interop import torch_file
from gpt_jax.interop.safetensors_file import write as write_safetensors
from gpt_jax.prepare import __main__ as prepare_command
from gpt_jax.prepare import prepare

ROOT = Path(__file__).parents[1]
TEXT = "".join(f"line {i}: to be, or not.\n" for i in range(60))
TINY = [
    "train_shakespeare_char", "--dataset=text", "--n_layer=1", "--n_head=2", "--n_embd=16",
    "--block_size=8", "--batch_size=8", "--gradient_accumulation_steps=1", "--dropout=0",
    "--eval_iters=1", "--warmup_iters=0", "--max_iters=1", "--out_dir=out", "--data=1",
]  # fmt: skip
RESUME = ["--init_from=resume", "--out_dir=out"]
SAMPLE = ["--out_dir=out", "--num_samples=1", "--max_new_tokens=1"]
MOST_MEMORY = 2**20  # KiB that a refusal may take
PATIENCE = 20  # seconds that a command may take
MARKER = "marker"  # what code in a file would make
LARGEST = 2**31 - 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A working directory with a data set and a run of one checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    with chdir(folder), pytest.MonkeyPatch.context() as patch:
        Path("text.txt").write_text(TEXT, "utf-8")
        prepare(
            "text", Path("data/text"), input=Path("text.txt"), tokenizer="char",
            log=lambda _: None,
        )  # fmt: skip
        patch.setattr(sys, "argv", ["command", *TINY])
        assert train.main() == 0
    return folder


@pytest.fixture
def work(trained, tmp_path, monkeypatch):
    """A copy of it, to damage."""
    folder = shutil.copytree(trained, tmp_path / "work")
    monkeypatch.chdir(folder)
    return folder


@contextmanager
def patience():
    """Turn a command that hangs into a failure."""

    def give_up(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def run(monkeypatch, capfd):
    """Run a command in this process; return its exit code and the lines of its stderr."""

    def command(script, *argv):
        monkeypatch.setattr(sys, "argv", ["command", *argv])
        capfd.readouterr()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with patience():
            code = script.main()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY
        assert not list(Path().rglob(MARKER))
        return code, capfd.readouterr().err.splitlines()

    return command


def refused(result, *said):
    """A command that ended with 2 and a line that holds one of these texts."""
    code, lines = result
    assert code == 2, lines
    *passed_over, line = lines
    assert all(other.startswith("passed over: ") for other in passed_over), lines
    assert line.startswith("error: "), lines
    assert len(line) < 700
    assert line.isprintable()
    assert any(text in line for text in said), line


# ---- pickles


class Make:
    """What plain pickle makes a folder of when it is read."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


class Build:
    def __reduce__(self):
        return dict, (), {"__setstate__": 1, MARKER: 1}


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


META = {"vocab_size": 2, "itos": {0: "a", 1: "b"}, "stoi": {"a": 0, "b": 1}}
PICKLES = {
    "reduce": pickle.dumps({**META, "x": Make(os.mkdir, (MARKER,))}),
    "nested": pickle.dumps({**META, "x": [{"y": [Make(os.system, (f"mkdir {MARKER}",))]}]}),
    "as a symbol": pickle.dumps({**META, "itos": {0: Make(os.mkdir, (MARKER,)), 1: "b"}}, 2),
    "old text protocol": f"cos\nmkdir\n(S'{MARKER}'\ntR.".encode(),
    "INST": f"(S'{MARKER}'\nios\nmkdir\n.".encode(),
    "OBJ": f"(cos\nmkdir\nS'{MARKER}'\no.".encode(),
    "STACK_GLOBAL": b"\x80\x04"
    + short("os")
    + short("mkdir")
    + b"\x93"
    + short(MARKER)
    + b"\x85R.",
    "BUILD": pickle.dumps(Build()),
    "NEWOBJ": b"\x80\x02cio\nFileIO\n(" + short(MARKER) + short("w") + b"t\x81.",
    "extension registry": b"\x80\x02\x82\x01.",
    "persistent id": f"P{MARKER}\n.".encode(),
    "persistent id from the stack": short(MARKER) + b"Q.",
    "next buffer": b"\x80\x05\x97.",
    "memo of 4 billion": b"K\x01r" + struct.pack("<I", 2**32 - 1) + b".",
    "memo of 10 to the 30": b"K\x01p" + b"9" * 30 + b"\n.",
    "frame of 4 EiB": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b".",
    "nested too deep": b"]" * 100_000 + b"a" * 99_999 + b".",
}


@pytest.mark.parametrize("data", PICKLES.values(), ids=PICKLES)
def test_a_meta_pkl_runs_nothing(work, run, data):
    """C24."""
    shutil.copytree("data/text", "data/evil")
    Path("data/evil/meta.json").unlink()
    Path("data/evil/meta.pkl").write_bytes(data)
    refused(run(train, *TINY, "--dataset=evil", "--out_dir=new"), "is not nanoGPT's meta.pkl")
    assert not Path("new").exists()


@pytest.mark.parametrize("form", ["reduce", "old text protocol", "STACK_GLOBAL"])
def test_these_pickles_do_run_code_where_they_are_unpickled(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    pickle.loads(PICKLES[form])
    assert Path(MARKER).is_dir()


# ---- files of PyTorch's


def torch_archive(pickle, compression=0, **more):
    """An archive as torch.save writes them, of a pickle that it would not."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in {"data.pkl": pickle, "version": b"3\n", **more}.items():
            archive.writestr(f"ckpt/{name}", data)
    return file.getvalue()


def claimed(**sizes):
    """A checkpoint of nanoGPT's, but for the sizes that its network claims."""
    values = torch_file.load(ROOT / "tests" / "reference" / "ckpt_nobias.pt")
    values["model_args"] |= sizes
    torch_file.save(Path("claimed.pt"), values)
    return Path("claimed.pt").read_bytes()


UNREADABLE = "cannot be read as a file of tensors by torch.save"
TORCH = {
    **{name: (data, UNREADABLE) for name, data in PICKLES.items()},
    **{
        f"{name}, in an archive": (torch_archive(data), f"{UNREADABLE}|is not a checkpoint of")
        for name, data in PICKLES.items()
    },
    "a zip bomb": (
        torch_archive(b"\x80\x02N.", zipfile.ZIP_DEFLATED, x=bytes(2**24)), "is compressed",
    ),
    "cut off": (torch_archive(PICKLES["reduce"])[:-30], UNREADABLE),
    "no numbers": (torch_archive(b"\x80\x02N."), "is not a checkpoint of nanoGPT's train.py"),
    "2 billion layers": (lambda: claimed(n_layer=LARGEST), "n_layer=2147483647, and it has"),
    "2 billion ids": (lambda: claimed(vocab_size=LARGEST), "has shape (27, 8), the model config"),
    "wide": (lambda: claimed(n_embd=2**30), "the model config (27, 1073741824)"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "said"), TORCH.values(), ids=TORCH)
def test_a_torch_file_runs_nothing_and_fills_no_memory(work, run, data, said):
    """C24, C26."""
    Path("evil").mkdir()
    Path("evil/ckpt.pt").write_bytes(data if isinstance(data, bytes) else data())
    for script, argv in ((train, ["--out_dir=new"]), (sample, []), (evaluate, [])):
        refused(run(script, *argv, "--init_from=evil/ckpt.pt"), *said.split("|"))
    refused(run(sample, "--out_dir=evil"), "no checkpoint in evil: nanoGPT's is taken by")
    assert not Path("new").exists()


@pytest.mark.parametrize("kind", ["pipe", "folder", "endless", "nothing"])
def test_what_is_named_as_a_torch_file_and_is_none_is_refused(work, run, kind):
    path = Path("evil.pt")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    for script, argv in ((train, [*TINY, "--out_dir=new"]), (sample, []), (evaluate, [])):
        said = ("is no regular file", "cannot be read: No such file", "no checkpoint in evil.pt")
        refused(run(script, *argv, "--init_from=evil.pt"), *said)


# ---- configs

CONFIGS = [
    f"import os\nos.mkdir({MARKER!r})",
    f"batch_size = __import__('os').mkdir({MARKER!r})",
    f"out_dir = open({MARKER!r}, 'w')",
    f"exec('import os; os.mkdir({MARKER!r})')",
    f'out_dir = f\'{{__import__("os").mkdir("{MARKER}")}}\'',
    "out_dir = f'{out_dir!r:>{10**9}}'",
    "out_dir = '{0.__class__}'.format(1)",
    f"out_dir = (lambda: open({MARKER!r}, 'w'))()",
    "batch_size = (1).__class__.__base__.__subclasses__()",
    "batch_size = [n for n in range(10**12)]",
    "batch_size = (n := 10**12)",
    f"@print\ndef f(x=open({MARKER!r}, 'w')): pass",
    f"class X(metaclass=print): open({MARKER!r}, 'w')",
    f"from os import mkdir\nmkdir({MARKER!r})",
    "import time as os",
    "import time.os",
    "time.strftime = print",
    f"int = open\nbatch_size = int({MARKER!r}, 'w')",
    "batch_size = 9**9**9",
    "batch_size = 1 << 10**12",
    "out_dir = 'a' * 10**12",
    "out_dir = '%1000000000d' % 1",
    "out_dir = b'a' * 10",
    "batch_size = int('9' * 10000)",
    "batch_size = " + "9" * 5000,
    "batch_size = " + "(" * 5000 + "1" + ")" * 5000,
    "batch_size = " + "-" * 50000 + "1",
    "out_dir = 'a'\n" + "out_dir += out_dir\n" * 64,
    "batch_size = 1\n" * 100_000,
    "\0",
]


@pytest.mark.parametrize("text", CONFIGS, ids=lambda text: repr(text[:40]))
def test_a_config_runs_nothing(tmp_path, monkeypatch, run, text):
    """C24: by its path, and by its name in the current directory; nothing else is looked for."""
    monkeypatch.chdir(tmp_path)
    for path in ("evil.py", "config/train_gpt2.py"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(text, "utf-8")
        for script in (train, sample):
            refused(run(script, path), "nothing was executed", "not valid Python")


@pytest.mark.parametrize("kind", ["folder", "binary", "endless"])
def test_a_config_that_is_no_text_is_refused(tmp_path, monkeypatch, run, kind):
    monkeypatch.chdir(tmp_path)
    if kind == "folder":
        Path("evil.py").mkdir()
    elif kind == "binary":
        Path("evil.py").write_bytes(bytes(range(256)))
    else:
        Path("evil.py").symlink_to("/dev/zero")
    refused(run(train, "evil.py"), "is a folder", "cannot be read", "nothing was executed")


def test_files_that_happen_to_lie_in_the_current_directory_are_not_run(work, run):
    for name in ("configurator.py", "model.py", "quickstart.py", "jax.py", "sitecustomize.py"):
        Path(name).write_text(f"open({MARKER!r}, 'w')")
    assert run(sample, *SAMPLE)[0] == 0


# ---- a checkpoint's JSON, sealed again as who means harm can

STEP = Path("out/checkpoints/1")
META_JSON = STEP / "meta" / "metadata"
NAN, HUGE = float("nan"), -(10**400)


def change(path, **changes):
    """Change a JSON, keys that lie in others as `model__n_layer=3`, and seal it anew."""
    saved = json.loads(path.read_text("utf-8"))
    for name, value in changes.items():
        *outer, last = name.split("__")
        inner = saved
        for key in outer:
            inner = inner[key]
        inner[last] = value
    amend(path, saved)


SEALED = [
    ({"model__n_layer": LARGEST}, "it has n_layer=1"),
    ({"model__vocab_size": LARGEST}, "it has vocab_size=23"),
    ({"model__n_embd": 2**30, "model__n_head": 1}, "it has n_embd=16"),
    ({"model__n_embd": LARGEST}, "not a multiple of n_head=2"),
    ({"model__n_layer": 10**300}, "out of range"),
    ({"model__n_layer": "x\n" * 10**4}, "is a str"),
    ({"model__n_head": 4}, "holds other arrays than its JSON says"),
    ({"model__dropout": NAN}, "out of range"),
    ({"model__scan_layers": "True"}, "is a str"),
    ({"model__nonsense": 1}, "of another version"),
    ({"model": []}, "cannot be read"),
    ({"model": None}, "cannot be read"),
    ({"digests": None}, "cannot be read"),
    ({"digests": []}, "cannot be read"),
    ({"digests": {"params": 3, "optimizer": "x"}}, "has no digests"),
    ({"digests": {"params": {}, "optimizer": {}}}, "is not what was saved"),
    ({"digests__params__wte/weight": [], "digests__optimizer__step": {}}, "is not what was saved"),
    ({"tokenizer": {"kind": "byte"}}, "n_tokens=256", "with a byte tokenizer"),
    ({"tokenizer__symbols": "".join(map(chr, range(0xD800, 0xD817)))}, "no tokenizer", "with a"),
    ({"tokenizer__symbols": [{}, [], None]}, "no tokenizer", "with a char tokenizer"),
    ({"tokenizer": {"kind": "tiktoken", "name": "../../x"}}, "no tiktoken encoding", "with a"),
    ({"tokenizer": {"kind": "tiktoken", "name": "http://[::1]:9/x"}}, "no tiktoken", "with a"),
    ({"tokenizer": {"kind": "tiktoken", "name": "x" * 10**6}}, "no tokenizer of kind", "with a"),
    ({"tokenizer": {"kind": [], "name": 3}}, "no tokenizer of kind", "with a"),
    ({"iter": "1"}, "cannot be read"),
    ({"iter": [1]}, "cannot be read"),
    ({"iter": 2}, "cannot be read"),
    ({"config": []}, "cannot be read"),
    ({"config": "x"}, "cannot be read"),
    ({"tokenizer": []}, "cannot be read", "no tokenizer"),
    ({"tokenizer": {"a": 1}}, "cannot be read", "no tokenizer", "with a"),
    ({"iter": True}, "cannot be read"),
    ({"iter": 1.0}, "cannot be read"),
    ({"val_loss": "x"}, "cannot be read"),
    ({"best_val_loss": "x"}, "cannot be read"),
    ({"best_val_loss": HUGE}, "cannot be read"),
    ({"wandb_id": {}}, "cannot be read"),
]


def name_of(case):
    return repr(case)[:60] if isinstance(case, dict) else ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [(changes, said) for changes, *said in SEALED],
    ids=name_of,
)
def test_a_checkpoints_json_that_lies_is_refused(work, run, changes, said):
    """C26."""
    change(META_JSON, **changes)
    said = [*said, "no checkpoint in out is whole"]  # of a run that looked for an earlier one
    refused(run(sample, *SAMPLE), *said)
    refused(run(train, *RESUME), *said)


@pytest.mark.parametrize("key", ["config", "best_val_loss", "wandb_id"])
def test_a_change_of_any_key_that_is_not_sealed_is_seen(work, run, key):
    saved = json.loads(META_JSON.read_text("utf-8"))
    for value in (None, [], {**saved["config"], "n_layer": 2}):
        META_JSON.write_text(json.dumps({**saved, key: value if value != saved[key] else 1.0}))
        refused(run(sample, *SAMPLE), "is not what")


def test_a_checkpoint_does_not_say_where_a_resumed_run_writes(work, run):
    change(META_JSON, config__out_dir="../elsewhere", config__data_dir="../data", wandb_id="../x")
    saved = json.loads(Path("out/config.json").read_text())
    Path("out/config.json").write_text(json.dumps({**saved, "out_dir": "../elsewhere"}))
    assert run(train, *RESUME, "--max_iters=2")[0] == 0
    assert (work / "out/checkpoints/2").is_dir()
    assert [path.name for path in work.parent.iterdir()] == ["work"]
    assert sorted(path.name for path in work.iterdir()) == ["data", "out", "text.txt"]


@pytest.mark.parametrize(
    "dataset",
    [
        ["x"],
        "a\nb",
        "../../x",
    ],
)
def test_a_checkpoint_does_not_say_that_data_lie_outside_of_data_dir(work, run, dataset):
    change(META_JSON, config__dataset=dataset)
    code, lines = run(evaluate, "--out_dir=out")
    refused((code, lines[-1:]), "dataset=")


# ---- Orbax's files


def claim_rows(rows):
    """Have wte stored as an array of so many rows of which none is there, and the JSON agree."""
    import tensorstore

    params = (STEP / "params").absolute()
    kvstore = {"driver": "ocdbt", "base": f"file://{params}", "path": "wte.weight/"}
    old = tensorstore.open({"driver": "zarr", "kvstore": kvstore}).result()
    metadata = {**old.spec().to_json()["metadata"], "shape": [rows, 16]}
    tensorstore.open(
        {"driver": "zarr", "kvstore": kvstore, "metadata": metadata},
        create=True,
        delete_existing=True,
    ).result()
    change(META_JSON, model__vocab_size=rows)


def test_an_array_of_which_nothing_is_stored_is_not_allocated(work, run):
    """C26: 137 GB, in files of some kB that all agree on it."""
    claim_rows(LARGEST)
    refused(run(sample, *SAMPLE), "claims 137,4")
    refused(run(train, *RESUME), "no checkpoint in out is whole")


def rename_keys(name):
    """Rename the leaf of a path in Orbax's list of the arrays."""

    def damage():
        path = STEP / "params" / "_METADATA"
        path.write_text(path.read_text().replace("weight", name))

    return damage


def instead(path, make):
    """Put something else in the place of a file or a folder."""

    def damage():
        shutil.rmtree(STEP / path) if (STEP / path).is_dir() else (STEP / path).unlink()
        make(STEP / path)

    return damage


def deep(path):
    path.write_text("[" * 100_000)


def noise(path):
    path.write_bytes(bytes(range(256)))


def itself(path):
    path.symlink_to(path.name)


ORBAX = {
    "keys with ..": rename_keys("../../../../x"),
    "keys of root": rename_keys("/x"),
    "JSON a folder": instead("meta/metadata", Path.mkdir),
    "JSON a link to itself": instead("meta/metadata", itself),
    "JSON nested too deep": instead("meta/metadata", deep),
    "JSON noise": instead("meta/metadata", noise),
    "_METADATA a folder": instead("params/_METADATA", Path.mkdir),
    "_METADATA nested too deep": instead("params/_METADATA", deep),
    "_METADATA noise": instead("params/_METADATA", noise),
    "manifest a folder": instead("params/manifest.ocdbt", Path.mkdir),
    "manifest noise": instead("params/manifest.ocdbt", noise),
    "arrays a file": instead("params", noise),
    "arrays an empty folder": instead("params/ocdbt.process_0", Path.mkdir),
    "JSON a pipe": instead("meta/metadata", os.mkfifo),
    "_METADATA a pipe": instead("params/_METADATA", os.mkfifo),
}


@pytest.mark.parametrize(
    "damage",
    ORBAX.values(),
    ids=ORBAX,
)
def test_files_of_a_checkpoint_that_are_not_orbaxs_are_refused(work, run, damage):
    damage()
    refused(run(sample, *SAMPLE), "is damaged", "cannot be read")
    refused(run(train, *RESUME), "no checkpoint in out is whole")


def test_only_the_plain_number_of_a_step_names_a_checkpoint(work, run):
    others = ("-1", "1e3", "2 ", "²", "3.orbax-checkpoint-tmp-4", "x\n")
    for name in others:
        shutil.copytree(STEP, STEP.with_name(name))
    assert checkpoint.steps("out") == [1]
    STEP.rename("elsewhere")
    refused(run(sample, *SAMPLE), "no checkpoint in out: train first")
    shutil.rmtree("out/checkpoints")
    Path("out/checkpoints").write_text("a file")
    refused(run(sample, *SAMPLE), "no checkpoint in out: train first")
    refused(run(train, *RESUME), "has no checkpoint to resume from")


def test_a_number_written_otherwise_names_no_checkpoint(work, run):
    for name in ("007", "२", "01"):
        shutil.copytree(STEP, STEP.with_name(name))
    assert checkpoint.steps("out") == [1]
    assert run(train, *RESUME)[0] == 0


# ---- what else lies in a run's folder


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", '"x"', "[" * 100_000, '{"n_layer": "x"}', '{"n_layer": null}', "\0",
     '{"data_dir": 3.5}', '{"dataset": "../x"}', '{"batch_size": 1e400}',
     "[1" + ",1" * 10**6 + "]"],
    ids=lambda text: repr(text[:20]),
)  # fmt: skip
def test_a_saved_config_of_anything_else_is_refused(work, run, text):
    Path("out/config.json").write_text(text)
    refused(run(train, *RESUME), "is not a saved run", "it must be", "leaves data_dir", "error: ")


@pytest.mark.parametrize(
    "text",
    [
        b'{"iter": [0]}\n{"iter": true}\n{"iter": 1e308}\n[1]\n5\n"x"\n{"loss": 1}\n{"iter": 0, "l',
        b'{"iter": ' + b"9" * 5000 + b"}\n\n\0\n",
        bytes(range(256)),
        b"[" * 100_000 + b"\n",
        b'{"iter": 0, "loss": {}}\n',
        b'{"iter": 0, "val_loss": 1.0}\n',
        b'{"iter": -1' + b"0" * 400 + b', "loss": 1.0}\n',
    ],
    ids=lambda text: repr(text[:20]),
)
def test_a_run_goes_on_whatever_its_metrics_say(work, run, text):
    Path("out/metrics.jsonl").write_bytes(text)
    assert run(train, *RESUME) == (0, [])


# ---- prompts


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ("\ud800", "is not Unicode"),
        ("\0", "is not among the 23 symbols"),
        ("🙂" * 250_000, "is not among the 23 symbols"),
        ("", "the prompt has no tokens"),
        ("FILE:", "cannot be read (No such file"),
        ("FILE:empty", "the prompt has no tokens"),
        ("FILE:noise", "cannot be read (it is not UTF-8)"),
        ("FILE:data", "cannot be read (Is a directory)"),
        ("FILE:/dev/zero", "longer than 10,000,000 characters"),
        ("FILE:" + "x" * 300, "cannot be read (File name too long)"),
        ("FILE:a\0b", "cannot be read (embedded null byte)"),
        ("FILE:a\nb", "cannot be read (No such file"),
    ],
    ids=lambda text: repr(text[:20]),
)
def test_a_prompt_that_cannot_be_used_is_refused(work, run, start, said):
    Path("empty").touch()
    noise(Path("noise"))
    refused(run(sample, *SAMPLE, f"--start={start}"), said)


# ---- weights from the hub


def safetensors(header, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def tensor(dtype="F32", shape=(1,), offsets=(0, 4), name="wte.weight"):
    return safetensors(
        {name: {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        safetensors({}, 2**63),
        safetensors(b"[" * 100_000),
        safetensors({}),
        tensor() + bytes(4),
        tensor(name="a\nb" * 100) + bytes(4),
        tensor(shape=[2**62, 2**62]) + bytes(4),
        tensor(shape=[10**12], offsets=[0, 4 * 10**12]),
        tensor(shape=[-1]),
        tensor(dtype="F999") + bytes(4),
        tensor(dtype="BF16", shape=[2]) + bytes(4),
        tensor(offsets=[4, 0]),
        tensor(offsets=[0, 400]) + bytes(4),
        tensor(offsets=[2**62, 2**62 + 4]) + bytes(4),
    ],
    ids=lambda data: repr(data[:30]),
)
def test_a_file_of_weights_that_lies_is_refused(work, run, monkeypatch, data):
    """From the hub as from a folder, before anything that it claims is allocated."""
    Path("evil").mkdir()
    Path("evil/model.safetensors").write_bytes(data)
    Path("evil/config.json").write_text('{"model_type": "gpt2"}')
    hub = SimpleNamespace(snapshot_download=lambda repo, allow_patterns: "evil")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    said = ("evil/model.safetensors is not a whole", "too few for n_layer=12")
    refused(run(sample, "--init_from=gpt2"), *said)
    refused(run(sample, "--init_from=evil"), *said)
    refused(run(train, *TINY, "--init_from=./evil", "--out_dir=new"), *said)
    refused(run(evaluate, "--init_from=someone/evil"), *said)
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_layer": LARGEST}, "too few for n_layer="),
        ({"vocab_size": LARGEST}, "has shape (11, 8)"),
        ({"n_embd": 2**30, "n_head": 2**29}, "has shape (11, 8)"),
        ({"n_layer": HUGE}, "is out of range"),
        ({"n_embd": HUGE}, "is out of range"),
        ({"n_layer": -1}, "is out of range"),
        ({"n_layer": [3]}, "it must be an int"),
        ({"n_head": 3}, "is not a multiple"),
        ({"model_type": "../../x"}, "model_type='../../x'"),
        ({"model_type": "x" * 10**6}, "model_type="),
        ({"auto_map": {"AutoModel": "evil.Model"}, "model_type": "custom"}, "model_type='custom'"),
        ({"activation_function": "__import__('os').mkdir('marker')"}, "activation_function="),
        ({"activation_function": {"a\n": 1}}, "activation_function="),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon=nan"),
    ],
    ids=lambda case: repr(case)[:40],
)
def test_a_config_of_weights_that_lies_is_refused(work, run, changes, said):
    """Hugging Face's config.json may name code to run: it is never looked at."""
    arrays = {"wte.weight": np.zeros((11, 8), np.float32)}
    arrays |= {f"h.{i}.ln_1.bias": np.zeros(8, np.float32) for i in range(3)}
    Path("evil").mkdir()
    write_safetensors(Path("evil/model.safetensors"), arrays, "float32", {})
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 6, "vocab_size": 11}
    config = {"model_type": "gpt2", **sizes, **changes}
    Path("evil/config.json").write_text(json.dumps(config))
    Path("evil/evil.py").write_text(f"import os\nos.mkdir({MARKER!r})")
    refused(run(sample, "--init_from=evil"), said)


# ---- a data set's folder


@pytest.mark.parametrize(
    "text",
    [
        '{"vocab_size": 2147483647, "dtype": "uint16", "tokenizer": {"kind": "byte"}}',
        '{"vocab_size": true, "dtype": "uint16", "tokenizer": {"kind": "char", "symbols": "a"}}',
        '{"vocab_size": 1, "dtype": "uint16", "tokenizer": {"kind": "char", "symbols": [1]}}',
        '{"vocab_size": 1, "dtype": "uint16", "tokenizer": {"kind": "char", "symbols": "\\ud800"}}',
        '{"vocab_size": 1e400, "dtype": "object", "tokenizer": {"kind": "byte"}}',
    ],
)
def test_a_meta_json_that_lies_is_refused(work, run, text):
    Path("data/text/meta.json").write_text(text)
    refused(run(train, *TINY, "--out_dir=new"), "meta.json cannot be used")


@pytest.mark.parametrize("name", ["meta.json", "meta.pkl"])
def test_a_pipe_or_an_endless_file_is_not_read_for_a_data_sets_meta(work, run, name):
    Path("data/text/meta.json").unlink()
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(Path("data/text") / name)
        refused(run(train, *TINY, "--out_dir=new"), "is no regular file")
        (Path("data/text") / name).unlink()


# ---- the environment


@pytest.mark.parametrize("cache", ["nowhere", "text.txt", "wrong"])
def test_a_cache_of_tiktoken_without_the_right_files_is_refused(work, run, monkeypatch, cache):
    import tiktoken.load  # or it comes only with the first encoding

    def offline(*_):
        raise OSError("no network")

    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(tiktoken.load, "read_file", offline)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(Path(cache).absolute()))
    Path("wrong").mkdir()
    for name in ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
                 "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"):  # fmt: skip
        Path("wrong", name).write_bytes(PICKLES["reduce"])
    script = SimpleNamespace(main=exit_code(prepare_command.main))
    refused(run(script, "text", "--input=text.txt", "--name=b"), "set TIKTOKEN_CACHE_DIR")


def test_an_environment_of_nonsense_is_refused_in_a_line_or_ignored(work):
    def start(**environment):
        return subprocess.Popen(
            [sys.executable, str(ROOT / "sample.py"), *SAMPLE],
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    nonsense = start(JAX_PLATFORMS="nonsense")
    unwritable = start(JAX_COMPILATION_CACHE_DIR="/proc/nowhere", PYTHONHASHSEED="1")
    error = nonsense.communicate()[1]
    refused((nonsense.returncode, error.splitlines()), "device=auto is not there")
    error = unwritable.communicate()[1]
    assert unwritable.returncode == 0, error
    assert "Traceback" not in error
