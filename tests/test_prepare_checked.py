"""Files that are wrong are named before a device is touched, and sound ones are read once."""

import io
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest

from gpt_jax.data import Split
from gpt_jax.errors import UserError
from gpt_jax.integrity.token_file import TokenFile
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

    def counted(*of_file):
        for start in of(*of_file):
            starts.append(start)
            yield start

    monkeypatch.setattr(checked, "_starts", counted)
    return starts


def opened(folder, vocab_size=65, dtype="uint16", name="train"):
    return open_checked(folder, name, vocab_size, dtype, 10)


def tokens(split):
    [file] = split.files
    return file.tokens


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
    assert len(tokens(opened(folder, vocab_size=66))) == 1000


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
        assert len(tokens(split)) == 1000
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
        file = TokenFile(Anywhere(), data.view("<u2"), (size, 0, 0))
        return checked._facts(file, 1)["digest"]

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
    for size, times in ((checked.REMEMBERED_BYTES, 1), (checked.REMEMBERED_BYTES + 1, 2)):
        (folder / "checked.json").write_bytes(good.rjust(size))
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

    def cutting(*of_file):
        for start in of(*of_file):
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
    assert tokens(opened(folder, dtype=np.dtype(dtype))).tolist() == list(range(11))


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


# ---- shards


def header(magic=20240520, version=1, n_tokens=1000, *more):
    words = np.zeros(256, "<i4")
    words[: 3 + len(more)] = magic, version, n_tokens, *more
    return words.tobytes()


IDS = np.arange(1000) % 65
GPT2 = header() + IDS.astype("<u2").tobytes()
LLAMA3 = header(20240801, 7) + IDS.astype("<u4").tobytes()


def npy(array, version=(1, 0)):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version, allow_pickle=False)
    return file.getvalue()


def fill(folder, files):
    """Put these files in the place of train.bin."""
    (folder / "train.bin").unlink(missing_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def says(folder, *parts, **what):
    """The one line that refuses the train split."""
    with pytest.raises(UserError) as error:
        opened(folder, **what)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert not (folder / "checked.json").exists()


@pytest.mark.parametrize(
    ("names", "content", "dtype"),
    [
        (["fineweb_train_000001.bin", "fineweb_train_000002.bin"], GPT2, "uint16"),
        (["tiny_shakespeare_train.bin"], GPT2, "uint16"),
        (["TinyStories_train.bin"], LLAMA3, "uint32"),
        (["train.bin"], GPT2, "uint16"),
        (["train_000.bin", "train_001.bin"], GPT2[1024:], "uint16"),
        (["train-00000-of-00002.bin", "train-00001-of-00002.bin"], LLAMA3[1024:], "uint32"),
        (["train0.bin", "train1.bin"], GPT2[1024:], "uint16"),
        (["shard_0001_train.bin", "shard_0002.train.bin"], GPT2[1024:], "uint16"),
        (["val_of_the_set_train_1.bin"], GPT2, "uint16"),
        (["edufineweb_train_000001.npy"], npy(IDS.astype("<u2")), "uint16"),
        (["train_1.npy", "train_2.npy"], npy(IDS.astype("<u4")), "uint32"),
    ],
)
def test_shards_are_opened_in_the_order_of_their_names_and_without_their_headers(
    folder, names, content, dtype
):
    """By llm.c's, modded-nanogpt's and build-nanogpt's names, and what people call nanoGPT's."""
    others = ["meta.json", "checked.json", "._fineweb_train_1.bin", "train.txt", "training_1.bin"]
    fill(folder, {name: content for name in reversed(names)} | dict.fromkeys(others, b"{}"))
    split = opened(folder, dtype=dtype)
    assert [file.path.name for file in split.files] == names
    for file in split.files:
        assert file.tokens.tolist() == IDS.tolist()
        assert file.tokens.dtype == dtype
    assert set(remembered(folder)) == set(names)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (GPT2[:-1], ["its header says 1,000 tokens of uint16", "3,024 bytes", "it has 3,023"]),
        (GPT2 + b"\0\0", ["its header says 1,000 tokens", "it has 3,026", "get it again"]),
        (GPT2[:1024], ["its header says 1,000 tokens", "it has 1,024: it is cut off"]),
        (GPT2[:12], ["its header says 1,000 tokens", "it has 12: it is cut off"]),
        (header(n_tokens=-5) + GPT2[1024:], ["its header says -5 tokens"]),
        (header(n_tokens=2**31 - 1) + GPT2[1024:], ["says 2,147,483,647 tokens", "has 3,024"]),
        (header(n_tokens=0), ["has 0 tokens, fewer than block_size + 1 = 11"]),
        (header(version=2) + GPT2[1024:], ["version 2, and only version 1 is known"]),
        (header(20240801, 1) + LLAMA3[1024:], ["version 1, and only version 7 is known"]),
        (header(20240521) + GPT2[1024:], ["magic 20240521, not 20240520 (GPT-2) or 20240801 (L"]),
        (header(0) + GPT2[1024:], ["magic 0, not 20240520"]),
        (header(-1, 7) + LLAMA3[1024:], ["of 1,000 tokens, but magic -1"]),
        (header(20240522, 1, 9, 50) + b"\xff\xff", ["(magic 20240522) holds llm.c's multiple-cho"]),
        (LLAMA3, ["holds uint32 ids (a shard of Llama 3 ids, magic 20240801)", "meta.json beside"]),
    ],
)
def test_a_shard_of_a_wrong_magic_version_or_length_is_refused_by_name(folder, content, parts):
    fill(folder, {"web_train_1.bin": GPT2, "web_train_2.bin": content})
    says(folder, f"{folder / 'web_train_2.bin'}", *parts)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["is empty"]),
        (b"no numpy", ["is no .npy file (the magic string is not correct"]),
        (b"\x93NUMPY\x01\x00\xff\xff{", ["is no .npy file (EOF"]),
        (b"\x93NUMPY\x09\x00" + bytes(20), ["is no .npy file (version (9, 0))"]),
        (npy(IDS.astype("<u2"))[:-2], ["says 1,000 tokens of uint16", "it is cut off or damaged"]),
        (npy(IDS.astype("<u2")) + b"\0", ["says 1,000 tokens of uint16"]),
        (npy(IDS.astype("<u2").reshape(10, 100)), ["holds uint16 of shape (10, 100)"]),
        (npy(IDS.astype("<i8")), ["holds int64 of shape (1000,)"]),
        (npy(IDS.astype(">u2")), ["holds >u2 of shape (1000,)"]),
        (npy(IDS.astype("<u4")), ["holds uint32 ids (an array of numpy's)", "meta.json"]),
        (npy(IDS.astype("<u2")).replace(b"(1000,)", b"(10**9)"), ["is no .npy file"]),
        (npy(IDS.astype("<u2")).replace(b"'<u2'", b"'|O' "), ["holds object of shape (1000,)"]),
    ],
)
def test_an_array_of_numpys_that_is_no_row_of_ids_is_refused_by_name(folder, content, parts):
    """Nothing is unpickled, and nothing allocated for what a header claims."""
    fill(folder, {"web_train_1.npy": content})
    says(folder, f"{folder / 'web_train_1.npy'}", *parts)


