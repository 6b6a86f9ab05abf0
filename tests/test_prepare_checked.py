"""Files that are wrong are named before a device is touched, and sound ones are read once."""

import json
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from gpt_jax.data import Split
from gpt_jax.errors import UserError
from gpt_jax.prepare import checked
from gpt_jax.prepare.checked import open_checked


@pytest.fixture
def folder(tmp_path):
    """A data set of 1,000 tokens below 65 each."""
    folder = tmp_path / "shakespeare_char"
    folder.mkdir()
    for name in ("train", "val"):
        (np.arange(1000) % 65).astype("<u2").tofile(folder / f"{name}.bin")
    return folder


@pytest.fixture
def scanned(monkeypatch):
    """The first token of each chunk that is read for its ids."""
    starts, of = [], checked._starts

    def counted(n_tokens):
        for start in of(n_tokens):
            starts.append(start)
            yield start

    monkeypatch.setattr(checked, "_starts", counted)
    return starts


def opened(folder, vocab_size=65, dtype="uint16", name="train"):
    return open_checked(folder, name, vocab_size, dtype, 10)


def refused(folder, **what):
    with pytest.raises(UserError) as error:
        opened(folder, **what)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(str(folder / "train.bin"))
    return message


def spoil(folder, places, value=65):
    tokens = np.fromfile(folder / "train.bin", "<u2")
    tokens[places] = value
    tokens.tofile(folder / "train.bin")


def remembered(folder):
    return json.loads((folder / "checked.json").read_bytes())


# ---- every token is in range


@pytest.mark.parametrize("chunk", [1, 7, 100, 1000, 4096])
@pytest.mark.parametrize("places", [[0], [999], [99, 100], [437, 600]])
def test_the_first_unknown_id_is_named_with_file_offset_and_id(folder, monkeypatch, chunk, places):
    """C20."""
    monkeypatch.setattr(checked, "CHUNK", chunk)
    spoil(folder, places)
    message = refused(folder)
    assert f"train.bin: token {places[0]} is 65, but vocab_size=65" in message
    assert "prepare the data set again" in message
    assert not (folder / "checked.json").exists()
    assert len(opened(folder, vocab_size=66).tokens) == 1000


def test_chunks_cover_a_file_once_and_no_more_than_a_chunk_is_read_at_a_time(
    folder, monkeypatch, scanned
):
    monkeypatch.setattr(checked, "CHUNK", 300)
    opened(folder)
    assert scanned == [0, 300, 600, 900]


def test_a_very_large_file_is_sampled_evenly_with_both_ends_and_the_same_each_time(
    folder, monkeypatch, scanned
):
    for name, value in (("WHOLE", 999), ("CHUNK", 100), ("SAMPLES", 4)):
        monkeypatch.setattr(checked, name, value)
    spoil(folder, [150, 799])
    opened(folder)
    assert scanned == [0, 300, 600, 900]
    for place in (0, 99, 300, 650, 900, 999):
        spoil(folder, [place])
        assert f"token {place} is 65" in refused(folder)
        spoil(folder, [place], 1)
    with pytest.raises(UserError, match="token 150 is 65"):  # what no sample held
        opened(folder).windows(np.array([145]))


def test_the_time_to_open_is_bounded_and_all_of_openwebtext_is_checked():
    """By the published bounds: 2**28 tokens of a file of 2**40, and all of 9 billion."""
    starts = list(checked._starts(2**40))
    assert len(starts) * checked.CHUNK == 2**28
    assert (starts[0], starts[-1]) == (0, 2**40 - checked.CHUNK)
    assert np.ptp(np.diff(starts)) <= 1
    assert len(list(checked._starts(9_035_582_198))) * checked.CHUNK >= 9_035_582_198


# ---- and read once


def test_a_second_start_reads_no_chunk_again(folder, scanned):
    for name in ("train", "val"):
        opened(folder, name=name)
    assert scanned == [0, 0]
    assert set(remembered(folder)) == {"train.bin", "val.bin"}
    assert remembered(folder)["train.bin"]["largest"] == 64
    for name in ("train", "val"):
        split = opened(folder, name=name)
        assert isinstance(split, Split)
        assert len(split.tokens) == 1000
        opened(folder, vocab_size=70, name=name)
    assert scanned == [0, 0]


def test_a_smaller_vocabulary_is_held_against_the_remembered_id(folder):
    opened(folder)
    assert "token 63 is 63, but vocab_size=63" in refused(folder, vocab_size=63)
    opened(folder)


def keep_times(path, write):
    found = path.stat()
    write(path)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def grow(path):
    path.write_bytes(path.read_bytes() + b"\0\0")


def touch(path):
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def swap_first(path):
    path.write_bytes(b"\7\0" + path.read_bytes()[2:])


def swap_last(path):
    path.write_bytes(path.read_bytes()[:-2] + b"\7\0")


