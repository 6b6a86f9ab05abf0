"""The stream: inputs of every kind, cuts, places to go on from, bad input, hostile input."""

import contextlib
import errno
import gzip
import io
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_prepare import FILES, KILLING, names, python, silent

from gpt_jax.errors import UserError
from gpt_jax.prepare import cuts, files, hub, pipeline, prepare, progress, sources, text
from gpt_jax.prepare.__main__ import main
from gpt_jax.prepare.dataset import for_dataset
from gpt_jax.prepare.files import Unfinished
from gpt_jax.tokenizer import Tokenizer, byte_tokenizer, char_tokenizer, tiktoken_tokenizer

DOCUMENTS = [f"document {i}: naïve €{i * i} 🙂\n\twith\r lines\r\n" for i in range(60)]
PLAIN = [document.replace("\r\n", "\n").replace("\r", "\n") for document in DOCUMENTS]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def made_of(folder):
    """The bytes of both splits, the val split's documents apart."""
    splits = (np.fromfile(folder / f"{split}.bin", "<u2") for split in ("train", "val"))
    return [bytes(ids.tolist()).decode() for ids in splits]


def lines_of(rows, column="text"):
    return "".join(json.dumps({"n": i, column: row}) + "\n" for i, row in enumerate(rows)).encode()


def zst(data):
    pyarrow = pytest.importorskip("pyarrow")
    stream = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(stream, "zstd") as file:
        file.write(data)
    return stream.getvalue().to_pybytes()


def parquet(rows, column="text", **options):
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    stream = io.BytesIO()
    table = pyarrow.table({column: rows, "n": list(range(len(rows)))})
    parquet.write_table(table, stream, **options)
    return stream.getvalue()


KINDS = {  # name, its bytes
    "plain": ("a.jsonl", lambda: lines_of(PLAIN)),
    "json": ("a.json", lambda: lines_of(PLAIN).removesuffix(b"\n")),
    "crlf": ("a.jsonl", lambda: b"\xef\xbb\xbf" + lines_of(PLAIN).replace(b"\n", b"\r\n")),
    "blank lines": ("a.JSONL", lambda: lines_of(PLAIN).replace(b"\n", b"\n\n \n")),
    "gz": ("a.jsonl.gz", lambda: gzip.compress(lines_of(PLAIN))),
    "gz in parts": (
        "a.jsonl.gz",
        lambda: b"".join(gzip.compress(lines_of([row])) for row in PLAIN),
    ),
    "zst": ("a.jsonl.zst", lambda: zst(lines_of(PLAIN))),
    "zst in parts": ("a.jsonl.zst", lambda: b"".join(zst(lines_of([row])) for row in PLAIN)),
    "parquet": ("a.parquet", lambda: parquet(PLAIN, row_group_size=7)),
    "parquet, a dictionary": ("a.parquet", lambda: parquet(pa_dictionary(PLAIN))),
}


def pa_dictionary(rows):
    return pytest.importorskip("pyarrow").array(rows).dictionary_encode()


def expected_rows(share=0.1):
    """A slow reference: each row with its end, to the split that its number's hash says."""
    chosen = [pipeline.is_val(i, share) for i in range(len(PLAIN))]
    return [
        "".join(row + "\0" for row, val in zip(PLAIN, chosen, strict=True) if val == which)
        for which in (False, True)
    ]


# ---- what is read


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_kind_of_file_are_documents(tmp_path, kind):
    name, data = KINDS[kind]
    (tmp_path / name).write_bytes(data())
    prepare("text", tmp_path / "out", input=tmp_path / name, tokenizer="byte", log=silent)
    assert made_of(tmp_path / "out") == expected_rows()


@pytest.mark.parametrize("name", ["a.txt", "a.MD", "a.txt.gz", "a.md.gz", "a.txt.zst"])
@pytest.mark.parametrize("read", [1, 7, sources.READ])
def test_a_text_of_every_kind_is_one_document(tmp_path, monkeypatch, name, read):
    monkeypatch.setattr(sources, "READ", read)  # through characters and line ends
    data = b"\xef\xbb\xbf" + "".join(DOCUMENTS).encode()
    pack = {"gz": gzip.compress, "zst": zst}.get(name.rsplit(".")[-1], bytes)
    (tmp_path / name).write_bytes(pack(data))
    prepare("text", tmp_path / "out", input=tmp_path / name, tokenizer="byte", log=silent)
    whole = "".join(PLAIN)
    at = int(len(whole) * 0.9)
    assert made_of(tmp_path / "out") == [whole[:at], whole[at:]]


