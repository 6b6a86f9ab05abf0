"""Whatever is typed or written in a config file: a config, or one line that says what is wrong."""

import contextlib
import io
import json
import os
import time
from dataclasses import fields

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gpt_jax.bench.config import DecodeBench, TrainBench
from gpt_jax.commandline.files import PRESETS
from gpt_jax.config import Checked, SampleConfig, TrainConfig, parse
from gpt_jax.errors import UserError
from gpt_jax.evaluate import EvalConfig
from gpt_jax.plan import PlanConfig

COMMANDS = (TrainConfig, SampleConfig, EvalConfig, PlanConfig, TrainBench, DecodeBench)
KINDS = st.sampled_from(COMMANDS)
KEYS = sorted({f.name for kind in COMMANDS for f in fields(kind)})
LONGEST = 1.0  # seconds of CPU that any one input may take
FUZZ = settings(
    max_examples=500,  # of each of three tests: C25 asks for 1,000 in all
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)

texts = st.text(max_size=12)  # of any characters: NUL, line breaks and lone surrogates too
numbers = st.one_of(st.integers().map(str), st.floats().map(str), st.integers(0, 400).map(str))
words = st.sampled_from(["", "True", "false", "auto", "resume", "cudnn", "cuda:0", "1e3", "1e999"])
values = st.one_of(numbers, words, texts)
keys = st.one_of(st.sampled_from(KEYS), st.sampled_from(KEYS).map(lambda k: k[1:]), texts)
items = st.one_of(
    st.builds("--{}={}".format, keys, values),
    st.builds("--{}".format, keys),
    st.sampled_from([*PRESETS, "config/train_gpt2.py", "-h", "--help", "", "-", "--", ".", "/"]),
    st.just("fuzz.py"),
    texts,
)

atoms = st.one_of(numbers, texts.map(repr), st.sampled_from(KEYS), words, texts)
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.builds(
            "({} {} {})".format,
            inner,
            st.sampled_from(["+", "-", "*", "/", "//", "%", "**", "<", "==", "<<", "and", "@"]),
            inner,
        ),
        st.builds("{}({})".format, st.sampled_from(["int", "str", "round", "open", "-"]), inner),
        st.builds("round({}, {})".format, inner, inner),
        st.builds("time.strftime({})".format, inner),
        st.builds("({} if {} else {})".format, inner, inner, inner),
        st.builds("f'{{{}}}'".format, inner),
        st.builds("[{}, {}]".format, inner, inner),
    ),
    max_leaves=8,
)
statements = st.one_of(
    st.builds("{} = {}".format, keys, expressions),
    st.builds(
        "{} {} {}".format, keys, st.sampled_from(["+=", "**=", ": int =", ":="]), expressions
    ),
    st.sampled_from(
        ["import time", "import os", "pass", "'''docs'''", "#", "if 1:\n  n_layer = 2"]
    ),
    expressions,
    texts,
)


@pytest.fixture(scope="module", autouse=True)
def in_a_folder_of_its_own(tmp_path_factory):
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("fuzz"))
    yield
    os.chdir(before)


def write(path: str, text: str) -> None:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w", encoding="utf-8", errors="surrogatepass", newline="") as file:
        file.write(text)


def holds(argv: list[str], kind: type[Checked]) -> None:
    began = time.process_time()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            config = parse(argv, kind)
    except UserError as error:
        message = str(error)
        assert message
        assert len(message.splitlines()) == 1
        assert message.isprintable()  # so no terminal chokes on it
        assert len(message) < 600
    except SystemExit:
        assert {"-h", "--help"} & set(argv)
    else:
        assert type(config) is kind
    assert time.process_time() - began < LONGEST


@FUZZ
@given(st.lists(items, max_size=4), KINDS)
def test_any_command_line_gives_a_config_or_one_line(argv, kind):
    write("fuzz.py", "batch_size = 2")
    holds(argv, kind)


@FUZZ
@given(st.lists(statements, max_size=5).map("\n".join), KINDS)
@example("out_dir = 'a\\0b'\ninit_from = 'resume'", TrainConfig)
@example("out_dir = '\\ud800'\ninit_from = 'auto'", TrainConfig)
@example("wandb_run_name = '\\d'", TrainConfig)
@example("wandb_run_name = time.strftime('\\0\\ud800%')", TrainConfig)
def test_any_config_file_gives_a_config_or_one_line(text, kind):
    write("fuzz.py", text)
    holds(["fuzz.py"], kind)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(texts, inner)),
    max_leaves=4,
)


@FUZZ
@given(st.one_of(st.dictionaries(keys, json_values, max_size=4), json_values), texts)
def test_any_saved_config_gives_a_config_or_one_line(saved, damage):
    write("run/config.json", json.dumps(saved) + damage[:1])
    holds(["--init_from=resume", "--out_dir=run"], TrainConfig)