@pytest.mark.parametrize(
    "change",
    [
        lambda path: keep_times(path, grow),
        touch,
        lambda path: keep_times(path, swap_first),
        lambda path: keep_times(path, swap_last),
    ],
    ids=["size", "time", "first token", "last token"],
)
def test_a_file_that_is_another_by_size_time_or_digest_is_read_again(folder, scanned, change):
    np.zeros(2**19, "<u2").tofile(folder / "train.bin")  # whose blocks are the same if it grows
    opened(folder)
    del scanned[:]
    change(folder / "train.bin")
    opened(folder)
    assert scanned[0] == 0
    del scanned[:]
    opened(folder)
    assert scanned == []


def test_a_file_read_by_another_dtype_is_read_again(folder, scanned):
    np.arange(65000, 65500, dtype="<u2").tofile(folder / "train.bin")
    opened(folder, vocab_size=2**16)
    assert "vocab_size=65536" in refused(folder, vocab_size=2**16, dtype="uint32")
    assert scanned == [0, 0]


def test_the_digest_of_a_large_file_takes_its_ends_and_blocks_evenly_between(tmp_path):
    """And no more: what changes elsewhere, at the same size and time, is found when it is read."""
    size = 2**20
    step = (size - 4096) // 63

    def digest(changed=None):
        data = np.zeros(size, np.uint8)
        if changed is not None:
            data[changed] = 1
        split = Split(tmp_path, data.view("<u2"), 65, 10, (size, 0, 0))
        return checked._facts(replace(split, path=Anywhere()))["digest"]

    class Anywhere:
        def stat(self):
            return SimpleNamespace(st_size=size, st_mtime_ns=0, st_ino=0)

    same = digest()
    for changed in (0, 4095, step, step + 4095, 31 * step + 100, size - 4096, size - 1):
        assert digest(changed) != same
    for changed in (4096, step - 1, step + 4096, size - 4097):
        assert digest(changed) == same


# ---- checked.json is only a hint


