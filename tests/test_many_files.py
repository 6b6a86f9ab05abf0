"""Runs on shards and on mixtures, from the files to the last report."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from test_end_to_end import TINY, losses, run, same_run
from test_end_to_end import work as work
from test_prepare_checked import header, npy

import train
from gpt_jax import evaluate, plan
from gpt_jax.errors import UserError
from gpt_jax.prepare import prepare_on_first_use
from gpt_jax.prepare.dataset import for_dataset

SHARDS = [*TINY, "--dataset=shards"]
MIXED = [*TINY, "--dataset=text:0.7,other:0.3"]


def ids(split):
    return np.fromfile(f"data/text/{split}.bin", "<u2")


def fill(name, files, dtype="uint16"):
    """A data set of these files, with text's tokenizer."""
    folder = Path("data", name)
    folder.mkdir()
    meta = json.loads(Path("data/text/meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"dtype": dtype}))
    for path, content in files.items():
        (folder / path).write_bytes(content)


def gpt2_shard(tokens):
    return header(20240520, 1, len(tokens)) + tokens.astype("<u2").tobytes()


def llama3_shard(tokens):
    return header(20240801, 7, len(tokens)) + tokens.astype("<u4").tobytes()


@pytest.fixture
def other():
    """A second data set with text's tokenizer, its tokens in another order."""
    fill("other", {f"{split}.bin": ids(split)[::-1].tobytes() for split in ("train", "val")})


@pytest.mark.parametrize(
    ("train_name", "val_name", "write", "dtype"),
    [
        ("fineweb_train_00000{}.bin", "fineweb_val_000000.bin", gpt2_shard, "uint16"),
        ("web_train_{}.bin", "web_val.bin", llama3_shard, "uint32"),
        ("train_{:03}.bin", "val.bin", lambda tokens: tokens.tobytes(), "uint16"),
        ("edufineweb_train_{}.npy", "edufineweb_val_0.npy", npy, "uint16"),
    ],
    ids=["llm.c GPT-2", "llm.c Llama 3", "nanoGPT", "build-nanogpt"],
)
def test_shards_train_and_resume_to_the_same_end(
    train_name, val_name, write, dtype, monkeypatch, capsys
):
    parts = np.array_split(ids("train"), 3)
    files = {train_name.format(i): write(part) for i, part in enumerate(parts, 1)}
    fill("shards", files | {val_name: write(ids("val"))}, dtype)
    assert run(train, monkeypatch, *SHARDS, "--out_dir=whole") == 0
    n = f"{len(ids('train')):,}"
    assert f"\ntrain: shards, {n} tokens in 3 files\n" in capsys.readouterr().out
    assert run(train, monkeypatch, *SHARDS, "--out_dir=parts", "--max_iters=5") == 0
    assert run(train, monkeypatch, "--init_from=resume", "--out_dir=parts", "--max_iters=10") == 0
    same_run("whole", "parts", 10)


def test_one_shard_gives_the_run_that_the_same_tokens_without_a_header_give(monkeypatch):
    fill("shards", {f"web_{split}_0.bin": gpt2_shard(ids(split)) for split in ("train", "val")})
    assert run(train, monkeypatch, *TINY, "--out_dir=text") == 0
    assert run(train, monkeypatch, *SHARDS, "--out_dir=shards") == 0
    same_run("text", "shards", 10)


def test_a_folder_without_meta_json_is_gpt2s(monkeypatch, capsys):
    fill("shards", {f"web_{split}_0.bin": gpt2_shard(ids(split)) for split in ("train", "val")})
    Path("data/shards/meta.json").unlink()
    assert run(train, monkeypatch, *SHARDS, "--max_iters=1") == 0
    meta = json.loads(Path("out/checkpoints/1/meta/metadata").read_text())
    assert meta["tokenizer"] == {"kind": "tiktoken", "name": "gpt2"}
    assert meta["model"]["vocab_size"] == 50304


@pytest.mark.usefixtures("other")
def test_a_mixture_trains_and_resumes_to_the_same_end(monkeypatch, capsys):
    assert run(train, monkeypatch, *MIXED, "--out_dir=whole") == 0
    out = capsys.readouterr().out
    assert re.search(r"^train: text, [\d,]+ tokens in 1 file, 70.00% of the samples$", out, re.M)
    assert re.search(r"^val: other, [\d,]+ tokens in 1 file, 30.00% of the samples$", out, re.M)
    assert run(train, monkeypatch, *MIXED, "--out_dir=parts", "--max_iters=3") == 0
    # no config is named: the mixture is the saved one
    assert run(train, monkeypatch, "--init_from=resume", "--out_dir=parts", "--max_iters=10") == 0
    same_run("whole", "parts", 10)
    assert json.loads(Path("parts/config.json").read_text())["dataset"] == "text:0.7,other:0.3"


@pytest.mark.usefixtures("other")
def test_a_mixture_is_the_same_on_any_mesh(monkeypatch):
    """C10, C12."""
    for name, mesh in {"one": ["--data=1"], "eight": ["--data=2", "--fsdp=4"]}.items():
        flags = [*MIXED, "--dropout=0", f"--out_dir={name}", *mesh]
        assert run(train, monkeypatch, *flags) == 0
    assert losses("one") == pytest.approx(losses("eight"), rel=1e-5)


@pytest.mark.usefixtures("other")
def test_a_run_that_is_asked_for_another_mixture_is_refused(monkeypatch, capsys):
    assert run(train, monkeypatch, *MIXED, "--max_iters=2") == 0
    again = [*TINY, "--init_from=auto", "--dataset=text:0.6,other:0.4"]
    assert run(train, monkeypatch, *again) == 2
    error = capsys.readouterr().err
    assert "dataset='text:0.6,other:0.4', but the run in out has dataset='text:0.7,ot" in error


@pytest.mark.usefixtures("other")
def test_a_mixture_is_evaluated_set_by_set_and_by_weight(monkeypatch, capsys):
    assert run(train, monkeypatch, *MIXED) == 0
    capsys.readouterr()

    def lines(*flags):
        assert run(evaluate, monkeypatch, *flags) == 0
        found = re.findall(
            r"^(\w+) loss ([\d.]+) nats/token, perplexity [\d.]+, ([\d.]+) bits/byte, "
            r"([\d,]+) tokens(?: of (.*))?$", capsys.readouterr().out, re.M,
        )  # fmt: skip
        return {(name, of): tuple(map(float, figures)) for name, *figures, n, of in found}

    alone = [lines(f"--dataset={name}")["val", ""] for name in ("text", "other")]
    mixed = lines()
    assert list(mixed) == [("val", of) for of in ("text", "other", "text:0.7,other:0.3")]
    assert mixed["val", "text"] == alone[0]
    assert mixed["val", "other"] == alone[1]
    total = np.average(alone, axis=0, weights=(0.7, 0.3))  # a character is a byte here
    assert mixed["val", "text:0.7,other:0.3"] == pytest.approx(total, abs=1e-3)
    by_size = lines("--dataset=text,other", "--split=all")
    assert [of for name, of in by_size if name == "train"] == ["text", "other", "text,other"]
    assert by_size["val", "text,other"] == pytest.approx(np.mean(alone, axis=0), abs=1e-3)


def test_the_report_of_a_run_that_diverged_names_the_file_and_its_tokens(monkeypatch, capsys):
    parts = np.array_split(ids("train"), 3)
    files = {f"web_train_{i}.bin": gpt2_shard(part) for i, part in enumerate(parts)}
    fill("shards", files | {"web_val_0.bin": gpt2_shard(ids("val"))})
    flags = [
        "--learning_rate=1e17", "--warmup_iters=0", "--grad_clip=0", "--dropout=0",
        "--max_skipped=2", "--max_iters=9",
    ]  # fmt: skip
    monkeypatch.setattr("gpt_jax.reporting.bad_numbers.SHOWN", 40)
    assert run(train, monkeypatch, *SHARDS, *flags) == 1
    named = re.findall(
        r"row \d+: tokens (\d+) to (\d+) of data/shards/web_train_(\d).bin", capsys.readouterr().err
    )
    assert len({file for *_, file in named}) > 1
    for first, last, file in named:
        assert int(last) - int(first) == 16
        assert int(last) < len(parts[int(file)])


@pytest.mark.parametrize("dataset", ["text:1,other:2", "text,other"])
@pytest.mark.usefixtures("other")
def test_plan_takes_the_vocabulary_of_a_mixture(dataset, capsys, monkeypatch):
    config = plan.parse([f"--dataset={dataset}", "train_shakespeare_char"], plan.PlanConfig)
    assert plan.prepared(config)
    assert for_dataset(plan.folder_of(config))[1] == for_dataset(Path("data/text"))[1]


def test_a_folder_of_shards_is_a_data_set_whatever_its_name():
    files = {f"web_{split}_0.bin": gpt2_shard(ids(split)) for split in ("train", "val")}
    fill("openwebtext", files)
    prepare_on_first_use("openwebtext", Path("data/openwebtext"))
    fill("pystdlib", files)
    prepare_on_first_use("pystdlib", Path("data/pystdlib"))
    assert not Path("data/pystdlib/train.bin").exists()
    Path("data/openwebtext/web_val_0.bin").unlink()
    with pytest.raises(UserError, match="there is no data set in data/openwebtext"):
        prepare_on_first_use("openwebtext", Path("data/openwebtext"))


@pytest.mark.parametrize(
    ("dataset", "part"),
    [
        ("text:0.7,other:0", "the weight '0' of 'other' is not a number above 0"),
        ("text:1,", "a data set has no name"),
        ("text:1,other:1", "there is no data set in data/other"),
        ("text:1,../text:1", "leaves data_dir"),
    ],
)
@pytest.mark.parametrize("command", [train, evaluate])
def test_a_mixture_that_cannot_be_had_ends_the_command_in_one_line(
    command, dataset, part, monkeypatch, capsys
):
    if command is evaluate:
        assert run(train, monkeypatch, *TINY, "--max_iters=1") == 0
        part = part.replace("there is no data set in data/other", "data/other/val.bin is not there")
    capsys.readouterr()
    flags = [f"--dataset={dataset}"]
    assert run(command, monkeypatch, *(TINY if command is train else []), *flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert part in error
