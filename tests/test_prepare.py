import contextlib
import errno
import hashlib
import http.server
import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from gpt_jax.errors import UserError
from gpt_jax.prepare import (
    SETS,
    SMALL,
    download,
    files,
    prepare,
    prepare_on_first_use,
    pystdlib,
    shakespeare,
)
from gpt_jax.prepare.__main__ import main
from gpt_jax.prepare.dataset import for_dataset
from gpt_jax.tokenizer import byte_tokenizer

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
FILES = ["meta.json", "train.bin", "val.bin"]


def silent(_):
    pass


def ids_of(folder, split):
    return np.fromfile(folder / f"{split}.bin", "<u2").tolist()


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture(scope="module")
def tinyshakespeare():
    path = SHARED / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip("tiny Shakespeare is absent: put it in ../shared/data/tinyshakespeare.txt")
    return path


@pytest.fixture
def no_gpt2(monkeypatch):
    import tiktoken

    def offline(name):
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)


# ---- files: all of them or none


def corpus_of(pieces):
    return files.Corpus("a test", byte_tokenizer(), pieces)


def interrupted():
    yield "train", [1, 2, 3]
    yield "val", [4, 5]
    raise KeyboardInterrupt


def test_an_interrupted_run_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        files.write(tmp_path / "set", corpus_of(interrupted()), silent)
    assert names(tmp_path / "set") == []


def test_an_interrupted_run_leaves_an_older_set_as_it_was(tmp_path):
    files.write(tmp_path, corpus_of([("train", [1, 2]), ("val", [3, 4])]), silent)
    before = {name: sha256(tmp_path / name) for name in names(tmp_path)}
    with pytest.raises(KeyboardInterrupt):
        files.write(tmp_path, corpus_of(interrupted()), silent)
    assert {name: sha256(tmp_path / name) for name in names(tmp_path)} == before
    assert sorted(before) == FILES


KILLING = """
import os, signal, sys
from pathlib import Path

at, rank = int(sys.argv[-1]), 0  # of all events the one that kills; 0: none

def event():
    global rank
    rank += 1
    if rank == at:
        os.kill(os.getpid(), signal.SIGKILL)

def killed_around(module, name):
    function = getattr(module, name)
    def around(*arguments, **named):
        event()
        result = function(*arguments, **named)
        event()
        return result
    setattr(module, name, around)
"""
KILLED = (
    KILLING
    + """
import json
from gpt_jax.prepare import files
from gpt_jax.tokenizer import byte_tokenizer

for module, name in ((os, "fsync"), (os, "replace"), (os, "rmdir"), (Path, "unlink")):
    killed_around(module, name)

def pieces():
    for split in ("train", "val", "train", "val"):
        event()
        yield split, [len(sys.argv[2]) + i for i in range(5000)]  # more than a buffer

def run():
    corpus = files.Corpus(sys.argv[2], byte_tokenizer(), pieces())
    files.write(Path(sys.argv[1]), corpus, lambda line: None)
"""
)
EVERY_POINT = """
import shutil
folder, seen = Path(sys.argv[1]), []
source = sys.argv[2]

def state():
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

def whole(source):
    shutil.rmtree(folder, ignore_errors=True)
    sys.argv[2] = source
    run()
    return state()

new, old = whole(source), whole("an older text")
for older in (False, True):
    for point in range(1, 1000):
        if older:
            whole("an older text")
        else:
            shutil.rmtree(folder)
        sys.argv[2] = source
        child = os.fork()
        if not child:
            at, rank = point, 0
            run()
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        after = state() if folder.exists() else {}
        run()
        left = sorted(path.name for path in folder.iterdir())
        kinds = {name: "old" if data == old[name] else "new" if data == new[name] else "bad"
                 for name, data in after.items()}
        seen.append([older, status, kinds, left, state() == new])
        if status == 0:
            break
print(json.dumps(seen))
"""