def test_inputs_are_files_folders_patterns_and_lists_of_them_each_file_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.txt", "b/c/3.md", "b/1.jsonl", "b/4.json", "b/.5.txt", "b/.d/6.txt",
                 "a,b.txt", "x1.txt", "x2.txt", "b/7.py"):  # fmt: skip
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()

    def found(*inputs):
        return [file.path.as_posix() for file in sources.find(inputs)]

    folder = ["b/1.jsonl", "b/2.txt", "b/c/3.md"]
    assert found("b") == folder
    assert found(Path("b"), "x2.txt", "b/2.txt") == [*folder, "x2.txt"]
    assert found("x2.txt,b,x*.txt") == ["x2.txt", *folder, "x1.txt"]
    assert found("b/4.json") == ["b/4.json"]
    assert found("a,b.txt") == ["a,b.txt"]
    assert found("**/*.md,x[2-9].txt") == ["b/c/3.md", "x2.txt"]
    assert found(str(tmp_path / "x?.txt")) == [f"{tmp_path.as_posix()}/x{i}.txt" for i in (1, 2)]


def test_a_shells_list_of_files_and_repeated_inputs_are_one_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        Path(f"{i}.txt").write_text(f"the text number {i}")
    main(["text", "--tokenizer=byte", "0.txt", "1.txt", "--input=2.txt"])
    assert "".join(made_of(Path("data/text"))) == "".join(
        f"the text number {i}\0" for i in (2, 0, 1)
    )
    assert "reading 3 files (3 .txt)\n" in capsys.readouterr().out
    assert json.loads(Path("data/text/meta.json").read_text())["source"] == "2.txt, 0.txt, 1.txt"


def test_texts_and_rows_together_are_documents(tmp_path):
    (tmp_path / "0.txt").write_text(PLAIN[0])
    (tmp_path / "1.jsonl").write_bytes(lines_of(PLAIN[1:]))
    prepare("text", tmp_path / "out", input=tmp_path, tokenizer="byte", log=silent)
    assert made_of(tmp_path / "out") == expected_rows()


def test_rows_of_nothing_are_left_out_and_not_counted(tmp_path):
    rows = [None, *PLAIN[:30], "", None, *PLAIN[30:], ""]
    (tmp_path / "1.jsonl").write_bytes(lines_of(rows[:20]))
    (tmp_path / "2.parquet").write_bytes(parquet(rows[20:]))
    prepare("text", tmp_path / "out", input=tmp_path, tokenizer="byte", log=silent)
    assert made_of(tmp_path / "out") == expected_rows()


def test_another_column_and_another_share_are_taken_where_told(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines_of(PLAIN, "content"))
    said = []
    prepare("text", tmp_path / "out", input=tmp_path / "a.jsonl", column="content",
            tokenizer="byte", val_share=0.4, log=said.append)  # fmt: skip
    assert made_of(tmp_path / "out") == expected_rows(0.4)
    size = sum(len(row.encode()) for row in PLAIN)
    assert (
        f"60 documents, {size:,} bytes of text, {size / (size + 60):.2f} bytes/token, "
        in "".join(said)
    )


def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d b \\ud83d\\ude00"}\n' * 20)
    prepare("text", tmp_path / "out", input=tmp_path / "a.jsonl", tokenizer="char", log=silent,
            val_share=0.5)  # fmt: skip
    assert for_dataset(tmp_path / "out")[0].to_json()["symbols"] == " ab\ufffd😀"


def test_openwebtexts_documents_for_validation_do_not_change(tmp_path):
    chosen = [i for i in range(200_000) if pipeline.is_val(i, text.HUB_SHARE)]
    assert len(chosen) == pytest.approx(100, abs=30)
    assert chosen[:3] == [1355, 2623, 3968]  # as in the first release


# ---- cuts


LLAMA_3, QWEN = cuts.PATTERNS
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k_base": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k_base": "|".join(
        [
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    ),
    "llama_3": LLAMA_3,
    "qwen": QWEN,
}
SIGNS = "aA1'./s \n\n\r\t\u3000\x1c\u0301é"


def telltale(pattern):
    """An encoding by this pattern in which any two neighbours in a word become one id."""
    import tiktoken

    singles = [bytes([i]) for i in range(256)]
    used = sorted({bytes([b]) for sign in SIGNS for b in sign.encode()})
    pairs = [a + b for a in used for b in used]
    ranks = {token: i for i, token in enumerate([*singles, *pairs])}
    return tiktoken.Encoding(
        "telltale", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 60000}
    )


class Given:
    """A source of one document, in fragments of some size."""

    name, size = "given", 1

    def __init__(self, text, fragment=4):
        self.text, self.fragment = text, fragment

    def stamp(self):
        return self.text

    def fragments(self, at=None):
        for start in range(0, len(self.text), self.fragment):
            yield sources.Fragment(self.text[start : start + self.fragment], False, 1, 0.0)
        yield sources.Fragment("", True, 1, 1.0)


