"""What a command line may say, and what each wrong one is told."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest

from gpt_jax import config as config_module
from gpt_jax.bench.config import TrainBench
from gpt_jax.commandline import compact, in_order, notes, save_config, usage
from gpt_jax.commandline.files import PRESETS
from gpt_jax.config import GPTConfig, SampleConfig, TrainConfig, parse
from gpt_jax.errors import UserError
from gpt_jax.evaluate import EvalConfig
from gpt_jax.plan import PlanConfig

README_CPU = [
    "config/train_shakespeare_char.py",
    "--device=cpu",
    "--compile=False",
    "--eval_iters=20",
    "--log_interval=1",
    "--block_size=64",
    "--batch_size=12",
    "--n_layer=4",
    "--n_head=4",
    "--n_embd=128",
    "--max_iters=2000",
    "--lr_decay_iters=2000",
    "--dropout=0.0",
]

# nanoGPT's train.py, in its order; device and dtype differ on purpose ("auto")
NANOGPT_TRAIN = {
    "out_dir": "out",
    "eval_interval": 2000,
    "log_interval": 1,
    "eval_iters": 200,
    "eval_only": False,
    "always_save_checkpoint": True,
    "init_from": "scratch",
    "wandb_log": False,
    "wandb_project": "owt",
    "wandb_run_name": "gpt2",
    "dataset": "openwebtext",
    "gradient_accumulation_steps": 40,
    "batch_size": 12,
    "block_size": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "dropout": 0.0,
    "bias": False,
    "learning_rate": 6e-4,
    "max_iters": 600000,
    "weight_decay": 1e-1,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "decay_lr": True,
    "warmup_iters": 2000,
    "lr_decay_iters": 600000,
    "min_lr": 6e-5,
    "backend": "nccl",
    "device": "auto",
    "dtype": "auto",
    "compile": True,
}
SHARED = {
    "fsdp": 1,
    "tensor": 1,
    "coordinator_address": "",
    "num_processes": 0,
    "process_id": -1,
    "initialization_timeout": 120,
}
OURS = {
    "data_dir": "data",
    "seed": 1337,
    "save_interval": 0,
    "keep": 2,
    "keep_every": 0,
    "fallback": True,
    "max_skipped": 10,
    "spike_zscore": 0.0,
    "deterministic": False,
    "activation": "gelu",
    "attention": "auto",
    "kernels": "auto",
    "remat": "none",
    "matmul_dtype": "auto",
    "scan_layers": False,
    "peak_flops": 0.0,
    "data": -1,
    **SHARED,
    "sample_tokens": 0,
    "tensorboard": False,
    "log_norms": False,
}
EVAL = {"batch_size": 8, "eval_iters": 500, "eval_only": True, "wandb_log": False}
NANOGPT_PRESETS = {
    "train_gpt2": {
        "wandb_log": True,
        "wandb_project": "owt",
        "wandb_run_name": "gpt2-124M",
        "batch_size": 12,
        "block_size": 1024,
        "gradient_accumulation_steps": 40,
        "max_iters": 600000,
        "lr_decay_iters": 600000,
        "eval_interval": 1000,
        "eval_iters": 200,
        "log_interval": 10,
        "weight_decay": 0.1,
    },
    "train_shakespeare_char": {
        "out_dir": "out-shakespeare-char",
        "eval_interval": 250,
        "eval_iters": 200,
        "log_interval": 10,
        "always_save_checkpoint": False,
        "wandb_log": False,
        "wandb_project": "shakespeare-char",
        "wandb_run_name": "mini-gpt",
        "dataset": "shakespeare_char",
        "gradient_accumulation_steps": 1,
        "batch_size": 64,
        "block_size": 256,
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 384,
        "dropout": 0.2,
        "learning_rate": 1e-3,
        "max_iters": 5000,
        "lr_decay_iters": 5000,
        "min_lr": 1e-4,
        "beta2": 0.99,
        "warmup_iters": 100,
    },
    "finetune_shakespeare": {
        "out_dir": "out-shakespeare",
        "eval_interval": 5,
        "eval_iters": 40,
        "wandb_log": False,
        "wandb_project": "shakespeare",
        "dataset": "shakespeare",
        "init_from": "gpt2-xl",
        "always_save_checkpoint": False,
        "batch_size": 1,
        "gradient_accumulation_steps": 32,
        "max_iters": 20,
        "learning_rate": 3e-5,
        "decay_lr": False,
    },
    "eval_gpt2": {**EVAL, "init_from": "gpt2"},
    "eval_gpt2_medium": {**EVAL, "init_from": "gpt2-medium"},
    "eval_gpt2_large": {**EVAL, "init_from": "gpt2-large"},
    "eval_gpt2_xl": {**EVAL, "init_from": "gpt2-xl"},
}
QUICKSTART = {
    "out_dir": "out",
    "init_from": "auto",
    "dataset": "pystdlib",
    "gradient_accumulation_steps": 1,
}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return name


def save_run(out_dir: str, **changes) -> dict:
    saved = dataclasses.asdict(TrainConfig(out_dir=out_dir, **changes))
    write(f"{out_dir}/config.json", json.dumps(saved))
    return saved


def refusal(argv: list[str], kind=TrainConfig) -> str:
    with pytest.raises(UserError) as caught:
        parse(argv, kind)
    message = str(caught.value)
    assert "\n" not in message
    assert message
    return message


def has(config, values: dict) -> bool:
    return {name: getattr(config, name) for name in values} == values


# Keys and their defaults


def test_nanogpts_keys_have_nanogpts_defaults_in_nanogpts_order():
    values = dataclasses.asdict(TrainConfig())
    assert {k: v for k, v in values.items() if k not in OURS} == NANOGPT_TRAIN
    assert [f.name for f in in_order(TrainConfig) if f.name not in OURS] == list(NANOGPT_TRAIN)


def test_our_own_keys_have_their_defaults():
    assert has(TrainConfig(), OURS)
    assert set(dataclasses.asdict(TrainConfig())) == set(NANOGPT_TRAIN) | set(OURS)


def test_a_default_network_is_nanogpts():
    seven = (1024, 50304, 12, 12, 768, 0.0, True)
    assert dataclasses.astuple(GPTConfig())[:7] == seven
    assert GPTConfig(*seven) == GPTConfig()
    assert dataclasses.astuple(GPTConfig())[7:] == (
        "gelu",
        "float32",
        "auto",
        "auto",
        "auto",
        "none",
        False,
        0,
    )


def test_a_network_is_hashable_and_frozen():
    assert hash(GPTConfig()) == hash(GPTConfig())
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPTConfig().n_layer = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_sampling_has_nanogpts_defaults_and_ours():
    assert dataclasses.asdict(SampleConfig()) == {
        "init_from": "resume",
        "out_dir": "out",
        "start": "\n",
        "num_samples": 10,
        "max_new_tokens": 500,
        "temperature": 0.8,
        "top_k": 200,
        "seed": 1337,
        "device": "auto",
        "dtype": "auto",
        "compile": True,
        "top_p": 1.0,
        "stop": "",
        "step": "",
        "data_dir": "data",
        "data": 1,
        **SHARED,
    }


def test_a_resumed_run_does_not_look_for_the_hosts_of_the_one_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hosts = {"coordinator_address": "h:1", "num_processes": 4, "process_id": 3}
    save_config(dataclasses.replace(TrainConfig(), out_dir=".", fsdp=4, **hosts))
    config = parse(["--init_from=resume", "--out_dir=."])
    assert (config.coordinator_address, config.num_processes, config.process_id) == ("", 0, -1)
    assert config.fsdp == 4


def test_evaluating_measures_the_validation_split_of_the_runs_own_data():
    config = parse([], EvalConfig)
    expected = {"init_from": "resume", "out_dir": "out", "dataset": "", "split": "val", "step": ""}
    assert has(config, expected)


def test_model_config_takes_over_every_key_of_the_network():
    config = TrainConfig(
        block_size=64,
        n_layer=3,
        n_head=2,
        n_embd=10,
        dropout=0.1,
        bias=True,
        activation="gelu_tanh",
        matmul_dtype="float8",
        attention="xla",
        kernels="reference",
        remat="dots",
        scan_layers=True,
    )
    assert config.model_config(65, "bfloat16", 60) == GPTConfig(
        64, 65, 3, 2, 10, 0.1, True, "gelu_tanh", "bfloat16", "float8", "xla", "reference",
        "dots", True, 60,
    )  # fmt: skip


# Flags


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--max_iters=1000", 1000),
        ("--max_iters=1e3", 1000),
        ("--max_iters=1_000", 1000),
        ("--learning_rate=1", 1.0),
        ("--learning_rate=3e-4", 3e-4),
        ("--compile=true", True),
        ("--compile=False", False),
        ("--compile=FALSE", False),
        ("--compile=1", True),
        ("--compile=0", False),
        ("--compile=yes", True),
        ("--compile=no", False),
        ("--wandb_run_name=123", "123"),
        ("--wandb_run_name='quoted'", "'quoted'"),
        ("--wandb_run_name=", ""),
        ("--eval_only", True),
        ("--wandb_run_name=a=b=c", "a=b=c"),
        ("--device=cuda:3", "cuda:3"),
        ("--seed=4294967295", 2**32 - 1),
    ],
)
def test_a_flag_is_read_by_the_type_of_its_key(flag, value):
    name = flag[2:].partition("=")[0]
    read = getattr(parse(["train_gpt2", flag]), name)
    assert (read, type(read)) == (value, type(value))


def test_only_the_first_equals_sign_of_a_flag_splits():
    assert parse(["--start=a=b"], SampleConfig).start == "a=b"
    assert parse(["--start=123"], SampleConfig).start == "123"


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--max_iters=1.5", "max_iters=1.5 is a float, it must be an int"),
        ("--max_iters=many", "max_iters='many' is a str, it must be an int"),
        ("--max_iters=", "max_iters='' is a str, it must be an int"),
        ("--max_iters=True", "max_iters='True' is a str, it must be an int"),
        ("--max_iters=nan", "max_iters=nan is a float, it must be an int"),
        ("--max_iters=1e400", "max_iters=inf is a float, it must be an int"),
        ("--max_iters=3e9", "out of range: it must be at most 2147483647"),
        ("--learning_rate=high", "learning_rate='high' is a str, it must be a float"),
        ("--learning_rate=nan", "learning_rate=nan is out of range: it must be above 0"),
        ("--weight_decay=inf", "weight_decay=inf is out of range: it must be at most"),
        ("--compile=maybe", "compile='maybe' is a str, it must be a bool (True or False)"),
        ("--compile=", "compile='' is a str, it must be a bool"),
        ("--max_itres=5", "unknown key 'max_itres', did you mean 'max_iters'? (--help lists all"),
        ("--max-iters=5", "unknown key 'max-iters', did you mean 'max_iters'?"),
        ("--zzzzzzzzzz=5", "unknown key 'zzzzzzzzzz' (--help lists all keys)"),
        ("--=5", "unknown key ''"),
        ("--", "unknown key ''"),
        ("--max_iters", "--max_iters has no value: write --max_iters=VALUE"),
        ("max_iters=5", "'max_iters=5' is neither a config file nor a key: write --key=value"),
        ("-x", "'-x' is neither a config file nor a key: write --key=value"),
    ],
)
def test_a_flag_that_cannot_be_read_is_refused_in_one_line(flag, told):
    assert told in refusal([flag])


def test_a_value_apart_from_its_flag_is_refused():
    assert "write --max_iters=VALUE" in refusal(["--max_iters", "100"])


def test_a_flag_of_another_command_is_refused():
    assert "unknown key 'max_iters'" in refusal(["--max_iters=5"], SampleConfig)
    assert "unknown key 'temperature'" in refusal(["--temperature=1"])


def test_the_later_flag_and_the_later_file_win_and_flags_win_over_files():
    write("a.py", "batch_size = 1\nn_layer = 1\nmax_iters = 1")
    write("b.py", "batch_size = 2\nn_layer = 2")
    config = parse(["--batch_size=3", "a.py", "--batch_size=4", "b.py"])
    assert (config.batch_size, config.n_layer, config.max_iters) == (4, 2, 1)


# Limits


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--batch_size=0", "batch_size=0 is out of range: it must be at least 1"),
        ("--gradient_accumulation_steps=0", "at least 1"),
        ("--block_size=0", "at least 1"),
        ("--n_layer=0", "at least 1"),
        ("--n_head=0", "at least 1"),
        ("--n_embd=-768", "at least 1"),
        ("--dropout=1", "dropout=1.0 is out of range: it must be below 1"),
        ("--dropout=-0.1", "at least 0"),
        ("--eval_interval=0", "at least 1"),
        ("--log_interval=0", "at least 1"),
        ("--eval_iters=0", "at least 1"),
        ("--max_iters=-1", "at least 0"),
        ("--learning_rate=0", "above 0"),
        ("--min_lr=-1", "at least 0"),
        ("--beta1=1", "at most 0.999999"),
        ("--beta2=-0.1", "at least 0"),
        ("--weight_decay=-1", "at least 0"),
        ("--grad_clip=-1", "at least 0"),
        ("--warmup_iters=-1", "at least 0"),
        ("--save_interval=-1", "at least 0"),
        ("--keep=0", "at least 1"),
        ("--sample_tokens=-1", "at least 0"),
        ("--peak_flops=-1", "at least 0"),
        ("--seed=-1", "at least 0"),
        ("--seed=4294967296", "at most 4294967295"),
        ("--out_dir=", "out_dir='' is empty or unprintable: give it a name"),
        ("--dataset= ", "dataset=' ' is empty or unprintable"),
        ("--data_dir=a\0b", "unprintable"),
        ("--init_from=", "init_from='' is empty"),
        ("--dataset=../secrets", "dataset='../secrets' leaves data_dir: set --data_dir instead"),
        ("--dtype=fp8", "dtype='fp8' is not one of auto|float32|bfloat16|float16"),
        ("--device=cude", "device='cude' is not one of auto|cpu|gpu|cuda|cuda:N|tpu"),
        ("--device=cuda:N", "is not one of"),
        ("--device=mps", "(JAX has no Metal backend: use --device=cpu)"),
        ("--activation=relu", "is not one of gelu|gelu_tanh"),
        ("--attention=flash", "is not one of auto|reference|xla|cudnn"),
        ("--remat=some", "is not one of none|dots|full"),
        ("--n_head=7", "n_embd=768 is not a multiple of n_head=7: choose n_head from 1, 2, 3, 4,"),
    ],
)
def test_an_impossible_value_is_refused_with_its_bound(flag, told):
    assert told in refusal(["train_gpt2", flag])


def test_min_lr_may_lie_above_the_rate_as_in_nanogpt():
    assert parse(["train_gpt2", "--learning_rate=1e-6"]).min_lr == 6e-5


def test_cudnn_attention_is_refused_with_what_its_kernel_lacks():
    cudnn = ["train_gpt2", "--attention=cudnn"]
    assert "no dropout" in refusal([*cudnn, "--dropout=0.1"])
    assert "use --attention=auto" in refusal([*cudnn, "--dtype=float32"])
    assert parse(cudnn).attention == "cudnn"


def test_a_run_shorter_than_its_warmup_is_permitted_as_in_nanogpt():
    config = parse(["train_shakespeare_char", "--max_iters=10", "--lr_decay_iters=10"])
    assert config.warmup_iters == 100


def test_a_dataset_may_lie_in_a_sub_folder():
    assert parse(["--dataset=web/2024"]).dataset == "web/2024"


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--temperature=-1", "at least 0"),
        ("--top_k=-1", "at least 0"),
        ("--top_p=0", "above 0"),
        ("--top_p=1.1", "at most 1"),
        ("--num_samples=0", "at least 1"),
        ("--max_new_tokens=0", "at least 1"),
        ("--seed=-1", "at least 0"),
        ("--step=first", "step='first' is not one of |best|latest|N"),
    ],
)
def test_impossible_sampling_is_refused(flag, told):
    assert told in refusal([flag], SampleConfig)


@pytest.mark.parametrize("step", ["", "best", "latest", "0", "1500"])
def test_a_checkpoint_is_named_by_a_word_or_its_number(step):
    assert parse([f"--step={step}"], SampleConfig).step == step
    assert parse([f"--step={step}"], EvalConfig).step == step


def test_only_val_train_and_all_can_be_evaluated():
    assert parse(["--split=all"], EvalConfig).split == "all"
    assert "is not one of val|train|all" in refusal(["--split=test"], EvalConfig)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"n_head": 7}, "choose n_head from 1, 2, 3, 4, 6, 8, 12, 16"),
        ({"n_embd": 0}, "at least 1"),
        ({"vocab_size": True}, "vocab_size=True is a bool (True or False), it must be an int"),
        ({"n_layer": None}, "n_layer=None is NoneType, it must be an int"),
        ({"dtype": "auto"}, "is not one of float32|bfloat16|float16"),
        ({"dropout": 1.0}, "below 1"),
        ({"n_tokens": 50305}, "n_tokens=50305 is above vocab_size=50304"),
        ({"attention": "cudnn"}, "no float32"),
    ],
)
def test_an_impossible_network_is_refused_where_it_is_made(changes, told):
    with pytest.raises(UserError) as caught:
        GPTConfig(**changes)
    assert told in str(caught.value)


# Config files


def test_a_config_is_a_path_first_and_a_preset_otherwise():
    for name in ("train_gpt2", "train_gpt2.py", "config/train_gpt2.py", "/no/such/train_gpt2.py"):
        assert parse([name]).wandb_run_name == "gpt2-124M"
    write("config/train_gpt2.py", "wandb_run_name = 'mine'")
    assert parse(["config/train_gpt2.py"]).wandb_run_name == "mine"
    assert parse(["train_gpt2"]).wandb_run_name == "gpt2-124M"
    write("train_gpt2", "wandb_run_name = 'bare'")
    assert parse(["train_gpt2"]).wandb_run_name == "bare"


def test_a_folder_does_not_hide_the_preset_of_its_name():
    Path("train_gpt2").mkdir()
    assert parse(["train_gpt2"]).wandb_run_name == "gpt2-124M"


def test_a_config_that_is_not_there_is_told_the_presets_and_the_nearest():
    message = refusal(["config/train_gtp2.py"])
    assert "'train_gtp2', did you mean 'train_gpt2'?" in message
    assert all(name in message for name in PRESETS)


def test_a_config_that_cannot_be_read_is_one_line():
    Path("folder").mkdir()
    Path("latin.py").write_bytes(b"out_dir = '\xe9'")
    Path("nul.py").write_bytes(b"out_dir = 'a\0b'")
    write("long.py", "# " + "x" * 100_000)
    write("broken.py", "batch_size = 1\nbatch_size = = 2")
    assert "folder is a folder, no config file: a run's is named by --out_dir=folder" in refusal(
        ["folder"]
    )
    assert "latin.py: " in refusal(["latin.py"])
    assert "nul.py:" in refusal(["nul.py"])
    assert "longer than 100000 characters" in refusal(["long.py"])
    assert "broken.py:2: not valid Python: invalid syntax" in refusal(["broken.py"])


def test_a_config_file_with_a_line_break_in_its_name_is_still_told_in_one_line():
    assert refusal([write("a\nb.py", "import os")]).startswith("'a\\nb.py':1: only")


def test_a_config_file_may_start_with_a_byte_order_mark():
    Path("bom.py").write_bytes(b"\xef\xbb\xbfbatch_size = 7")
    assert parse(["bom.py"]).batch_size == 7


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("gradient_accumulation_steps = 5 * 8", "gradient_accumulation_steps", 40),
        ("n_layer = n_head = 3", "n_head", 3),
        ("n_head: int = 3", "n_head", 3),
        ("batch_size += 4", "batch_size", 16),
        ("lr_decay_iters = max_iters", "lr_decay_iters", 600000),
        ("max_iters = 77\nlr_decay_iters = max_iters", "lr_decay_iters", 77),
        ("_tokens = 2**15\nbatch_size = _tokens // block_size", "batch_size", 32),
        ("max_iters = 1e3", "max_iters", 1000),
        ("grad_clip = 1", "grad_clip", 1.0),
        ("min_lr = learning_rate / 10", "min_lr", 6e-4 / 10),
        ("batch_size = 7 % 4 + -(-2) - +1", "batch_size", 4),
        ("batch_size = 8 if block_size > 512 else 16", "batch_size", 8),
        ("eval_only = not compile", "eval_only", False),
        ("wandb_run_name = f'b{batch_size}-{learning_rate}'", "wandb_run_name", "b12-0.0006"),
        ("wandb_run_name = 'b' + str(batch_size)", "wandb_run_name", "b12"),
        ("batch_size = int('3') + round(2.4) + min(4, 5) + max(1, 2)", "batch_size", 11),
        ("max_iters = round(5, -1000000000)", "max_iters", 0),
        ("learning_rate = round(0.123456, 3)", "learning_rate", 0.123),
        ("'''docs'''\nimport time\n# comment\nbatch_size = 3", "batch_size", 3),
    ],
)
def test_a_config_file_may_hold_arithmetic(text, name, value):
    write("c.py", text)
    read = getattr(parse(["c.py"]), name)
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    "text",
    [
        "open('marker', 'w')",
        "__import__('os').system('touch marker')",
        "import os",
        "import time as t",
        "from os import system",
        "import os; os.system('touch marker')",
        "batch_size = [1 for _ in open('marker', 'w')]",
        "batch_size = (lambda: open('marker', 'w'))()",
        "@open\ndef f(): pass",
        "class A: x = open('marker', 'w')",
        "for i in range(3): batch_size = i",
        "if True: batch_size = 3",
        "with open('marker', 'w') as f: pass",
        "wandb_run_name = f'{open(1)}'",
        "wandb_run_name = f'{batch_size:99}'",
        "wandb_run_name = f'{batch_size!r}'",
        "wandb_run_name = str.format('{}', 1)",
        "wandb_run_name = ().__class__",
        "wandb_run_name = time.sleep(9)",
        "wandb_run_name = str(object=1)",
        "batch_size = max(*'ab')",
        "batch_size = undefined",
        "batch_size = 1j",
        "batch_size, n_layer = 1, 2",
        "batch_size.real = 1",
        "wandb_run_name = None",
        "wandb_run_name = b'bytes'",
        "del batch_size",
        "batch_size: int",
        "batch_size = (n_layer := 3)",
    ],
)
def test_a_config_file_is_never_executed(text):
    write("c.py", "batch_size = 2\n" + text)
    message = refusal(["c.py"])
    assert message.startswith(("c.py:2: only assignments of numbers, strings and", "c.py:3: "))
    assert message.endswith("nothing was executed")
    assert not Path("marker").exists()


def test_what_was_found_instead_of_an_assignment_is_named():
    write("c.py", "batch_size = 1\n\nopen('marker', 'w')")
    assert refusal(["c.py"]) == (
        "c.py:3: only assignments of numbers, strings and arithmetic on them are read from a "
        "config file (found a call of 'open'); nothing was executed"
    )


@pytest.mark.parametrize(
    "text",
    [
        "batch_size = 9**9**9",
        "batch_size = (-8)**0.5",
        "batch_size = 1 / 0",
        "batch_size = 'a' + 1",
        "batch_size = +'a'",
        "batch_size = round(0.5, 1" + "0" * 30 + ")",
        "batch_size = int('f' * 9, 16)",
        "batch_size = int('9' + 'x')",
        "batch_size = -" + "-" * 20_000 + "1",
        "batch_size = " + "(" * 5_000 + "1" + ")" * 5_000,
        "batch_size = " + "1+" * 20_000 + "1",
        "batch_size = " + "9" * 5_000,
        "_x = 'abcdefghij'\n" + "_x = _x + _x\n" * 50,
        "_x = 3\n" + "_x = _x * _x\n" * 50,
        "_x = '" + "x" * 9_000 + "'\nwandb_run_name = f'" + "{_x}" * 5_000 + "'",
    ],
)
def test_a_value_that_cannot_be_computed_or_is_too_big_is_one_line_and_soon(text):
    write("c.py", text)
    assert refusal(["c.py"]).startswith("c.py")


@pytest.mark.parametrize("text", ["'a' * 1000000000", "1000000000 * 'a'", "'%999999999d' % 5"])
def test_text_is_neither_repeated_nor_formatted(text):
    write("c.py", f"wandb_run_name = {text}")
    assert "bad operand type for unary +: 'str'" in refusal(["c.py"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("\nmax_itres = 5", "c.py:2: unknown key 'max_itres', did you mean 'max_iters'?"),
        ("learning_rate = 'high'", "learning_rate='high' is a str, it must be a float"),
        ("eval_only = 1", "c.py:1: eval_only=1 is an int, it must be a bool"),
        ("batch_size = True", "c.py:1: batch_size=True is a bool (True or False), it must be an"),
        ("batch_size = 1.5", "c.py:1: batch_size=1.5 is a float, it must be an int"),
        ("out_dir = 5", "c.py:1: out_dir=5 is an int, it must be a str"),
        ("learning_rate = 1e308 * 10", "learning_rate=inf is out of range"),
    ],
)
def test_a_wrong_key_or_value_in_a_config_file_is_named_with_its_line(text, told):
    write("c.py", text)
    assert told in refusal(["c.py"])


def test_names_that_start_with_an_underscore_are_not_keys():
    write("c.py", "_any = 3\nbatch_size = _any")
    assert parse(["c.py"]).batch_size == 3


# Presets


def test_the_presets_are_quickstart_and_nanogpts_seven():
    assert set(PRESETS) == {"quickstart", *NANOGPT_PRESETS}


@pytest.mark.parametrize("name", NANOGPT_PRESETS)
def test_a_preset_has_nanogpts_values_and_no_others(name):
    config, expected = parse([name]), NANOGPT_PRESETS[name]
    assert has(config, expected)
    changed = {k for k, v in dataclasses.asdict(TrainConfig()).items() if v != getattr(config, k)}
    assert changed <= {*expected, "wandb_run_name"}


def test_a_finetuning_run_is_named_after_the_time():
    name = parse(["finetune_shakespeare"]).wandb_run_name
    assert name.startswith("ft-")
    assert float(name.removeprefix("ft-")) > 1e9


def test_without_a_config_the_quickstart_preset_is_applied():
    assert parse([]) == parse(["quickstart"])
    assert has(parse([]), QUICKSTART)
    assert parse(["--max_iters=5"]).dataset == "pystdlib"


@pytest.mark.parametrize("name", NANOGPT_PRESETS)
def test_a_config_file_in_nanogpts_style_loads_unchanged(name):
    lines = ["# a comment", "import time", ""]
    lines += [f"{key} = {value!r} # why" for key, value in NANOGPT_PRESETS[name].items()]
    lines += ["gradient_accumulation_steps = 5 * 8", "", "wandb_run_name='ft-' + str(time.time())"]
    write("config/mine.py", "\n".join(lines))
    config = parse(["config/mine.py"])
    assert has(
        config,
        {**NANOGPT_PRESETS[name], "gradient_accumulation_steps": 40}
        | {"wandb_run_name": config.wandb_run_name},
    )
    assert config.wandb_run_name.startswith("ft-")


def test_nanogpts_readme_command_for_a_cpu_parses():
    config = parse(README_CPU)
    expected = {
        "out_dir": "out-shakespeare-char",
        "dataset": "shakespeare_char",
        "device": "cpu",
        "compile": False,
        "block_size": 64,
        "max_iters": 2000,
        "dropout": 0.0,
        "warmup_iters": 100,
        "always_save_checkpoint": False,
    }
    assert has(config, expected)


# Going on with a saved run


def test_resuming_needs_no_config_and_takes_that_of_the_run():
    save_run("run", dataset="mine", n_layer=3, max_iters=50)
    config = parse(["--init_from=resume", "--out_dir=run", "--max_iters=80"])
    assert has(config, {"dataset": "mine", "n_layer": 3, "max_iters": 80, "block_size": 1024})
    assert (config.init_from, config.out_dir) == ("resume", "run")
    assert parse(["--init_from=auto", "--out_dir=run"]).n_layer == 3


def test_a_saved_run_with_nothing_but_defaults_is_a_saved_run():
    write("run/config.json", "{}")
    resumed = TrainConfig(out_dir="run", init_from="resume")
    assert parse(["--init_from=resume", "--out_dir=run"]) == resumed


def test_a_config_named_when_resuming_lies_over_the_saved_run():
    save_run("run", dataset="mine", n_layer=3, weight_decay=0.3)
    write("c.py", "n_layer = 4\nout_dir = 'run'\ninit_from = 'resume'\nbatch_size = n_layer * 2")
    config = parse(["c.py", "--log_interval=9"])
    expected = {"n_layer": 4, "dataset": "mine", "weight_decay": 0.3, "log_interval": 9}
    assert has(config, {**expected, "batch_size": 8})


def test_a_config_file_sees_the_values_of_the_saved_run():
    save_run("run", max_iters=50)
    write("c.py", "lr_decay_iters = max_iters")
    assert parse(["c.py", "--init_from=resume", "--out_dir=run"]).lr_decay_iters == 50


def test_a_finished_quickstart_goes_on_with_its_own_config():
    first = parse(["--weight_decay=0.3"])
    write("out/config.json", json.dumps(dataclasses.asdict(first)))
    assert parse([]) == first


def test_quickstart_lies_over_a_saved_run_that_nobody_asked_for():
    save_run("out", dataset="mine", n_layer=3, weight_decay=0.3)
    config = parse([])
    assert has(config, {**QUICKSTART, "n_layer": 4, "weight_decay": 0.3})


def test_a_saved_run_is_ignored_when_starting_from_scratch():
    save_run("out", weight_decay=0.3)
    assert parse(["--init_from=scratch"]).weight_decay == 0.1
    assert parse(["train_gpt2"]).weight_decay == 0.1


def test_resuming_where_nothing_is_saved_leaves_quickstart():
    assert parse(["--init_from=resume", "--out_dir=none"]).dataset == "pystdlib"


def test_the_saved_run_may_have_been_moved_evaluated_and_written_by_a_later_version():
    saved = save_run("old", n_layer=3)
    saved.update(eval_only=True, init_from="gpt2", key_of_tomorrow=[1])
    write("new/config.json", json.dumps(saved))
    config = parse(["--init_from=resume", "--out_dir=new"])
    expected = {"n_layer": 3, "out_dir": "new", "eval_only": False, "init_from": "resume"}
    assert has(config, expected)
    write("out/config.json", json.dumps(saved))
    assert has(parse(["--init_from=resume"]), {**expected, "out_dir": "out"})


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "3", "null", "\x00", "[" * 20_000, '{"n_layer": 1' + "0" * 5000 + "}"]
)
def test_a_damaged_saved_config_is_one_line(text):
    write("run/config.json", text)
    message = refusal(["--init_from=resume", "--out_dir=run"])
    assert "run/config.json' is not a saved run" in message
    assert message.endswith("use another --out_dir")


def test_a_saved_value_of_a_wrong_type_is_named():
    write("run/config.json", '{"learning_rate": "high"}')
    message = refusal(["--init_from=resume", "--out_dir=run"])
    assert message == "run/config.json: learning_rate='high' is a str, it must be a float"
    write("run/config.json", '{"learning_rate": 1' + "0" * 400 + "}")
    assert "must be a float" in refusal(["--init_from=resume", "--out_dir=run"])


# The other commands


@pytest.mark.parametrize("kind", [SampleConfig, EvalConfig])
def test_sampling_and_evaluating_take_the_out_dir_of_a_training_config(kind):
    config = parse(["config/train_shakespeare_char.py"], kind)
    assert config.out_dir == "out-shakespeare-char"
    config = parse(["quickstart"], kind)
    assert (config.out_dir, config.init_from) == ("out", "resume")


def test_a_training_config_given_to_sampling_is_still_checked():
    write("c.py", "n_layer = 'three'")
    assert "c.py:1: n_layer='three' is a str" in refusal(["c.py"], SampleConfig)
    write("c.py", "n_leyer = 3")
    assert "did you mean 'n_layer'?" in refusal(["c.py"], SampleConfig)


def test_a_config_file_may_set_what_is_sampled():
    write("c.py", "start = 'auto'\ntop_k = 5\ndevice = 'cpu'\ninit_from = 'gpt2'")
    config = parse(["c.py", "--top_k=6"], SampleConfig)
    assert has(config, {"start": "auto", "top_k": 6, "device": "cpu", "init_from": "gpt2"})


def test_sampling_and_evaluating_apply_no_preset_and_no_saved_config():
    save_run("out", seed=5, device="cpu", batch_size=3)
    assert parse([], SampleConfig) == SampleConfig()
    assert parse([], EvalConfig) == EvalConfig()
    assert parse(["--init_from=resume"], SampleConfig) == SampleConfig()


# What is printed


@pytest.mark.parametrize(("columns", "width"), [("80", 80), ("300", 100), ("", 80)])
@pytest.mark.parametrize("kind", [TrainConfig, SampleConfig, EvalConfig, PlanConfig, TrainBench])
def test_help_lists_every_key_with_its_default_in_whole_words_that_fit(
    kind, columns, width, monkeypatch
):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "__stdout__", None)  # what is not said is not known
    text = usage(kind)
    assert text.startswith(f"usage: {kind.command} [CONFIG ...] [--key=value ...]\n")
    assert all(name in text for name in PRESETS)
    assert width - 10 <= max(map(len, text.splitlines())) <= width
    entries = dict(re.findall(r"^  --(\w+)=(.*(?:\n {37}.*)*)", text, re.MULTILINE))
    for f in dataclasses.fields(kind):
        said = " ".join(entries[f.name].split())
        assert str(f.default).strip() in said
        choices = f" ({f.metadata['choices']})" if "choices" in f.metadata else ""
        assert said.endswith(" " + f.metadata["help"] + choices)
    assert "--start='\\n'" in text or kind is not SampleConfig


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_printed_wherever_it_is_asked_for(flag, capsys):
    for argv in ([flag], ["--no_such=1", "no_such.py", flag]):
        with pytest.raises(SystemExit) as caught:
            parse(argv)
        assert caught.value.code == 0
        assert capsys.readouterr().out == usage(TrainConfig) + "\n"


def test_keys_that_mean_something_else_here_are_noted():
    assert notes(TrainConfig()) == notes(SampleConfig()) == notes(EvalConfig()) == []
    assert notes(TrainConfig(compile=False, backend="gloo")) == [
        "compile=False: JAX always compiles; nothing to switch off",
        "backend=gloo: JAX picks the transport itself (NCCL on GPUs, ICI on TPUs)",
    ]
    assert len(notes(SampleConfig(compile=False))) == 1


def test_a_config_prints_as_its_changed_keys_in_100_columns():
    assert compact(TrainConfig()) == ""
    assert compact(TrainConfig(n_layer=3, out_dir="a b")) == "out_dir='a b' n_layer=3"
    text = compact(parse(README_CPU))
    assert max(map(len, text.splitlines())) <= 100
    assert "warmup_iters=100" in text
    assert "n_layer=4" in text


def test_no_config_is_evaluated_as_python():
    folder = Path(config_module.__file__).parent
    for path in (folder / "config.py", *(folder / "commandline").glob("*.py")):
        text = path.read_text()
        assert not any(word in text for word in (" eval(", " exec(", "pickle", "import_module"))


def test_a_deterministic_run_has_no_attention_of_cudnns():
    """Its backward pass has XLA of JAX 0.11.2 fail when it is to be deterministic (IndexError)."""
    config, network = TrainConfig(deterministic=True), GPTConfig()
    assert config.model_config(50304, "bfloat16").attention == "reference"
    assert config.continued(network).attention == "reference"
    assert config.attention == "auto"  # a run that goes on without the flag has what it had
    xla = TrainConfig(deterministic=True, attention="xla")
    assert xla.continued(network).attention == "xla"
    with pytest.raises(UserError, match="not deterministic: use --attention=auto"):
        TrainConfig(deterministic=True, attention="cudnn", dtype="bfloat16")