HOSTILE = {
    "empty": b"",
    "not JSON": b"{",
    "not UTF-8": b'{"train.bin": "\xff"}',
    "a number": b"3",
    "null": b"null",
    "a list": b'["train.bin"]',
    "a string": b'"train.bin"',
    "deep": b"[" * 60_000,
    "long number": b'{"train.bin": {"largest": ' + b"9" * 10_000 + b"}}",
    "NaN": b'{"train.bin": NaN}',
    "entry null": b'{"train.bin": null}',
    "entry list": b'{"train.bin": [1, 2]}',
    "entry string": b'{"train.bin": "largest"}',
    "entry empty": b'{"train.bin": {}}',
    "lone surrogate": b'{"\\ud800": {"\\ud800": 1}}',
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_damaged_memory_only_means_that_the_file_is_read_again(folder, scanned, content):
    (folder / "checked.json").write_bytes(content)
    opened(folder)
    assert scanned == [0]
    assert set(remembered(folder)) == {"train.bin"}
    opened(folder)
    assert scanned == [0]


@pytest.mark.parametrize("key", checked.ENTRY)
@pytest.mark.parametrize("value", [None, True, -1, 1.0, "64", [], {}, 10**400], ids=str)
def test_a_remembered_value_that_is_wrong_is_not_believed(folder, scanned, key, value):
    opened(folder)
    good = remembered(folder)
    damaged = json.loads(json.dumps(good))
    damaged["train.bin"][key] = value
    (folder / "checked.json").write_text(json.dumps(damaged))
    opened(folder)
    assert scanned == [0, 0]
    assert remembered(folder) == good


def test_a_memory_that_is_too_long_to_be_ours_is_not_taken_in(folder, scanned):
    opened(folder)
    good = (folder / "checked.json").read_bytes()
    for padding, times in ((60_000, 1), (70_000, 2)):
        (folder / "checked.json").write_bytes(b" " * padding + good)
        opened(folder)
        assert len(scanned) == times
    assert (folder / "checked.json").read_bytes() == good


def test_equal_numbers_of_another_type_are_not_believed(folder, scanned):
    opened(folder)
    damaged = remembered(folder)
    damaged["train.bin"]["size"] = float(damaged["train.bin"]["size"])
    (folder / "checked.json").write_text(json.dumps(damaged))
    opened(folder)
    assert scanned == [0, 0]


def test_what_is_remembered_of_the_other_split_is_kept_and_of_the_unknown_dropped(folder):
    opened(folder, name="val")
    noted = remembered(folder)
    (folder / "checked.json").write_text(json.dumps({**noted, "x": [1], "y": {"size": 1}}))
    opened(folder)
    assert set(remembered(folder)) == {"train.bin", "val.bin"}
    assert remembered(folder)["val.bin"] == noted["val.bin"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_in_the_memorys_place_is_left_and_the_file_read_each_time(folder, scanned):
    (folder / "checked.json").mkdir()
    opened(folder)
    opened(folder)
    assert scanned == [0, 0]
    assert names(folder) == ["checked.json", "train.bin", "val.bin"]


def test_a_pipe_in_the_memorys_place_does_not_hold_up_the_start(folder, scanned):
    os.mkfifo(folder / "checked.json")
    opened(folder)
    assert scanned == [0]


def test_a_folder_that_takes_no_writing_means_a_file_read_each_time(folder, monkeypatch, scanned):
    """Also for root, whom the mode of a folder does not stop."""

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checked.Path, "write_text", refuse)
    for _ in range(2):
        opened(folder)
    assert scanned == [0, 0]
    assert names(folder) == ["train.bin", "val.bin"]


def test_the_memory_changes_in_one_step_and_leaves_no_temporary(folder, monkeypatch):
    """A start on another host may read it at any time."""
    seen, replace = [], os.replace

    def look(source, target):
        seen.append((json.loads(source.read_bytes()).keys(), target.exists()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    opened(folder)
    assert seen == [({"train.bin"}, False)]
    assert names(folder) == ["checked.json", "train.bin", "val.bin"]


def test_a_file_cut_short_while_it_is_checked_is_named(folder, monkeypatch):
    monkeypatch.setattr(checked, "CHUNK", 100)
    of = checked._starts

    def cutting(n_tokens):
        for start in of(n_tokens):
            if start == 500:
                os.truncate(folder / "train.bin", 100)
            yield start

    monkeypatch.setattr(checked, "_starts", cutting)
    assert "while in use" in refused(folder)
    assert not (folder / "checked.json").exists()


# ---- what is no file of tokens


def test_a_missing_file_is_named_with_the_command_that_makes_it(folder, monkeypatch):
    """C21."""
    (folder / "train.bin").unlink()
    assert refused(folder).endswith("`python -m gpt_jax.prepare shakespeare_char`")
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=r"gpt_jax\.prepare shakespeare_char`"):
        opened(checked.Path())
    message = refused(folder / "my own")
    assert message.endswith("`python -m gpt_jax.prepare text --input=FILE --name='my own'`")


@pytest.mark.parametrize(
    ("size", "dtype", "reason"),
    [
        (0, "uint16", "is empty: prepare the data set with `python -m gpt_jax.prepare "),
        (1, "uint16", "1 bytes is not a whole number of uint16 tokens, it is cut off"),
        (2023, "uint16", "2,023 bytes is not a whole number of uint16 tokens, it is cut off"),
        (46, "uint32", "46 bytes is not a whole number of uint32 tokens, it is cut off"),
        (20, "uint16", "has 10 tokens, fewer than block_size + 1 = 11: give it more text or"),
        (40, "uint32", "has 10 tokens, fewer than block_size + 1 = 11: give it more text or"),
    ],
)
def test_a_file_that_is_empty_cut_off_or_too_short_is_refused_by_name(folder, size, dtype, reason):
    """C21."""
    (folder / "train.bin").write_bytes(bytes(size))
    assert reason in refused(folder, dtype=dtype)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_a_file_of_one_window_is_enough(folder, dtype):
    np.arange(11, dtype=dtype).tofile(folder / "train.bin")
    assert opened(folder, dtype=np.dtype(dtype)).tokens.tolist() == list(range(11))


def test_what_is_no_regular_file_is_refused_by_name(folder):
    """C21; a pipe would hold up the start for ever."""
    path = folder / "train.bin"
    path.unlink()
    path.mkdir()
    assert "train.bin is a folder, not a file of token ids: remove it and prepare" in refused(
        folder
    )
    path.rmdir()
    os.mkfifo(path)
    assert "train.bin is no regular file, not a file of token ids" in refused(folder)
    path.unlink()
    path.symlink_to("nowhere")
    assert "is not there" in refused(folder)
    assert "cannot be read (Not a directory)" in refused(folder / "val.bin")


def shard(magic, n_tokens, dtype):
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1 if magic == 20240520 else 7, n_tokens
    return header.tobytes() + (np.arange(n_tokens) % 65).astype(dtype).tobytes()


@pytest.mark.parametrize("cut", [0, 1, 1500])
@pytest.mark.parametrize("vocab_size", [65, 50304, 2**16])
def test_a_shard_of_llm_c_is_refused_and_the_way_to_use_it_works(folder, vocab_size, cut):
    """As modded-nanogpt's are; its header would be read as 512 tokens."""
    content = shard(20240520, 1000, "<u2")
    (folder / "train.bin").write_bytes(content[: len(content) - cut])
    message = refused(folder, vocab_size=vocab_size)
    assert "is an llm.c shard with a header (magic 20240520), which this loader does not" in message
    assert "`tail -c +1025 SHARD`" in message
    (folder / "train.bin").write_bytes(content[1024:])
    assert len(opened(folder, vocab_size=vocab_size).tokens) == 1000


def test_a_llama_3_shard_is_refused_for_its_ids(folder):
    (folder / "train.bin").write_bytes(shard(20240801, 1000, "<u4"))
    assert "(magic 20240801)" in refused(folder, vocab_size=128_256, dtype="uint32")
    assert "its ids are Llama 3's" in refused(folder)


def test_tokens_that_only_begin_like_a_header_are_tokens(folder):
    tokens = np.full(1000, 3, "<u2")
    tokens[:2] = np.frombuffer(np.array([20240520], "<i4").tobytes(), "<u2")
    tokens.tofile(folder / "train.bin")
    assert len(opened(folder, vocab_size=2**16).tokens) == 1000