ENCODINGS = {name: telltale(pattern) for name, pattern in PATTERNS.items()}


@pytest.mark.parametrize("name", PATTERNS)
@settings(derandomize=True, deadline=None, database=None, max_examples=400)
@example(text="a.\n/a.\n/a", size=1, fragment=9)  # o200k: a slash after a line end is of its word
@given(
    text=st.text(alphabet=SIGNS, max_size=30), size=st.integers(1, 5), fragment=st.integers(1, 9)
)
def test_a_text_in_parts_has_the_ids_of_the_whole(name, text, size, fragment):
    encode = ENCODINGS[name].encode_ordinary
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "BLOCK", size)
        found = list(pipeline.parts(Given(text, fragment), None, 0, cuts.WORD))
        assert "".join(part for part, *_ in found) == text
        assert [ends for _, ends, *_ in found] == [False] * (len(found) - 1) + [True]
        assert [i for part, *_ in found for i in encode(part)] == encode(text)
        for i, (_, ends, at, given, _) in enumerate(found):  # and so from any of them on
            if not ends:
                rest = list(pipeline.parts(Given(text, fragment), at, given, cuts.WORD))
                assert "".join(part for part, *_ in rest) == "".join(p for p, *_ in found[i + 1 :])


@pytest.mark.parametrize(("line", "parts"), [("a line\n", 10), ("words ", 11), ("行末。\n", 9)])
def test_a_text_of_lines_or_words_has_many_places_to_cut(monkeypatch, line, parts):
    monkeypatch.setattr(pipeline, "BLOCK", 70)
    whole = line * (700 // len(line))
    found = list(pipeline.parts(Given(whole), None, 0, cuts.WORD))
    assert len(found) == pytest.approx(parts, abs=1)


def test_text_with_no_place_to_cut_is_refused_at_a_bound_unless_bytes_or_characters_are_ids(
    monkeypatch,
):
    monkeypatch.setattr(pipeline, "BLOCK", 10)
    monkeypatch.setattr(pipeline, "LONGEST", 100)
    with pytest.raises(UserError, match=r"given has 104 characters with no place to cut: .*byte"):
        list(pipeline.parts(Given("x" * 1000), None, 0, cuts.WORD))
    monkeypatch.setattr(pipeline, "WHOLE", 50)
    with pytest.raises(UserError, match="given has 52 characters with no place to cut"):
        list(pipeline.parts(Given("x " * 500), None, 0, None))
    assert len(list(pipeline.parts(Given("x" * 1000), None, 0, cuts.ANYWHERE))) == 100


def huggingface(**parts):
    data = {"pre_tokenizer": None, "normalizer": None, "added_tokens": [], **parts}
    spec = {"kind": "huggingface", "json": json.dumps(data), "end_of_text": None}
    return Tokenizer(spec, 300, None, lambda text, _: list(text.encode()), lambda i: b"")


def split(pattern, **more):
    first = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", **more}
    return {"type": "Sequence", "pretokenizers": [first, {"type": "ByteLevel"}]}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


@pytest.mark.parametrize(
    ("tokenizer", "wanted"),
    [
        (byte_tokenizer(), cuts.ANYWHERE),
        (char_tokenizer("ab"), cuts.ANYWHERE),
        (tiktoken_tokenizer("gpt2"), cuts.WORD),
        (huggingface(pre_tokenizer=BYTES), cuts.WORD),
        (huggingface(pre_tokenizer=BYTES, normalizer={"type": "NFC"}), cuts.WORD),
        (huggingface(pre_tokenizer=BYTES, added_tokens=[{"special": True}]), cuts.WORD),
        (huggingface(pre_tokenizer=split(LLAMA_3)), cuts.WORD),
        (huggingface(pre_tokenizer=split(QWEN, invert=False)), cuts.WORD),
        (huggingface(pre_tokenizer={**BYTES, "add_prefix_space": True}), None),
        (huggingface(pre_tokenizer={**BYTES, "use_regex": False}), None),
        (huggingface(pre_tokenizer=BYTES, added_tokens=[{"special": False}]), None),
        (huggingface(pre_tokenizer=BYTES, normalizer={"type": "Replace"}), None),
        (huggingface(pre_tokenizer=split(".* .*")), None),
        (huggingface(pre_tokenizer=split(QWEN, invert=True)), None),
        (huggingface(), None),
    ],
)
def test_only_a_tokenizer_that_is_known_to_split_words_is_given_parts(tokenizer, wanted):
    assert cuts.cuts_of(tokenizer) is wanted


def test_ids_as_arrays_are_those_of_encode_ordinary(gpt2):
    whole = "".join(PLAIN) + "<|endoftext|>"
    for tokenizer in (byte_tokenizer(), char_tokenizer(sorted(set(whole))), gpt2, huggingface()):
        array = pipeline.arrays_of(tokenizer)
        assert array(whole).tolist() == tokenizer.encode_ordinary(whole)
        assert array("").tolist() == []
    with pytest.raises(UserError, match=r"'b'.* at position 2 is not among"):
        pipeline.arrays_of(char_tokenizer("ac"))("acb")


# ---- the same files however it goes


def several(folder):
    """Inputs of all kinds, long documents among them."""
    folder.mkdir()
    long = "".join(PLAIN)
    (folder / "1.txt").write_text(long, "utf-8")
    for n in range(5):  # blocks end where one of these does
        (folder / f"1{n}.txt").write_text(f"{n}" * 60)
    (folder / "2.jsonl").write_bytes(lines_of([*PLAIN[:5], long, "", *PLAIN[5:]]))
    (folder / "3.txt.gz").write_bytes(gzip.compress(long.encode()))
    (folder / "4.jsonl.gz").write_bytes(gzip.compress(lines_of(PLAIN)))
    try:
        (folder / "5.parquet").write_bytes(parquet([*PLAIN, long], row_group_size=9))
        (folder / "6.txt.zst").write_bytes(zst(long.encode()))
    except pytest.skip.Exception:
        pass
    return folder


@pytest.fixture
def small(monkeypatch):
    """Blocks and reads so small that a short text has many; no waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(pipeline, "BLOCK", 100)
    monkeypatch.setattr(sources, "READ", 64)
    monkeypatch.setattr(files, "SAVE_SECONDS", 0)


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_the_files_are_the_same_whatever_the_number_of_workers(
    tmp_path, monkeypatch, small, workers
):
    inputs = several(tmp_path / "in")
    prepare("text", tmp_path / "out", input=inputs, tokenizer="char", workers=workers, log=silent)
    monkeypatch.undo()
    prepare("text", tmp_path / "all", input=inputs, tokenizer="char", log=silent)
    assert contents(tmp_path / "out") == contents(tmp_path / "all")


def stream_of(inputs, called="in", tokenizer="byte"):
    found = text.sources_of([inputs], None, None, None)
    return text.stream(found, called, tokenizer, None, 2, silent)


def joined(pieces):
    ids = {"train": b"", "val": b""}
    for which, array, _ in pieces:
        ids[which] += array.tobytes()
    return ids


@pytest.mark.parametrize("inputs", ["", "1.txt", "3.txt.gz"])
def test_from_every_place_on_the_rest_is_the_same(tmp_path, small, inputs):
    folder = several(tmp_path / "in")
    pieces = list(stream_of(folder / inputs).begin(None))
    places = [i for i, (*_, place) in enumerate(pieces) if place is not None]
    assert len(places) > 20
    for i in places:
        place = json.loads(json.dumps(pieces[i][2]))
        rest = joined(stream_of(folder / inputs).begin(place))
        assert rest == joined(pieces[i + 1 :])


RUN = (
    KILLING
    + """
from gpt_jax.prepare import files, pipeline, prepare, sources

pipeline.BLOCK, sources.READ, files.SAVE_SECONDS = 300, 64, 0
os.fsync = lambda descriptor: None  # SIGKILL leaves the kernel what it was given

def run(log=print):
    prepare("text", Path(sys.argv[2]), input=sys.argv[1], tokenizer="byte", workers=2, log=log)
"""
)
EVERYWHERE = """
import shutil
for module, name in ((os, "fsync"), (os, "replace"), (Path, "unlink"), (shutil, "rmtree")):
    killed_around(module, name)
folder = Path(sys.argv[2])

def state():
    return {path.name: path.read_bytes() for path in folder.iterdir()}

run()
whole, gone_on, kills = state(), 0, 0
for point in range(1, 100_000, 23):
    at = 0
    shutil.rmtree(folder)
    child = os.fork()
    if not child:
        at, rank = point, 0
        run(lambda line: None)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        break
    kills += 1
    said = []
    run(said.append)
    assert state() == whole, (point, sorted(state()))
    gone_on += any("going on after" in line for line in said)
print(kills, gone_on)
"""


def test_killed_anywhere_and_run_again_the_files_are_the_same(tmp_path):
    """By SIGKILL, around flushes, renames and removals; almost always what was done is kept."""
    inputs = several(tmp_path / "in")
    done = python(RUN + EVERYWHERE, inputs, tmp_path / "out", 0)
    assert done.returncode == 0, done.stderr
    kills, gone_on = map(int, done.stdout.split()[-2:])
    assert kills > (15 if (inputs / "5.parquet").exists() else 10)
    assert gone_on > 0.7 * kills


def interrupt(monkeypatch, blocks, error=KeyboardInterrupt):
    """Raise an error in the reader after some blocks."""
    whole = pipeline.blocks

    def some(*arguments):
        for i, block in enumerate(whole(*arguments)):
            if i == blocks:
                raise error
            yield block

    monkeypatch.setattr(text, "blocks", some)


def test_interrupted_and_run_again_it_goes_on_unless_the_text_has_changed(
    tmp_path, monkeypatch, small
):
    inputs, said = several(tmp_path / "in"), []

    def run(folder="out"):
        said.clear()
        prepare("text", tmp_path / folder, input=inputs, tokenizer="byte", log=said.append)

    with monkeypatch.context() as patch:
        interrupt(patch, 40)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert f"{tmp_path / 'out'}: the same command goes on with what is done" in said
    (left,) = names(tmp_path / "out")
    assert left.startswith(".preparing-")
    with monkeypatch.context() as patch:
        interrupt(patch, 40)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert [line for line in said if line.startswith("going on after ")]
    run()
    assert [line for line in said if line.startswith("going on after ")]
    first = contents(tmp_path / "out")
    run("all")
    assert (contents(tmp_path / "all"), names(tmp_path / "out")) == (first, FILES)
    with monkeypatch.context() as patch:
        interrupt(patch, 40)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert contents(tmp_path / "out") == first  # the older set is as it was
    (inputs / "4.jsonl.gz").write_bytes(gzip.compress(lines_of(PLAIN[::-1])))
    run()
    assert not [line for line in said if line.startswith("going on after ")]
    assert names(tmp_path / "out") == FILES
    run("new")
    assert contents(tmp_path / "out") == contents(tmp_path / "new") != first


@pytest.mark.parametrize("damage", ["cut", "no json", "gone"])
def test_what_is_left_and_damaged_is_not_gone_on_with(tmp_path, monkeypatch, small, damage):
    inputs, said = several(tmp_path / "in"), []
    with monkeypatch.context() as patch:
        interrupt(patch, 40)
        with pytest.raises(KeyboardInterrupt):
            prepare("text", tmp_path / "out", input=inputs, tokenizer="byte", log=silent)
    (left,) = (tmp_path / "out").iterdir()
    if damage == "cut":
        os.truncate(left / "train.bin", 10)
    elif damage == "gone":
        (left / "val.bin").unlink()
    else:
        (left / "state.json").write_text("{")
    prepare("text", tmp_path / "out", input=inputs, tokenizer="byte", log=said.append)
    assert not [line for line in said if "going on" in line]
    prepare("text", tmp_path / "all", input=inputs, tokenizer="byte", log=silent)
    assert contents(tmp_path / "out") == contents(tmp_path / "all")
    assert names(tmp_path / "out") == FILES


def test_a_full_disk_is_one_line_and_with_room_again_it_goes_on(tmp_path, monkeypatch, small):
    inputs, said, fsync, count = several(tmp_path / "in"), [], os.fsync, 0

    def full(descriptor):
        nonlocal count
        count += 1
        if count == 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            UserError, match=r"cannot write in .*No space left on device; make room"
        ):
            prepare("text", tmp_path / "out", input=inputs, tokenizer="byte", log=silent)
    prepare("text", tmp_path / "out", input=inputs, tokenizer="byte", log=said.append)
    assert [line for line in said if "going on after" in line]
    prepare("text", tmp_path / "all", input=inputs, tokenizer="byte", log=silent)
    assert contents(tmp_path / "out") == contents(tmp_path / "all")


def test_text_that_cannot_be_used_leaves_nothing_even_after_a_place_was_saved(tmp_path, small):
    (tmp_path / "a.jsonl").write_bytes(lines_of(PLAIN) + b"{oops\n")
    with pytest.raises(UserError, match=r"a\.jsonl line 61 is not JSON"):
        prepare("text", tmp_path / "out", input=tmp_path / "a.jsonl", tokenizer="byte", log=silent)
    assert names(tmp_path / "out") == []


def test_without_locks_nothing_is_gone_on_with(tmp_path, monkeypatch, small):
    """Two at work would take each other's files."""
    monkeypatch.setattr(files, "fcntl", None)
    inputs, said = several(tmp_path / "in"), []
    with monkeypatch.context() as patch:
        interrupt(patch, 40)
        with pytest.raises(KeyboardInterrupt):
            prepare("text", tmp_path / "out", input=inputs, tokenizer="byte", log=said.append)
    assert names(tmp_path / "out") == []
    assert not [line for line in said if "goes on" in line]


def test_a_set_of_another_text_or_tokenizer_is_not_replaced(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"the text of {name}\n" * 9)

    def run(name, tokenizer="byte"):
        prepare("text", tmp_path / "out", input=tmp_path / f"{name}.txt", tokenizer=tokenizer,
                log=silent)  # fmt: skip

    run("a")
    before = contents(tmp_path / "out")
    for arguments in (("b",), ("a", "char")):
        with pytest.raises(
            UserError, match=r"out has a data set of .*a\.txt, byte tokenizer: give"
        ):
            run(*arguments)
        assert contents(tmp_path / "out") == before
    run("a")  # the same again
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / "meta.json").unlink()
    with pytest.raises(UserError, match="out has a data set that another program made: give"):
        run("a")


