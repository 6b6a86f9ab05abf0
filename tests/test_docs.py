"""What README.md and docs/ say: their commands are run, their keys and links are there.

A page is a session: its blocks are run in order, in one folder, in this process. Where a block
cannot be, a comment just before it says what it needs, and it is only parsed:

    <!-- needs WHAT -->                no line of the block is run
    <!-- needs WHAT: TEXT, TEXT -->    the lines that hold one of the texts are not run
    <!-- file NAME -->                 the block is a file, written for the commands after it

So that a page takes seconds, some of what it says is made smaller: `train.py` gets TINY's flags
after its own and two iterations more each time, and `sample.py` writes a few tokens. Data sets that
a page does not prepare are there, and so is a trained run in `out`, with nanoGPT's ckpt.pt beside
it.
"""

import ast
import contextlib
import importlib
import itertools
import os
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from unittest.mock import patch

import jax
import pytest
from test_interop_nanogpt_checkpoint import write_letters

import sample
import train
from gpt_jax.bench import VERBS
from gpt_jax.bench.config import configured
from gpt_jax.config import SampleConfig, parse
from gpt_jax.errors import UserError
from gpt_jax.evaluate import EvalConfig
from gpt_jax.export import ExportConfig
from gpt_jax.plan import PlanConfig
from gpt_jax.plot import PlotConfig
from gpt_jax.prepare import prepare
from gpt_jax.prepare.__main__ import FLAGS
from gpt_jax.prepare.__main__ import main as prepare_main
from gpt_jax.sharding import LAYOUT

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
LINKED = [*PAGES, *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "SECURITY", "CHANGELOG"))]
TINY = ["--n_layer=1", "--n_head=4", "--n_embd=16", "--block_size=64", "--batch_size=4",
        "--gradient_accumulation_steps=2"]  # fmt: skip
SHORT = [
    "--eval_iters=1",
    "--eval_interval=1000",
    "--log_interval=1",
    "--sample_tokens=0",
    "--wandb_log=False",
]
FEW = ["--num_samples=2", "--max_new_tokens=4"]
MARK = re.compile(r"<!-- (needs|file) ([^:>]+?)(?:: ([^>]+?))? -->")
CI = ("<!-- quickstart -->", "<!-- test -->")  # .ci/run, or a user's first minute, runs these
# programs of others in blocks that need what they are of, and flags of theirs
PROGRAMS = {
    "bash",
    "cd",
    "export",
    "git",
    "jupyter",
    "kubectl",
    "nc",
    "pytest",
    "sbatch",
    "scancel",
    "tensorboard",
    "unset",
}
THEIR_FLAGS = {
    "gpu-bind", "gpus-per-node", "gpus-per-task", "nnodes", "node_rank", "nproc_per_node", "prefix",
    "ntasks-per-node", "master_addr", "logdir", "seed", "rounds", "signal", "standalone",
}  # fmt: skip
# commands are run as __main__, some of which a test has imported
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules after import:RuntimeWarning")


@pytest.fixture(autouse=True, scope="module")
def compiled_in_haste():
    jax.config.update("jax_disable_most_optimizations", True)  # half the time
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def name(path):
    return path.stem


def blocks(path):
    """Yield (language, the comments before, text, line) of each fenced block."""
    lines = iter(enumerate(path.read_text("utf-8").splitlines(), 1))
    before = []
    for number, line in lines:
        if line.startswith("```"):
            inside = []
            for _, text in lines:
                if text.startswith("```"):
                    break
                inside.append(text)
            yield line[3:].strip(), before, "\n".join(inside), number
            before = []
        elif line.startswith("<!--"):
            before.append(line)
        else:
            before = []


def commands(text):
    """Return the commands of a block of sh, a list of words each, with its line of text."""
    lines = text.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in re.split(r" && ", line)]
    return [(words, part) for part in parts if (words := shlex.split(part, comments=True))]


def is_needy(line, marks):
    texts = [text.split(", ") if text else [""] for kind, _, text in marks if kind == "needs"]
    return any(part in line for parts in texts for part in parts)


def bare(words):
    """Return a command without the settings of its environment, and without `time`."""
    settings = itertools.takewhile(lambda word: "=" in word or word == "time", words)
    return words[len(list(settings)) :]


def understood(words):
    """Parse a command by its own parser; an error for what it does not know."""
    program, *arguments = bare(words)
    if program == "python" and arguments[0] == "-m":
        _, module, *arguments = arguments
        module = module.removeprefix("gpt_jax.")
        if "--help" in arguments:
            return
        if module == "prepare":
            with patch.dict(prepare_main.__globals__, prepare=lambda *_, **__: None):
                prepare_main(arguments)
        elif module == "bench":
            verb, *arguments = arguments
            configured(arguments, VERBS[verb])
        elif module in ("evaluate", "plan"):
            parse(arguments, {"evaluate": EvalConfig, "plan": PlanConfig}[module])
        elif module == "export":
            parse([word for word in arguments if word.startswith("--")], ExportConfig)
        else:
            assert module == "plot"
    elif program == "python":
        script, *arguments = arguments
        if "--help" in arguments:
            return
        if script in ("train.py", "sample.py"):
            parse(arguments, SampleConfig) if script == "sample.py" else parse(arguments)
        else:
            assert (ROOT / script).is_file(), script
    elif program == "pip":
        assert arguments[0] == "install"
    else:
        assert program in PROGRAMS, program
        for word in words:
            assert not word.startswith("docs/") or (ROOT / word).is_file(), word