def python(program, *arguments):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_run_killed_anywhere_leaves_the_old_set_or_the_new_or_none_and_a_rerun_clears_up(
    tmp_path,
):
    """Around each piece, flush, removal and rename, by SIGKILL, over no set and over an older one.

    The rerun comes at once and leaves nothing but its own files.
    """
    done = python(KILLED + EVERY_POINT, tmp_path / "set", "a newer text", 0)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    for older in (False, True):
        runs = [run for run in seen if run[0] == older]
        assert [status for _, status, *_ in runs] == [-9] * (len(runs) - 1) + [0]
        assert len(runs) > 20
        outcomes = set()
        for _, _, kinds, left, renewed in runs:
            assert (left, renewed) == (FILES, True)
            if "val.bin" in kinds:  # it is a data set
                assert sorted(kinds) == FILES
                assert len(set(kinds.values())) == 1
            elif "train.bin" in kinds:
                assert kinds["train.bin"] == kinds["meta.json"]
            assert "bad" not in kinds.values()
            outcomes.add(kinds.get("val.bin"))
        assert outcomes == {None, "new", *(["old"] if older else [])}


@pytest.mark.parametrize("at", [2, 4])
def test_a_process_killed_while_it_writes_leaves_a_folder_that_the_next_one_clears(tmp_path, at):
    killed = python(KILLED + "run()", tmp_path, "a text", at)
    assert killed.returncode == -9, killed.stderr
    (left,) = names(tmp_path)
    assert left.startswith(".preparing-")
    files.write(tmp_path, corpus_of([("train", [1, 2]), ("val", [3, 4])]), silent)
    assert names(tmp_path) == FILES


def test_two_processes_do_not_prepare_one_folder_at_a_time(tmp_path):
    """The second leaves the first its files, and can be run when that has ended."""

    def say(line):
        assert "waiting" not in line

    def pieces():
        yield "train", [1, 2]
        with pytest.raises(UserError, match="is being prepared by another process: wait") as error:
            files.write(tmp_path, corpus_of([("train", [5, 6]), ("val", [7, 8])]), say)
        assert str(error.value).startswith(str(tmp_path))
        yield "val", [3, 4]

    files.write(tmp_path, corpus_of(pieces()), silent)
    assert (ids_of(tmp_path, "train"), ids_of(tmp_path, "val")) == ([1, 2], [3, 4])
    files.write(tmp_path, corpus_of([("train", [5, 6]), ("val", [7, 8])]), silent)
    assert (names(tmp_path), ids_of(tmp_path, "val")) == (FILES, [7, 8])


@pytest.fixture
def a_short_library(tmp_path_factory, monkeypatch):
    root, of = tmp_path_factory.mktemp("library"), pystdlib.corpus
    a_library(root)
    monkeypatch.setattr(pystdlib, "corpus", lambda: of(root))


@pytest.mark.usefixtures("a_short_library")
def test_two_first_uses_make_the_set_once_and_both_have_it(tmp_path):
    """Made twice, the first one's files would be exchanged under it while it trains."""
    waiting, made = threading.Event(), []

    def say(line):
        if "waiting for another process" in line:
            waiting.set()

    def second():
        try:
            prepare_on_first_use("pystdlib", tmp_path, say)
        finally:
            waiting.set()
        made.append((tmp_path / "val.bin").stat().st_ino)

    def pieces():
        yield "train", [1, 2]
        thread.start()
        assert waiting.wait(60)
        yield "val", [3, 4]

    thread = threading.Thread(target=second)
    files.write(tmp_path, corpus_of(pieces()), silent)
    thread.join(60)
    assert made == [(tmp_path / "val.bin").stat().st_ino]
    assert ids_of(tmp_path, "val") == [3, 4]


@pytest.mark.parametrize("locks", ["refused", "absent"])
def test_without_locks_what_a_killed_run_left_goes_once_it_is_stale(tmp_path, monkeypatch, locks):
    def refuse(*_):
        raise OSError(errno.EBADF, "Bad file descriptor")  # as NFS does, of a folder

    if locks == "absent":
        monkeypatch.setattr(files, "fcntl", None)
    else:
        monkeypatch.setattr(files.fcntl, "flock", refuse)
    for name in ("old", "new"):
        (tmp_path / f".preparing-{name}").mkdir()
        (tmp_path / f".preparing-{name}" / "train.bin").write_bytes(b"half")
    for path in (tmp_path / ".preparing-old" / "train.bin", tmp_path / ".preparing-old"):
        os.utime(path, (time.time() - 7200,) * 2)
    files.write(tmp_path, corpus_of([("train", [1, 2]), ("val", [3, 4])]), silent)
    assert names(tmp_path) == [".preparing-new", *FILES]