def test_a_small_set_under_another_name_replaces_no_other_set(tmp_path):
    (tmp_path / "a.txt").write_text("the text of a\n" * 9)
    out = tmp_path / "mine"

    def small():
        prepare("shakespeare_char", out, input=tmp_path / "a.txt", log=silent)

    prepare("text", out, input=tmp_path / "a.txt", tokenizer="byte", log=silent)
    before = contents(out)
    with pytest.raises(UserError, match=r"mine has a data set of .*a\.txt, byte tokenizer: give"):
        small()
    assert contents(out) == before
    for path in out.iterdir():
        path.unlink()
    small()
    small()  # the same again


# ---- bad and hostile input


BAD = {
    "half a character": ("a.txt", lambda: b"abc \xc3", r"a\.txt is not UTF-8 at byte 4 \(0xC3\)"),
    "far on": (
        "a.txt", lambda: b"a" * 3_000_000 + "é".encode() + b"\xe9", "not UTF-8 at byte 3000002 ",
    ),
    "gz cut": ("a.txt.gz", lambda: gzip.compress(b"abc" * 99)[:-9], r"cannot read .*\.gz: Com"),
    "gz damaged": (
        "a.txt.gz",
        lambda: gzip.compress(b"abc" * 99)[:-8] + b"\0" * 8,
        r"cannot read .*a\.txt\.gz: CRC check failed",
    ),
    "gz none": ("a.txt.gz", lambda: b"hello", "Not a gzipped file"),
    "zst cut": ("a.txt.zst", lambda: zst(b"abc" * 999)[:-5], "cannot read .*Truncated"),
    "zst none": ("a.txt.zst", lambda: b"hello hello", "cannot read .*ZSTD decompress failed"),
    "no JSON": ("a.jsonl", lambda: lines_of(PLAIN) + b"{a", r"a\.jsonl line 61 is not JSON \("),
    "latin 1": ("a.jsonl", lambda: b'{"text": "\xe9"}', "line 1 is not UTF-8 at its byte 10 "),
    "a list": ("a.json", lambda: b"[1]", "line 1 is no JSON object"),
    "a number": ("a.jsonl", lambda: b'{"text": 3}', "line 1: its 'text' is int, not text"),
    "deep": ("a.jsonl", lambda: b"[" * 1_000_000, "line 1 is not JSON"),
    "digits": ("a.jsonl", lambda: b"9" * 5000, "line 1 is not JSON"),
    "no column": ("a.jsonl", lambda: lines_of(PLAIN, "content"), "'text': --column= one of n, con"),
    "only nothing": ("a.jsonl", lambda: lines_of([None] * 9), "train split 0 tokens, and at least"),
    "parquet cut": ("a.parquet", lambda: parquet(PLAIN)[:-30], r"cannot read .*\.parquet: Parq"),
    "parquet damaged": (
        "a.parquet", lambda: b"PAR1" + b"\xff" * 60 + parquet(PLAIN)[64:], "cannot read ",
    ),
    "parquet column": (
        "a.parquet", lambda: parquet(PLAIN, "content"), "'text': --column= one of content, n",
    ),
    "parquet numbers": ("a.parquet", lambda: parquet([1, 2]), "its 'text' is int64, not text"),
    "no kind": ("a.pdf", lambda: b"hello", r"a\.pdf is none of \.txt, \.md"),
    "packed parquet": ("a.parquet.gz", lambda: b"hello", r"a\.parquet\.gz is none of"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_input_that_cannot_be_used_is_one_line_and_leaves_nothing(tmp_path, case):
    name, data, message = BAD[case]
    (tmp_path / name).write_bytes(data())
    with pytest.raises(UserError, match=message) as error:
        prepare("text", tmp_path / "out", input=tmp_path / name, tokenizer="byte", log=silent)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    assert names(tmp_path / "out") == []


def test_a_pipe_and_a_file_that_may_not_be_read_are_one_line(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(UserError, match="is no regular file"):
        prepare("text", tmp_path / "out", input=tmp_path / "a.txt", log=silent)
    (tmp_path / "b.txt").write_text("x")
    (tmp_path / "b.txt").chmod(0)
    if not os.access(tmp_path / "b.txt", os.R_OK):  # not so for root
        with pytest.raises(UserError, match=r"cannot read .*Permission denied"):
            prepare("text", tmp_path / "out", input=tmp_path / "b.txt", log=silent)


BOMB = """
import sys
from gpt_jax.prepare.__main__ import main
from gpt_jax.errors import UserError
import resource
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    main(sys.argv[1:])
except UserError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.zst"])
def test_a_small_file_that_unpacks_to_a_gigabyte_stays_in_bounded_memory(tmp_path, gpt2, name):
    """A text with no place to cut, and a line with no end, are refused at their bounds."""
    pack = zst if name.endswith("zst") else lambda data: gzip.compress(data, 1)
    (tmp_path / name).write_bytes(b"".join([pack(b"x" * 2**24)] * 64))
    done = python(BOMB, "text", f"--input={tmp_path / name}", f"--data_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    message, grown = done.stdout.splitlines()[-2:]
    bound = (
        "with no place to cut" if name == "a.txt.gz" else "line 1 is longer than 67,108,864 bytes"
    )
    assert bound in message
    assert int(grown) < 500_000  # kB; 1,048,576 are in the file
    assert names(tmp_path / "text") == []


# ---- data sets of the hub


class Rows:
    """What datasets.load_dataset returns for streaming, as far as it is used."""

    def __init__(self, texts, breaks_at=None, column="text"):
        self.texts, self.breaks_at, self.column = texts, breaks_at, column
        self.at, self.passed_over = 0, 0

    def __iter__(self):
        for i in range(self.at, len(self.texts)):
            if i == self.breaks_at:
                raise ConnectionError("reset\nby peer")
            self.at = i + 1
            yield {"id": i, self.column: self.texts[i]}

    def state_dict(self):
        return {"rows": self.at}

    def load_state_dict(self, state):
        self.at = self.passed_over = state["rows"]


@pytest.fixture
def fake_datasets(monkeypatch):
    """Let datasets.load_dataset return the rows that a function makes; it notes the arguments."""
    asked = []

    def install(make):
        def load_dataset(*arguments, **named):
            asked.append((*arguments, named.pop("split")))
            assert named == {"streaming": True}
            return make()

        module = types.ModuleType("datasets")
        module.load_dataset = load_dataset
        monkeypatch.setitem(sys.modules, "datasets", module)
        return asked

    return install


def test_openwebtext_ends_each_document_and_splits_by_number(
    tmp_path, monkeypatch, gpt2, fake_datasets
):
    monkeypatch.setattr(pipeline, "is_val", lambda number, share: number % 1000 == 7)
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    monkeypatch.setattr(pipeline, "BLOCK", 1000)
    texts = [f"document {i}<|endoftext|>" for i in range(2100)]
    asked, said = fake_datasets(lambda: Rows(texts)), []
    prepare("openwebtext", tmp_path, log=said.append)
    assert asked == [("Skylion007/openwebtext", "train")]
    for split, wanted in (("train", False), ("val", True)):
        ids = np.fromfile(tmp_path / f"{split}.bin", "<u2").tolist()
        documents = [text for i, text in enumerate(texts) if (i % 1000 == 7) == wanted]
        assert ids[-1] == 50256
        assert gpt2.decode(ids) == "".join(text + "<|endoftext|>" for text in documents)
        assert ids.count(50256) == len(documents)
    assert any(" documents, " in line and "tokens/s, " in line and " left" in line for line in said)
    assert any("2,100 documents came, and the whole set has 8,013,769" in line for line in said)
    assert for_dataset(tmp_path)[1] == 50304


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["fineweb_edu"], ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train")),
        (["text", "--input=hf:a/b"], ("a/b", "train")),
        (["text", "hf:a/b", "--config=c", "--split=test"], ("a/b", "c", "test")),
    ],
)
def test_a_data_set_of_the_hub_is_asked_for_by_name(
    tmp_path, monkeypatch, fake_datasets, arguments, asked
):
    monkeypatch.chdir(tmp_path)
    found = fake_datasets(lambda: Rows(PLAIN))
    main([*arguments, "--tokenizer=byte", "--val_share=0.1"])
    assert found == [asked]
    assert made_of(tmp_path / "data" / arguments[0]) == expected_rows()


@pytest.mark.parametrize("every", [1, 7, 1000])
def test_a_stream_that_breaks_is_one_line_and_the_next_run_goes_on(
    tmp_path, monkeypatch, small, fake_datasets, every
):
    monkeypatch.setattr(hub, "STATE_EVERY", every)
    made = [Rows(PLAIN, breaks_at=20), Rows(PLAIN, breaks_at=50), Rows(PLAIN)]
    rows = iter(made)
    fake_datasets(lambda: next(rows))

    def run(said):
        prepare("text", tmp_path / "out", input="hf:a/b", tokenizer="byte", val_share=0.1,
                log=said.append)  # fmt: skip

    for i in (20, 50):
        with pytest.raises(Unfinished, match=f"a/b stopped after {i} documents .*reset.*run again"):
            run([])
    said = []
    run(said)
    assert [line for line in said if line.startswith("going on after ")]
    assert made_of(tmp_path / "out") == expected_rows()
    assert names(tmp_path / "out") == FILES
    assert made[2].passed_over >= (0 if every == 1000 else 35)


def test_a_short_stream_that_breaks_leaves_nothing(tmp_path, fake_datasets):
    fake_datasets(lambda: Rows(PLAIN, breaks_at=2))
    with pytest.raises(UserError, match=r"stopped after 2 documents .*reset.*run again") as error:
        prepare("openwebtext", tmp_path, tokenizer="byte", log=silent)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == []


def test_a_data_set_that_cannot_be_loaded_or_has_no_such_column_is_one_line(
    tmp_path, fake_datasets
):
    def refuse():
        raise RuntimeError("Dataset scripts are no longer supported\nand more")

    fake_datasets(refuse)
    with pytest.raises(UserError, match=r"cannot load a/b .*no longer supported") as error:
        prepare("text", tmp_path, input="hf:a/b", tokenizer="byte", log=silent)
    assert "\n" not in str(error.value)
    fake_datasets(lambda: Rows(PLAIN, column="content"))
    with pytest.raises(UserError, match="a/b row 1 has no column 'text': --column= one of id, con"):
        prepare("text", tmp_path, input="hf:a/b", tokenizer="byte", log=silent)
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["openwebtext", "fineweb_edu"])
def test_the_hub_without_its_package_says_what_to_install(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'gpt_jax\[data\]'"):
        prepare(name, tmp_path / "set", log=silent)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.zst"])
def test_files_that_need_pyarrow_say_what_to_install(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"needs pyarrow: pip install 'gpt_jax\[data\]'"):
        prepare("text", tmp_path / "set", input=tmp_path / name, tokenizer="byte", log=silent)
    assert names(tmp_path / "set") == []


def test_a_data_set_in_a_folder_goes_through_the_real_package(tmp_path, monkeypatch, small):
    """It looks like one of the hub, and is interrupted and gone on with."""
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "STATE_EVERY", 7)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.jsonl").write_bytes(lines_of(PLAIN[:30]))
    (tmp_path / "b" / "2.jsonl").write_bytes(lines_of(PLAIN[30:]))
    said = []
    for blocks in (12, 10, 10**6):
        with monkeypatch.context() as patch:
            interrupt(patch, blocks, Unfinished("stopped"))
            with contextlib.suppress(Unfinished):
                prepare("text", Path("out"), input="hf:./b", tokenizer="byte", val_share=0.1,
                        log=said.append)  # fmt: skip
    assert sum("going on after" in line for line in said) == 2
    assert made_of(Path("out")) == expected_rows()


# ---- what is said on the way


def test_a_person_sees_one_line_rewritten_and_a_log_gets_lines(
    tmp_path, monkeypatch, capsys, small
):
    monkeypatch.setattr(progress, "LIVE_SECONDS", 0)
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    inputs, said = several(tmp_path / "in"), []
    prepare("text", tmp_path / "a", input=inputs, tokenizer="byte", live=True, log=said.append)
    out = capsys.readouterr().out
    assert "\n" not in out
    assert out.endswith("\r\x1b[K")
    assert out.count("\r") > 10
    assert not any("tokens/s" in line for line in said)
    prepare("text", tmp_path / "b", input=inputs, tokenizer="byte", log=said.append)
    assert sum("tokens/s" in line for line in said) > 10
    assert capsys.readouterr().out == ""


def test_a_pass_over_the_text_tells_how_far_it_is_and_clears_its_line(
    tmp_path, monkeypatch, capsys, small
):
    monkeypatch.setattr(progress, "LIVE_SECONDS", 0)
    (tmp_path / "a.txt").write_bytes(b"abc " * 100 + b"\xff")
    with pytest.raises(UserError, match="not UTF-8 at byte 400"):
        prepare("text", tmp_path / "a", input=tmp_path / "a.txt", tokenizer="byte", live=True)
    out = capsys.readouterr().out
    assert out.startswith("\rcounting characters: ")
    assert out.endswith("\r\x1b[K")


def test_the_line_of_progress_tells_share_rate_and_what_is_left():
    said = []
    bar = progress.Progress(said.append)
    bar.said = bar.begun = bar.begun - 100.0
    bar.took(10, 2_000_000, 1_000_000, 0.0)
    bar.said = bar.begun
    bar.took(20, 2_000_000, 1_000_000, 0.25)
    assert said[0].startswith("0.0%, 10 documents, 2.0 MB, ")
    assert said[1].startswith("25.0%, 20 documents, 4.0 MB, 19,9") or "20,000 tokens/s" in said[1]
    assert said[1].endswith(", 0:05:00 left")