class Session:
    """A reader who follows a page."""

    def __init__(self):
        self.iterations = 2  # what `out` has

    def run(self, words):
        if words[0] == "export":
            key, value = words[1].split("=", 1)
            assert value in os.environ[key], "conftest.py has set what a test process can be told"
            return
        program, *arguments = bare(words)
        assert program == "python", words
        if arguments[0] == "train.py" and "--help" not in arguments:
            self.iterations += 2
            theirs = any(word.endswith(".pt") for word in arguments)  # its sizes are its own
            start = 20 if theirs else 0  # tests/reference/ckpt_nobias.pt's
            arguments += [*SHORT, f"--max_iters={start + self.iterations}"]
            arguments += [] if theirs else TINY
            if not any(re.match("--(data|fsdp|tensor)=", word) for word in arguments):
                arguments.append("--data=1")  # one device's programs compile sooner
        elif arguments[0] == "sample.py":
            arguments += FEW
        elif arguments[:2] == ["-m", "gpt_jax.prepare"]:
            called = [word for word in arguments if word.startswith("--name=")]
            folder = called[0].removeprefix("--name=") if called else arguments[2]
            shutil.rmtree(Path("data", folder), ignore_errors=True)
        assert self.code(arguments) == 0, words

    @staticmethod
    def code(arguments):
        with patch.dict(os.environ), patch.object(sys, "argv", arguments):
            try:
                if arguments[0] != "-m":
                    return {"train.py": train, "sample.py": sample}[arguments[0]].main()
                with patch.object(sys, "argv", arguments[1:]):
                    runpy.run_module(arguments[1], run_name="__main__")
            except SystemExit as exit:
                return exit.code or 0
        return 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with data sets, texts, and a run."""
    path = tmp_path_factory.mktemp("docs")
    text = "".join(f"line {i}: to be, or not to be, that is the question.\n" for i in range(300))
    with contextlib.chdir(path):
        for place in ("my_texts/a.txt", "books/a.txt", "code/a.txt", "a.txt", "b.md", "input.txt"):
            Path(place).parent.mkdir(exist_ok=True)
            Path(place).write_text(text, "utf-8")
        Path("more.jsonl").write_text('{"text": "to be, or not to be"}\n' * 200, "utf-8")
        for dataset, tokenizer in [
            ("pystdlib", "byte"), ("openwebtext", "byte"), ("shakespeare_char", "char"),
            ("text", "char"), ("fineweb_edu", "byte"),
        ]:  # fmt: skip
            prepare("text", Path("data", dataset), input="a.txt", tokenizer=tokenizer, log=str)
        write_letters()
        assert Session.code(["train.py", *TINY, *SHORT, "--max_iters=2", "--data=1"]) == 0
        shutil.copy(ROOT / "tests/reference/ckpt_nobias.pt", "out/ckpt.pt")
    return path


@pytest.fixture
def work(folder, tmp_path, monkeypatch):
    """A copy of that folder to work in."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_every_command_block_of_a_page_runs_or_says_what_it_needs(path, work, capsys):
    session = Session()
    for language, before, text, line in blocks(path):
        marks = MARK.findall("\n".join(before))
        files = [what for kind, what, _ in marks if kind == "file"]
        if files:
            Path(files[0]).write_text(text + "\n", "utf-8")
        elif language == "python":
            if not marks:
                exec(compile(text, f"{path.name}:{line}", "exec"), {})
            ast.parse(text)
        elif language == "sh":
            for words, said in commands(text):
                understood(words)
                if not is_needy(said, marks) and bare(words)[0] != "pip" and CI[1] not in before:
                    session.run(words)


def test_a_block_is_told_from_its_fence_comments_and_language(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "a\n<!-- needs a GPU: --x, y z -->\n```sh\none \\\n  two  # why\n```\n```\n$\n```\n"
    )
    (language, before, text, line), (other, none, _, _) = blocks(page)
    assert (language, line, other, none) == ("sh", 3, "", [])
    assert commands(text) == [(["one", "two"], "one    two  # why")]
    marks = MARK.findall(before[0])
    assert marks == [("needs", "a GPU", "--x, y z")]
    assert is_needy("a --x=1", marks)
    assert is_needy("y z", marks)
    assert not is_needy("y", marks)
    assert is_needy("y", MARK.findall("<!-- needs a GPU -->"))


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_what_a_block_is_said_to_need_is_in_it(path):
    for language, before, text, line in blocks(path):
        where = f"{path.name}:{line}"
        for comment in before:
            assert MARK.fullmatch(comment) or not re.match("<!-- (needs|file|run)", comment), where
        for _, _, parts in MARK.findall("\n".join(before)):
            for part in filter(None, parts.split(", ")):
                assert part in text, f"{where}: {part}"
        assert language in ("sh", "python", "text", ""), f"{where}: {language}"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_commands_in_running_text_are_understood(path, work):
    for said in spans(path):
        if re.match(r"(time )?python (train\.py|sample\.py|-m gpt_jax\.)", said):
            if re.search(r"\[|\.\.\.|…|\||[A-Z]{4,} |gpt_jax\.[^a-z]", said + " "):
                continue  # a form, not a command
            if not re.fullmatch(r"python -m gpt_jax\.\w+", said):
                understood(shlex.split(said))