def test_files_are_on_the_disk_before_they_have_their_names(tmp_path, monkeypatch):
    """Else a power cut could leave an empty file under a final name."""
    events, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        found = os.fstat(descriptor)
        events.append(("sync", found.st_ino, found.st_size))
        fsync(descriptor)

    def renamed(source, target):
        found = os.stat(source)
        assert ("sync", found.st_ino, found.st_size) in events, source
        events.append(("rename", found.st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    files.write(tmp_path, corpus_of([("train", [1, 2]), ("val", [3, 4])]), silent)
    folder = tmp_path.stat().st_ino
    kinds = [kind if inode != folder else "folder" for kind, inode, *_ in events]
    assert kinds == ["sync"] * 3 + ["folder"] + ["rename"] * 3 + ["folder"]


def test_a_file_system_that_cannot_flush_a_folder_is_used_all_the_same(tmp_path, monkeypatch):
    fsync, refused = os.fsync, []

    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refused.append(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    files.write(tmp_path, corpus_of([("train", [1, 2]), ("val", [3, 4])]), silent)
    assert names(tmp_path) == FILES
    assert len(refused) == 2


def test_token_files_are_headerless_little_endian_uint16(tmp_path):
    files.write(tmp_path, corpus_of([("train", [1, 258]), ("val", [3, 4])]), silent)
    assert (tmp_path / "train.bin").read_bytes() == b"\x01\x00\x02\x01"


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_too_short_to_predict_one_token_is_refused(tmp_path, split):
    pieces = [(name, [1] if name == split else [1, 2]) for name in ("train", "val")]
    with pytest.raises(UserError, match=f"a test gives the {split} split 1 tokens, and at least 2"):
        files.write(tmp_path, corpus_of(pieces), silent)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write in .*file.set: [^;]*; choose .*--data_dir="):
        files.write(tmp_path / "file" / "set", corpus_of([]), silent)


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt])
def test_what_fails_leaves_no_empty_folder_that_it_has_made(tmp_path, error):
    def fails():
        raise error
        yield

    (tmp_path / "old").mkdir()
    for name in ("old", "new"):
        with pytest.raises(error):
            files.write(tmp_path / name, corpus_of(fails()), silent)
    assert names(tmp_path) == ["old"]


def test_a_disk_that_fills_up_is_one_line(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full is absent: no disk that is full at once")
    with (
        pytest.raises(UserError, match=r"cannot write in set: No space left on device"),
        files.disk(Path("set")),
        open("/dev/full", "wb") as file,
    ):
        file.write(b"x" * 100_000)


# ---- pystdlib


def a_library(root):
    for i in range(40):
        (root / f"m{i:02}.py").write_bytes(f"x = {i}\r\n".encode())
    for left_out in (
        "test",
        "tests",
        "a/tests",
        "idlelib/idle_test",
        "site-packages",
        "__pycache__",
    ):
        (root / left_out).mkdir(parents=True)
        (root / left_out / "no.py").write_text("no = 1\n")
    (root / "a" / "z.py").write_text("z = 'é'")
    (root / "empty.py").touch()
    (root / "latin1.py").write_bytes(b"# \xe9\n")
    (root / "readme.txt").write_text("no")


def test_pystdlib_takes_every_source_in_order_and_every_twentieth_for_val(tmp_path):
    a_library(tmp_path)
    pieces = list(pystdlib.corpus(tmp_path).pieces)
    texts = ["z = 'é'\n"] + [f"x = {i}\n" for i in range(40)]
    assert [bytes(ids).decode() for _, ids in pieces] == [text + "\0" for text in texts]
    assert [i for i, (split, _) in enumerate(pieces) if split == "val"] == [19, 39]


def test_pystdlib_with_no_sources_names_another_way(tmp_path):
    with pytest.raises(UserError, match=r"^0 Python sources under .*prepare text --input=FILE"):
        pystdlib.corpus(tmp_path / "python311.zip")


def test_pystdlib_of_this_python_is_the_same_twice_and_takes_seconds(tmp_path):
    start = time.monotonic()
    prepare("pystdlib", tmp_path / "a", log=silent)
    took = time.monotonic() - start
    prepare("pystdlib", tmp_path / "b", log=silent)
    assert [sha256(tmp_path / "a" / name) for name in FILES] == [
        sha256(tmp_path / "b" / name) for name in FILES
    ]
    assert took < 15, f"{took:.1f} s"  # 0.6 s on a free core
    tokenizer, vocab_size, dtype = for_dataset(tmp_path / "a")
    assert (tokenizer.to_json(), vocab_size, dtype) == ({"kind": "byte"}, 256, np.dtype("<u2"))
    train, val = (len(ids_of(tmp_path / "a", split)) for split in ("train", "val"))
    assert train > 1_000_000
    assert 0.02 < val / train < 0.1
    meta = json.loads((tmp_path / "a" / "meta.json").read_text())
    assert meta["tokens"] == {"train": train, "val": val}
    assert "\ufffd\ufffd" not in tokenizer.decode(ids_of(tmp_path / "a", "val"))


# ---- shakespeare: nanoGPT's bytes


def test_shakespeare_char_is_byte_identical_to_nanogpts(tmp_path, tinyshakespeare):
    said = []
    prepare("shakespeare_char", tmp_path, input=tinyshakespeare, log=said.append)
    assert sha256(tmp_path / "train.bin") == (
        "6ec305602a99ac2802745a134e1f5e33e2231b4855525b00b9aebb730ac2626f"
    )
    assert sha256(tmp_path / "val.bin") == (
        "d37d30cc0c8327c270d493299c3dca54135f6d5f1c9ef60cda78076e311204b1"
    )
    tokenizer, vocab_size, _ = for_dataset(tmp_path)
    assert (vocab_size, tokenizer.n_tokens) == (65, 65)
    assert tokenizer.encode("ROMEO:\n") == [30, 27, 25, 17, 27, 10, 0]
    assert not any("SHA-256" in line for line in said)
    assert "1,003,854 tokens" in "".join(said)


@pytest.mark.usefixtures("gpt2")
def test_shakespeare_is_byte_identical_to_nanogpts(tmp_path, tinyshakespeare):
    prepare("shakespeare", tmp_path, input=tinyshakespeare, log=silent)
    assert sha256(tmp_path / "train.bin") == (
        "502a2bdc8210d1ac5d5674867cb74467dd31db575d25cf6dbb08c8bdbea8680f"
    )
    assert sha256(tmp_path / "val.bin") == (
        "68a53422394c26a655ebe641f5c6f49888e8f4e45fe5d6f02abda63ba3ebd65b"
    )
    tokenizer, vocab_size, _ = for_dataset(tmp_path)
    assert (vocab_size, tokenizer.n_tokens) == (50304, 50257)
    assert names(tmp_path) == FILES


def test_another_text_as_shakespeare_is_used_and_said(tmp_path):
    (tmp_path / "other.txt").write_text("to be or not to be, that is")
    said = []
    prepare("shakespeare_char", tmp_path / "out", input=tmp_path / "other.txt", log=said.append)
    assert "not the published tiny Shakespeare" in said[0]
    assert names(tmp_path / "out") == FILES


def test_a_text_already_in_the_folder_is_not_downloaded_again(tmp_path, monkeypatch):
    monkeypatch.setattr(shakespeare, "download", None)
    (tmp_path / "input.txt").write_text("to be or not to be, that is")
    prepare("shakespeare_char", tmp_path, log=silent)
    assert names(tmp_path) == ["input.txt", *FILES]


# ---- download, from a server on this machine

BODY = bytes(range(256)) * 1000
HASH = hashlib.sha256(BODY).hexdigest()


@contextlib.contextmanager
def serve(body=BODY, ranges=True, sends=()):
    """Serve body; sends[i] is how many bytes answer i may send before the connection closes."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.headers["Range"])
            start = 0
            if ranges and asked[-1]:
                start = int(asked[-1].removeprefix("bytes=").rstrip("-"))
            if start and start >= len(body):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            most = sends[len(asked) - 1] if len(asked) <= len(sends) else len(body)
            self.wfile.write(body[start : start + most])

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/input.txt", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def get(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def get(url):
        download.download(url, tmp_path / "input.txt", HASH, "or use --input=FILE", silent)
        assert (tmp_path / "input.txt").read_bytes() == BODY
        assert names(tmp_path) == ["input.txt"]

    return get


def test_a_download_arrives_whole(get):
    with serve() as (url, asked):
        get(url)
    assert asked == [None]


def test_a_download_is_on_the_disk_before_it_has_its_name(get, monkeypatch, tmp_path):
    synced, fsync = [], os.fsync

    def sync(descriptor):
        synced.append((os.fstat(descriptor).st_ino, (tmp_path / "input.txt").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    with serve() as (url, _):
        get(url)
    assert synced == [((tmp_path / "input.txt").stat().st_ino, False)]


def test_a_download_cut_half_way_goes_on_from_there(get):
    with serve(sends=[100_000, 50_000]) as (url, asked):
        get(url)
    assert asked == [None, "bytes=100000-", "bytes=150000-"]


def test_a_download_cut_half_way_starts_again_where_the_server_has_no_ranges(get):
    with serve(ranges=False, sends=[100_000]) as (url, asked):
        get(url)
    assert asked == [None, "bytes=100000-"]


def test_the_part_of_an_earlier_run_is_completed(get, tmp_path):
    (tmp_path / "input.txt.part").write_bytes(BODY[:1000])
    with serve() as (url, asked):
        get(url)
    assert asked == ["bytes=1000-"]


@pytest.mark.parametrize("part", [b"not the beginning", BODY + b"too long"], ids=["wrong", "long"])
def test_a_part_of_another_file_is_dropped(get, tmp_path, part):
    (tmp_path / "input.txt.part").write_bytes(part)
    with serve() as (url, asked):
        get(url)
    assert asked == [f"bytes={len(part)}-", None]


def test_a_complete_part_needs_no_bytes(get, tmp_path):
    (tmp_path / "input.txt.part").write_bytes(BODY)
    with serve() as (url, _):
        get(url)


def test_a_file_of_another_hash_is_refused(get, tmp_path):
    with (
        serve(body=b"another") as (url, asked),
        pytest.raises(UserError, match=r"its SHA-256 is \w+, not \w+; .* or use --input=FILE$"),
    ):
        get(url)
    assert (asked, names(tmp_path)) == ([None], [])


def test_a_download_that_keeps_failing_keeps_its_part_and_names_the_way_round(get, tmp_path):
    with (
        serve(sends=[10, 10, 10]) as (url, asked),
        pytest.raises(UserError, match=r"closed after 10 of 255,980 bytes; .*--input=FILE$"),
    ):
        get(url)
    assert len(asked) == 3
    assert names(tmp_path) == ["input.txt.part"]


def test_no_server_at_all_is_one_line(get):
    with serve() as (url, _):
        pass
    with pytest.raises(UserError, match=r"cannot download http.*refused.*--input=FILE$") as error:
        get(url)
    assert "\n" not in str(error.value)


def test_shakespeare_without_a_network_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve() as (url, _):
        monkeypatch.setattr(shakespeare, "URL", url)
    with pytest.raises(UserError, match="cannot download"):
        prepare("shakespeare_char", tmp_path / "data" / "new", log=silent)
    assert names(tmp_path) == []


def test_shakespeare_downloads_into_its_folder(tmp_path, monkeypatch, tinyshakespeare):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve(tinyshakespeare.read_bytes()) as (url, _):
        monkeypatch.setattr(shakespeare, "URL", url)
        prepare("shakespeare_char", tmp_path / "new", log=silent)
    assert names(tmp_path / "new") == ["input.txt", *FILES]
    assert sha256(tmp_path / "new" / "input.txt") == shakespeare.SHA256


# ---- text


def test_one_file_is_split_by_character_with_no_end_of_text(tmp_path):
    (tmp_path / "in.txt").write_bytes("é23456789\r\nabcdefghi".encode())
    prepare("text", tmp_path, input=tmp_path / "in.txt", tokenizer="byte", log=silent)
    assert bytes(ids_of(tmp_path, "train")).decode() == "é23456789\nabcdefg"
    assert bytes(ids_of(tmp_path, "val")).decode() == "hi"


def test_a_folder_is_taken_in_order_with_end_of_text_between(tmp_path):
    (tmp_path / "in" / "b").mkdir(parents=True)
    (tmp_path / "in" / "b" / "1.md").write_text("second")
    (tmp_path / "in" / "a.txt").write_text("first")
    (tmp_path / "in" / "z.TXT").write_text("the third is cut")
    (tmp_path / "in" / "c.py").write_text("no")
    (tmp_path / "in" / "empty.txt").touch()
    prepare("text", tmp_path, input=tmp_path / "in", tokenizer="byte", log=silent)
    assert bytes(ids_of(tmp_path, "train")) == b"first\0second\0the third is "
    assert bytes(ids_of(tmp_path, "val")) == b"cut\0"


def test_a_document_that_ends_at_the_cut_keeps_its_end_in_train(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.txt").write_text("123456789" * 2)
    (tmp_path / "in" / "2.txt").write_text("ab")
    prepare("text", tmp_path, input=tmp_path / "in", tokenizer="byte", log=silent)
    assert bytes(ids_of(tmp_path, "train")) == b"123456789123456789\0"
    assert bytes(ids_of(tmp_path, "val")) == b"ab\0"


def test_text_by_character_knows_every_symbol_of_every_document(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.txt").write_text("abab" * 5)
    (tmp_path / "in" / "2.txt").write_text("€cb")
    prepare("text", tmp_path, input=tmp_path / "in", tokenizer="char", log=silent)
    tokenizer, vocab_size, _ = for_dataset(tmp_path)
    assert (vocab_size, tokenizer.to_json()["symbols"]) == (4, "abc€")
    assert tokenizer.decode(ids_of(tmp_path, "train") + ids_of(tmp_path, "val")) == (
        "abab" * 5 + "€cb"
    )


def test_text_is_gpt2_by_default(tmp_path, gpt2):
    text = "A line of words.\n" * 40
    (tmp_path / "in.txt").write_text(text)
    prepare("text", tmp_path, input=tmp_path / "in.txt", log=silent)
    cut = int(len(text) * 0.9)
    assert ids_of(tmp_path, "train") == gpt2.encode_ordinary(text[:cut])
    assert ids_of(tmp_path, "val") == gpt2.encode_ordinary(text[cut:])
    assert for_dataset(tmp_path)[1] == 50304


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"in\.txt is empty"),
        (b"abc", r"in\.txt gives the val split 1 tokens"),
        (b"abc\xffdef", r"in\.txt is not UTF-8 at byte 3 \(0xFF\)"),
        (None, r"cannot read .*in\.txt: No such file"),
    ],
    ids=["empty", "short", "latin-1", "missing"],
)
def test_a_text_that_cannot_be_used_is_one_line_that_names_it(tmp_path, content, message):
    if content is not None:
        (tmp_path / "in.txt").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        prepare("text", tmp_path / "out", input=tmp_path / "in.txt", tokenizer="byte", log=silent)
    assert "\n" not in str(error.value)
    assert names(tmp_path / "out") == []


def test_a_folder_with_no_text_is_one_line_that_names_it(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match=r"has no text: 1 files, none with a word"):
        prepare("text", tmp_path / "out", input=tmp_path, tokenizer="byte", log=silent)


def test_more_characters_than_uint16_can_number_make_files_of_uint32(tmp_path):
    text = "".join(map(chr, range(0x10000, 0x20000)))
    (tmp_path / "in.txt").write_text(text, "utf-8")
    said = []
    prepare("text", tmp_path, input=tmp_path / "in.txt", tokenizer="char", log=said.append)
    tokenizer, vocab_size, dtype = for_dataset(tmp_path)
    assert (vocab_size, dtype) == (65_536, np.dtype("<u4"))
    ids = [np.fromfile(tmp_path / f"{split}.bin", dtype) for split in ("train", "val")]
    assert tokenizer.decode(np.concatenate(ids).tolist()) == text
    assert "train.bin  58,982 tokens, 235,928 bytes" in "".join(said)


@pytest.mark.usefixtures("no_gpt2")
def test_text_without_gpt2s_files_says_so_and_makes_no_folder(tmp_path):
    (tmp_path / "in.txt").write_text("words " * 10)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        prepare("text", tmp_path / "out", input=tmp_path / "in.txt", log=silent)
    assert not (tmp_path / "out").exists()


# ---- the command


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name one data set, not 0: pystdlib, "),
        (["pystdlib", "text"], "name one data set, not 2"),
        (["shakespeare", "a.txt"], "files go to text, or behind --input="),
        (["txet", "my_texts"], "unknown data set 'txet', did you mean 'text'"),
        (["shakespere"], "unknown data set 'shakespere', did you mean 'shakespeare'"),
        (["text", "--inptu=a.txt"], "unknown flag '--inptu', did you mean '--input'"),
        (["text", "-v"], "unknown flag '-v', there are --input, "),
        (["text", "--input"], "'--input' has no value: write --input=VALUE"),
        (["text", "--input="], "'--input=' has no value"),
        (["text"], "text needs --input=FILE"),
        (["text", "--input=pyproject.toml"], "pyproject.toml is none of .txt, .md, .jsonl"),
        (
            ["text", "--input=README.md", "--tokenizer=word"],
            "tokenizer='word' is no tokenizer and no such",
        ),
        (["text", "x.txt"], "cannot read x.txt: No such file or directory"),
        (
            ["text", "--input=x.txt", "--workers=two"],
            "--workers=two is no number: write --workers=",
        ),
        (["text", "--input=README.md", "--workers=0"], "workers=0 is not in 1..128"),
        (["text", "--input=README.md", "--val_share=1"], "val_share=1.0 is not a share between 0"),
        (["text", "--input=README.md", "--split=a"], "--split=a is for data sets of the hub"),
        (["text", "--input=hf:a/b/c"], "hf:a/b/c names no data set: write hf:owner/name"),
        (["text", "--input=no*such"], "no file matches 'no*such'"),
        (["openwebtext", "--column=a"], "openwebtext takes no column='a'"),
        (["shakespeare", "--input=a", "--input=b"], "shakespeare takes one input, not 2"),
        (["text", "--input=x", "--name=../a"], "--name='../a' is not a plain folder name"),
        (["text", "--input=x", "--name=.."], "--name='..' is not a plain folder name"),
        (["text", "--input=x", "--name=a:1"], "--name='a:1' is not a plain folder name"),
        (["text", "--input=x", "--name=a,b"], "--name='a,b' is not a plain folder name"),
        (["pystdlib", "--input=x"], "pystdlib takes no input='x'"),
        (["shakespeare", "--tokenizer=char"], "shakespeare takes no tokenizer='char'"),
    ],
)
def test_a_wrong_command_line_is_one_line_that_says_what_to_do(argv, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as error:
        main(argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_writes_where_it_is_told_and_names_the_next_one(tmp_path, capsys):
    (tmp_path / "in.txt").write_text("some words\n" * 9)
    where = [f"--input={tmp_path / 'in.txt'}", f"--data_dir={tmp_path / 'my data'}"]
    main(["text", *where, "--tokenizer=char", "--name=mine"])
    assert names(tmp_path / "my data" / "mine") == FILES
    printed = capsys.readouterr().out
    assert (
        f"next: python train.py --dataset=mine --out_dir=out-mine --data_dir='{tmp_path}/my data'\n"
        in printed
    )
    assert "train.bin  89 tokens, 178 bytes" in printed
    assert "vocabulary 9, char tokenizer" in printed


def test_the_module_exits_2_with_one_line_for_wrong_input():
    command = [sys.executable, "-m", "gpt_jax.prepare", "pystdlub"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "error: unknown data set 'pystdlub', did you mean 'pystdlib'?\n"


def test_help_names_every_set_and_flag(capsys):
    main(["--help"])
    page = capsys.readouterr().out
    for word in (*SETS, "--input", "--data_dir", "--tokenizer", "--name"):
        assert word in page


def test_the_sets_made_on_first_use_are_sets():
    assert set(SETS) > SMALL == {"pystdlib", "shakespeare_char", "shakespeare"}
    with pytest.raises(UserError, match="no data set 'x': the sets are pystdlib, "):
        prepare("x", Path("unused"))