def test_files_of_two_kinds_in_a_split_are_refused(folder):
    fill(folder, {"web_train_1.bin": GPT2, "web_train_2.bin": GPT2[1024:]})
    says(folder, "web_train_1.bin (a shard of GPT-2 ids, magic 20240520) and ",
         "web_train_2.bin (ids without a header) are of two kinds")  # fmt: skip
    fill(folder, {"web_train_2.bin": GPT2, "web_train_3.npy": npy(IDS.astype("<u2"))})
    says(folder, "web_train_1.bin", "web_train_3.npy (an array of numpy's) are of two kinds")


def test_a_plain_file_beside_shards_is_refused(folder):
    (folder / "web_train_1.bin").write_bytes(GPT2)
    says(folder, "train.bin and ", "web_train_1.bin are both train: take one of them out")


def test_a_split_without_files_beside_shards_of_the_other_is_refused(folder):
    (folder / "val.bin").rename(folder / "web_val_0.bin")
    (folder / "train.bin").unlink()
    says(folder, f"{folder} has no file of train beside web_val_0.bin: add web_train_0.bin, say")


def test_a_shard_shorter_than_a_window_is_refused(folder):
    fill(folder, {"train_1.bin": bytes(100), "train_2.bin": bytes(20)})
    says(folder, "train_2.bin has 10 tokens, fewer than block_size + 1 = 11")


def test_an_unknown_id_is_found_in_whichever_shard_it_is(folder):
    fill(folder, {f"train_{i}.bin": GPT2[1024:] for i in range(3)})
    tokens = IDS.astype("<u2")
    tokens[437] = 65
    tokens.tofile(folder / "train_1.bin")
    says(folder, f"{folder / 'train_1.bin'}: token 437 is 65, but vocab_size=65")


def test_tokens_that_only_begin_like_a_header_are_tokens(folder):
    ids = np.full(1000, 3, "<u2")
    ids[:2] = np.frombuffer(np.array([20240520], "<i4").tobytes(), "<u2")
    ids.tofile(folder / "train.bin")
    assert len(tokens(opened(folder, vocab_size=2**16))) == 1000
    ids[:] = 0  # a picture, say, of which little is not black
    ids[0] = 5
    ids.tofile(folder / "train.bin")
    assert len(tokens(opened(folder, vocab_size=2**16))) == 1000


def test_only_a_shard_that_has_changed_is_read_again(folder, scanned):
    fill(folder, {f"train_{i}.bin": GPT2 for i in range(40)})
    opened(folder)
    assert len(scanned) == 40
    assert len(remembered(folder)) == 40
    opened(folder)
    assert len(scanned) == 40
    swap_last(folder / "train_17.bin")
    opened(folder)
    assert len(scanned) == 41
    fill(folder, {"train_40.bin": GPT2})
    opened(folder)
    assert len(scanned) == 42


def test_a_shard_that_changes_while_in_use_is_named(folder):
    fill(folder, {f"train_{i}.bin": GPT2 for i in range(3)})
    split = opened(folder)
    touch(folder / "train_1.bin")
    split.windows(np.array([0, 2500]))
    with pytest.raises(UserError, match=r"train_1.bin was replaced, written to or removed"):
        split.windows(np.array([0, 1500, 2500]))


def test_thousands_of_shards_are_remembered(folder):
    fill(folder, {f"train_{i:04}.bin": bytes(40) for i in range(3000)})
    opened(folder)
    assert len(remembered(folder)) == 3000
    assert (folder / "checked.json").stat().st_size < checked.REMEMBERED_BYTES


def test_of_many_large_shards_as_much_is_read_as_of_one():
    """By the published bounds: 1,030 shards of 100 million tokens, FineWeb's 100 billion."""
    n, of = 100_000_000, 1030
    starts = list(checked._starts(n, 1 / of))
    assert starts == [0, n - checked.CHUNK]
    assert len(starts) * of * checked.CHUNK < 2**32
    whole = list(checked._starts(n, 1 / 103))  # 10 billion: all of it
    assert whole == list(range(0, n, checked.CHUNK))