def test_an_error_that_is_shown_is_the_one_that_comes(work):
    shown = []
    for path in PAGES:
        for language, _, text, _ in blocks(path):
            if language == "text":
                shown += re.findall(r"^\$ (python .*)\nerror: (.*)$", text, re.MULTILINE)
    assert shown
    for command, error in shown:
        with pytest.raises(UserError, match=f"^{re.escape(error)}$"):
            understood(shlex.split(command))


@pytest.mark.parametrize("path", LINKED, ids=name)
def test_every_flag_that_is_named_exists(path):
    kinds = [SampleConfig, EvalConfig, ExportConfig, PlanConfig, PlotConfig, *VERBS.values()]
    known = {f.name for kind in kinds for f in fields(kind)} | set(FLAGS) | {"key", "flag"}
    text = re.sub(r"^\$ .*\nerror: ", "", path.read_text("utf-8"), flags=re.MULTILINE)
    named = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9_-]*)", text))
    named = {flag for flag in named if not flag.startswith("xla_")}
    assert named - known <= THEIR_FLAGS


@pytest.mark.parametrize("path", LINKED, ids=name)
def test_every_extra_that_is_named_exists(path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    named = re.findall(r"(?:gpt_jax|\"\.)\[([\w,]+)\]", path.read_text("utf-8"))
    assert {extra for names in named for extra in names.split(",")} <= {
        *project["optional-dependencies"]
    }


def test_every_extra_is_named_where_users_look_for_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    text = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
    [listed] = re.findall(r"Extras: (.*?)\. The tests", text, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", listed)) == {*project["optional-dependencies"]}


def without_code(path):
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.S))


def spans(path):
    text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def anchors(path):
    """Return what a heading is linked by, on GitHub."""
    text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
    titles = [re.sub(r"[`*]", "", title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", LINKED, ids=name)
def test_every_link_within_the_repository_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path)):
        if re.match(r"https?:|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        to = (path.parent / file).resolve() if file else path
        assert to.exists(), f"{path.name}: {target}"
        assert not anchor or anchor in anchors(to), f"{path.name}: {target}"


def test_every_name_of_the_api_page_is_there():
    for path in re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text("utf-8"), re.MULTILINE):
        module, _, thing = path.rpartition(".")
        assert hasattr(importlib.import_module(module), thing), path


def test_the_table_of_keys_is_current():
    page = runpy.run_path(str(ROOT / "docs/keys.py"))["page"]
    text = (ROOT / "docs/configuration.md").read_text("utf-8")
    assert page(text) == text, "run: python docs/keys.py"


def test_every_command_has_its_keys_on_the_page():
    text = (ROOT / "docs/configuration.md").read_text("utf-8")
    module = runpy.run_path(str(ROOT / "docs/keys.py"))
    assert set(re.findall("<!-- keys: (.*) -->", text)) == {*module["KINDS"], *module["HELPS"]}
    for f in fields(SampleConfig):
        assert f"| `{f.name}` | `{f.default!r}` |" in text


def test_the_picture_of_the_house_is_current():
    picture = runpy.run_path(str(ROOT / "docs/house.py"))["picture"]
    assert (ROOT / "docs/house.svg").read_text("utf-8") == picture(), "run: python docs/house.py"


def test_the_table_of_layouts_is_that_of_the_code():
    rows = re.findall(
        r"^\| `(\S+/weight)`[^|]* \| \((.*?)\) \| (.*?) \|$",
        (ROOT / "docs/sharding.md").read_text("utf-8"),
        re.MULTILINE,
    )
    assert len(rows) == 7
    for leaf, axes, cuts in rows:
        assert axes == ", ".join(LAYOUT[leaf])
        assert cuts == ", ".join(f"{axis}: {cut}" for axis, cut in LAYOUT[leaf].items() if cut)


def test_every_folder_of_the_package_is_told_of():
    text = (ROOT / "docs/how_it_works.md").read_text("utf-8")
    folders = {path.parent.name for path in (ROOT / "gpt_jax").glob("*/*.py")}
    assert {folder for folder in folders if f"`{folder}/`" not in text} == set()


def test_the_page_of_the_notebooks_has_those_that_are_there():
    there = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    named = set(re.findall(r"\w+\.ipynb", (ROOT / "docs/notebooks.md").read_text("utf-8")))
    assert there <= named
