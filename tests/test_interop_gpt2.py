"""GPT-2 of Hugging Face's: its logits, its names, what is not GPT-2, what is read of its files.

tests/reference/hugging_face holds models that transformers 5.24 made on torch 2.14, each by

    torch.manual_seed(i); model = GPT2LMHeadModel(GPT2Config(...)).eval(), then 0.2 * randn_like
    added to each parameter, .to(dtype), save_pretrained (of "sharded" with max_shard_size="16KB"),
    and logits.npz: tokens by np.random.default_rng(i), and the float32 logits of model.float().
"""

import json
import os
import shutil
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiktoken
from jax.sharding import PartitionSpec

import train
from gpt_jax import load
from gpt_jax.config import GPTConfig
from gpt_jax.errors import UserError
from gpt_jax.interop import gpt2, safetensors_file
from gpt_jax.interop.nanogpt import from_state_dict, to_state_dict
from gpt_jax.model import GPT, count_params
from gpt_jax.sharding import make_mesh
from gpt_jax.tokenizer import tiktoken_tokenizer

REFERENCE = Path(__file__).parent / "reference" / "hugging_face"
MODELS = sorted(path.name for path in REFERENCE.iterdir())
CONFIG = GPTConfig(
    n_layer=2, n_head=2, n_embd=8, block_size=6, vocab_size=11, bias=True, activation="gelu_tanh"
)
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 6, "vocab_size": 11}
ONE = make_mesh(devices=jax.local_devices()[:1])
# as OpenAI's repositories on the hub have it, but for the sizes
OPENAIS = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
    "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12,
    "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}  # fmt: skip


def hugging_face(config=CONFIG):
    """Return arrays named and shaped as GPT2Model's: Conv1D holds (in, out)."""
    C, rng = config.n_embd, np.random.default_rng(0)
    shapes = {"wte.weight": (config.vocab_size, C), "wpe.weight": (config.block_size, C)}
    for i in range(config.n_layer):
        for name, shape in {
            "ln_1": (C,),
            "attn.c_attn": (C, 3 * C),
            "attn.c_proj": (C, C),
            "ln_2": (C,),
            "mlp.c_fc": (C, 4 * C),
            "mlp.c_proj": (4 * C, C),
        }.items():
            shapes[f"h.{i}.{name}.weight"] = shape
            shapes[f"h.{i}.{name}.bias"] = shape[-1:]
    shapes |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}
    return {name: np.float32(rng.normal(0, 0.5, shape)) for name, shape in shapes.items()}


def params_of(arrays, config=CONFIG):
    """The parameters that tensors of these names and values are read as, as numpy arrays."""
    whole = (slice(None),) * 5
    return jax.tree.map(lambda x: x[whole[: len(x.shape)]], gpt2.unread(arrays, config, Path("x")))


def save(folder, arrays=None, **config):
    """Write a folder of Hugging Face's."""
    folder.mkdir(parents=True)
    text = json.dumps({"model_type": "gpt2", **SIZES, **config})
    (folder / "config.json").write_text(text)
    arrays = hugging_face() if arrays is None else arrays
    safetensors_file.write(folder / "model.safetensors", arrays, "float32", {})
    return folder


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(
        jax.tree.map(np.array_equal, a, b)
    )


# ---- what it computes


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_transformers(name):
    model, params = gpt2.load_network(REFERENCE / name, "float32", ONE)
    reference = np.load(REFERENCE / name / "logits.npz")
    logits = jax.jit(model.apply)({"params": params}, reference["tokens"])
    np.testing.assert_allclose(logits, reference["logits"], rtol=0, atol=1e-5)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_the_references_are_of_both_activations_each_dtype_and_in_one_file_or_several():
    configs = {n: json.loads((REFERENCE / n / "config.json").read_text()) for n in MODELS}
    assert {c["activation_function"] for c in configs.values()} == set(gpt2.ACTIVATIONS)
    assert {c["dtype"] for c in configs.values()} == {"float32", "float16", "bfloat16"}
    assert len(list((REFERENCE / "sharded").glob("model-*.safetensors"))) > 2


# ---- names and layouts


def test_conv1d_weights_are_taken_as_they_are():  # M15
    arrays, params = hugging_face(), params_of(hugging_face())
    for i in range(2):
        layer = jax.tree.map(lambda x: x[i], params["h"])  # noqa: B023
        for module, name in (("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"),
                             ("mlp", "c_proj")):  # fmt: skip
            for kind in ("weight", "bias"):
                theirs = arrays[f"h.{i}.{module}.{name}.{kind}"]
                np.testing.assert_array_equal(layer[module][name][kind].ravel(), theirs.ravel())
    # q, k and v lie one after another, and in each head after head
    c_attn, theirs = params["h"]["attn"]["c_attn"]["weight"], arrays["h.1.attn.c_attn.weight"]
    for j, head in np.ndindex(3, 2):
        start = 8 * j + 4 * head
        np.testing.assert_array_equal(c_attn[1, :, j, head], theirs[:, start : start + 4])


def test_they_are_nanogpts_weights_transposed():  # M15
    arrays = hugging_face()
    transposed = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight",
                  "mlp.c_proj.weight")  # fmt: skip
    nanogpt = {
        f"transformer.{name}": x.T if name.endswith(transposed) else x for name, x in arrays.items()
    }
    params = params_of(arrays)
    assert same(params, from_state_dict(nanogpt, CONFIG))
    back = to_state_dict(params)
    assert {name: x.tobytes() for name, x in nanogpt.items()} == {
        name: back[name].tobytes() for name in nanogpt
    }


def test_the_shapes_are_those_of_the_network():
    for config in (CONFIG, GPTConfig(n_layer=3, n_head=3, n_embd=12, block_size=5, vocab_size=7)):
        tokens = jnp.zeros((1, 1), jnp.int32)
        expected = jax.eval_shape(GPT(config).init, jax.random.key(0), tokens)["params"]
        found = gpt2.unread(hugging_face(config), config, Path("x"))
        assert jax.tree.map(lambda x: x.shape, found) == jax.tree.map(lambda x: x.shape, expected)


def test_names_of_the_whole_model_are_taken_too():
    plain = hugging_face()
    named = {f"transformer.{name}": x for name, x in plain.items()}
    named["lm_head.weight"] = plain["wte.weight"]
    assert same(params_of(named), params_of(plain))


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_masks_are_ignored(prefix):  # M15
    arrays = {f"{prefix}{name}": x for name, x in hugging_face().items()}
    masks = {}
    for i in range(2):
        masks[f"{prefix}h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 6, 6), bool))
        masks[f"{prefix}h.{i}.attn.masked_bias"] = np.float32(-1e4)
    assert same(params_of({**arrays, **masks}), params_of(arrays))


def without(name):
    return {key: x for key, x in hugging_face().items() if key != name}


WTE = hugging_face()["wte.weight"]
WRONG = {
    "one is missing": (without("h.1.mlp.c_fc.bias"), r"has no 'h\.1\.mlp\.c_fc\.bias', which its"),
    "one is unknown": ({**hugging_face(), "score.w": WTE}, r"has 'score\.w', which is"),
    "a layer more": ({**hugging_face(), "h.2.ln_1.w": WTE}, r"has 'h\.2\.ln_1\.w', which is"),
    "another shape": ({**hugging_face(), "wte.weight": WTE[1:]},
                      r"'wte\.weight' has shape \(10, 8\), its config\.json says \(11, 8\)"),
    "transposed": ({**hugging_face(), "h.0.mlp.c_fc.weight": np.zeros((32, 8), np.float32)},
                   r"has shape \(32, 8\), its config\.json says \(8, 32\)"),
    "integers": ({**hugging_face(), "wpe.weight": np.zeros((6, 8), np.int8)},
                 "holds int8, and weights are float32, float16 or bfloat16"),
    "doubles": ({**hugging_face(), "wpe.weight": np.zeros((6, 8))}, "holds float64"),
    "with and without the prefix": ({**hugging_face(), "transformer.wte.weight": WTE},
                                    "with and without 'transformer.'"),
    "a head of its own": ({**hugging_face(), "lm_head.weight": WTE + 1}, "they must be tied"),
    "a head of another dtype": ({**hugging_face(), "lm_head.weight": WTE.astype("f2")}, "tied"),
    "a head whose last row differs": (
        {**hugging_face(), "lm_head.weight": np.r_[WTE[:-1], WTE[-1:] + 1]}, "tied"),
    "nothing": ({}, "has 0 tensors, too few for n_layer=2"),
    "a name of two lines": ({**hugging_face(), "a\nb": WTE}, r"has 'a\\nb', which is no parameter"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_tensors_that_are_not_its_configs_are_refused_by_name(name):
    arrays, said = WRONG[name]
    with pytest.raises(UserError, match=said) as error:
        gpt2.unread(arrays, CONFIG, Path("x"))
    assert str(error.value).isprintable()


def test_a_claim_of_two_billion_layers_is_refused_at_once():
    config = GPTConfig(**{**vars(CONFIG), "n_layer": 2**31 - 1})
    with pytest.raises(UserError, match="has 28 tensors, too few for n_layer=2147483647"):
        gpt2.unread(hugging_face(), config, Path("x"))


# ---- config.json


@pytest.mark.parametrize(
    ("name", "sizes", "total", "reported"),
    [
        ("gpt2", (12, 12, 768), 124_439_808, 123_653_376),
        ("gpt2-medium", (24, 16, 1024), 354_823_168, 353_774_592),
        ("gpt2-large", (36, 20, 1280), 774_030_080, 772_719_360),
        ("gpt2-xl", (48, 25, 1600), 1_557_611_200, 1_555_972_800),
        ("distilgpt2", (6, 12, 768), 81_912_576, 81_126_144),
    ],
)
def test_openais_sizes_have_their_parameter_counts(tmp_path, name, sizes, total, reported):  # M15
    changed = dict(zip(("n_layer", "n_head", "n_embd"), sizes, strict=True))
    (tmp_path / "config.json").write_text(json.dumps({**OPENAIS, **changed}))
    config = gpt2.read_config(tmp_path / "config.json", "bfloat16")
    assert (config.vocab_size, config.block_size, config.bias) == (50257, 1024, True)
    assert (config.activation, config.dtype, config.dropout) == ("gelu_tanh", "bfloat16", 0.0)
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(GPT(config).init, jax.random.key(0), tokens)["params"]
    assert count_params(params, non_embedding=False) == total
    assert count_params(params) == reported
    assert name in gpt2.HUB


def test_what_a_config_leaves_out_is_as_gpt2config_has_it(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    config = gpt2.read_config(tmp_path / "config.json", "float32")
    assert config == GPTConfig(vocab_size=50257, activation="gelu_tanh")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model_type": "llama"},
            "model_type='llama', and this network is GPT-2 with model_type='g",
        ),
        ({"model_type": None}, "model_type=None"),
        ({"activation_function": "relu"}, "activation_function='relu', .*='gelu_new' or"),
        ({"activation_function": ["gelu"]}, r"activation_function=\['gelu'\]"),
        (
            {"layer_norm_epsilon": 1e-6},
            "layer_norm_epsilon=1e-06, .* with layer_norm_epsilon=1e-05",
        ),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False, .* with tie_.*=True"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads="),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"n_inner": 16}, "n_inner=16, .* with n_inner=None or 32"),
        ({"n_ctx": 5}, "n_ctx=5, .* with n_ctx=None or 6"),
        ({"n_embd": 9}, "n_embd=9 is not a multiple of n_head=2"),
        ({"n_embd": "x"}, "n_embd='x' is a str"),
        ({"n_layer": 0}, "n_layer=0 is out of range"),
        ({"n_head": 2**40}, "n_head=1099511627776 is out of range"),
        ({"vocab_size": None}, "vocab_size=None is NoneType"),
        ({"n_positions": 1.5}, "block_size=1.5 is a float"),
        ({"n_layer": 10**9}, "too few for n_layer=1000000000"),
        ({"vocab_size": 2**31 - 1}, r"has shape \(11, 8\), its config.json says \(2147483647, 8\)"),
    ],
    ids=str,
)
def test_a_network_that_this_one_is_not_is_refused_by_name_and_value(tmp_path, changes, said):
    folder = save(tmp_path / "x", **changes)
    with pytest.raises(UserError, match=said) as error:
        gpt2.load_network(folder, "float32", ONE)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"activation_function": "gelu"}, "gelu"),
        ({"activation_function": "gelu_pytorch_tanh", "n_inner": 32, "n_ctx": 6}, "gelu_tanh"),
        ({"reorder_and_upcast_attn": True, "n_inner": None, "pruned_heads": {}}, "gelu_tanh"),
    ],
    ids=str,
)
def test_what_is_the_same_network_said_otherwise_is_taken(tmp_path, changes, expected):
    model, _ = gpt2.load_network(save(tmp_path / "x", **changes), "float32", ONE)
    assert model.config == GPTConfig(**{**vars(CONFIG), "activation": expected})


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", "[" * 100_000, '"\\ud800"', "\x00", '{"a": ' + "9" * 5000 + "}",
     " " * (gpt2.LONGEST_JSON + 1)],
    ids=lambda text: repr(text[:20]),
)  # fmt: skip
def test_a_config_that_is_none_is_refused(tmp_path, text):
    folder = save(tmp_path / "x")
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json cannot be read \(.*\): get it anew"):
        gpt2.load_network(folder, "float32", ONE)


@pytest.mark.parametrize(
    "make", [os.mkfifo, Path.mkdir, lambda path: None], ids=["a pipe", "a folder", "nothing"]
)
def test_a_config_that_is_no_file_is_not_opened(tmp_path, make):
    folder = save(tmp_path / "x")
    (folder / "config.json").unlink()
    make(folder / "config.json")
    with pytest.raises(UserError, match=r"config\.json cannot be read \(it is (no file|not there)"):
        gpt2.load_network(folder, "float32", ONE)


# ---- a model in several files


@pytest.fixture
def sharded(tmp_path):
    return shutil.copytree(REFERENCE / "sharded", tmp_path / "sharded")


def change_index(folder, change):
    index = json.loads((folder / gpt2.INDEX).read_text())
    change(index["weight_map"])
    (folder / gpt2.INDEX).write_text(json.dumps(index))


FIRST = "transformer.h.0.attn.c_attn.bias"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda places: places.update({FIRST: "../sharded/x.safetensors"}),
            "it must lie beside it",
        ),
        (lambda places: places.update({FIRST: "/etc/passwd"}), "names the file '/etc/passwd'"),
        (lambda places: places.update({FIRST: "x" * 10**6}), "it must lie beside it"),
        (lambda places: places.update({FIRST: 3}), "has no weight_map of names to files"),
        (lambda places: places.update({FIRST: "y.safetensors"}), "not there"),
        (lambda places: places.update({FIRST: max(places.values())}), f"'{FIRST}', which is by .*"),
        (lambda places: places.pop(FIRST), f"'{FIRST}', which is not in model.safetensors.index"),
        (lambda places: places.update({"a": places[FIRST]}), "'a' is in .* and in no file"),
        (lambda places: places.clear(), "has 0 tensors"),
    ],
)
def test_an_index_that_lies_is_refused(sharded, change, said):
    change_index(sharded, change)
    with pytest.raises(UserError, match=said) as error:
        gpt2.load_network(sharded, "float32", ONE)
    assert len(str(error.value)) < 400 + len(str(sharded))


def test_a_shard_that_is_missing_is_named(sharded):
    path = min(sharded.glob("model-*.safetensors"))
    path.unlink()
    with pytest.raises(UserError, match=rf"{path.name} is not .* \(it is not there\)"):
        gpt2.load_network(sharded, "float32", ONE)


def test_a_model_that_is_there_as_a_pickle_alone_is_not_opened(tmp_path):
    folder = save(tmp_path / "x")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nmkdir\n(S'marker'\ntR.")
    with pytest.raises(
        UserError, match=r"no model\.safetensors, and pytorch_model\.bin is a pickle"
    ):
        load(folder)


# ---- what is read


def counted(monkeypatch):
    """Return the list that the bytes of each read of a file are added to."""
    reads, copy = [], gpt2.copy

    def counting(there, view):
        reads.append(view.nbytes)
        copy(there, view)

    monkeypatch.setattr(gpt2, "copy", counting)
    return reads


@pytest.mark.parametrize(
    "sizes", [{"data": 8}, {"data": 2, "fsdp": 4}, {"data": 1, "fsdp": 2, "tensor": 2}], ids=str
)
def test_every_byte_is_read_once_whoever_holds_it(monkeypatch, sizes):
    reads = counted(monkeypatch)
    _, params = gpt2.load_network(REFERENCE / "bfloat16", "float32", make_mesh(**sizes))
    assert sum(reads) == 2 * sum(x.size for x in jax.tree.leaves(params))
    _, whole = gpt2.load_network(REFERENCE / "bfloat16", "float32", ONE)
    assert same(params, whole)


def test_a_device_is_given_the_part_that_the_table_says():
    _, params = gpt2.load_network(REFERENCE / "tanh", "float32", make_mesh(fsdp=4, tensor=2))
    c_fc = params["h"]["mlp"]["c_fc"]["weight"]
    assert c_fc.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert c_fc.addressable_shards[0].data.shape == (2, 4, 32)


def test_of_a_parameter_only_the_slice_asked_for_is_read_and_kept(tmp_path, monkeypatch):
    """As by one process of several: the fourth that is its own, and no more of it at a time."""
    config = GPTConfig(**{**vars(CONFIG), "n_embd": 256, "vocab_size": 5000, "block_size": 64})
    sizes = {"n_embd": 256, "vocab_size": 5000, "n_positions": 64}
    folder = save(tmp_path / "x", hugging_face(config), **sizes)
    reads = counted(monkeypatch)
    parameters = gpt2.unread(gpt2.read_tensors(folder), config, folder)
    for x in jax.tree.leaves(parameters):
        cut = max(range(len(x.shape)), key=lambda i: x.shape[i])
        part = x.shape[cut] // 4
        index = tuple(slice(part) if i == cut else slice(None) for i in range(len(x.shape)))
        tracemalloc.start()
        block = x[index]
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert sum(reads) == block.nbytes == 4 * np.prod(x.shape) // x.shape[cut] * part
        assert held < block.nbytes + 5000
        reads.clear()


# ---- where from


def fake_hub(monkeypatch, download):
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=download))


@pytest.fixture
def tokenizer(monkeypatch):
    made = SimpleNamespace(n_tokens=10)
    monkeypatch.setattr(gpt2, "read_tokenizer", lambda folder, config: made)
    return made


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("gpt2", "openai-community/gpt2"),
        ("gpt2-medium", "openai-community/gpt2-medium"),
        ("gpt2-large", "openai-community/gpt2-large"),
        ("gpt2-xl", "openai-community/gpt2-xl"),
        ("distilgpt2", "distilbert/distilgpt2"),
        ("someone/their-GPT_2.0", "someone/their-GPT_2.0"),
    ],
)
def test_a_name_is_fetched_from_the_hub(monkeypatch, tmp_path, tokenizer, name, repository):
    asked = []
    folder = save(tmp_path / "cached")

    def download(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(folder)

    fake_hub(monkeypatch, download)
    model, params, its = load(name)
    assert [repo for repo, _ in asked] == [repository]
    assert "model.safetensors" in asked[0][1]
    assert not any(name.endswith((".bin", ".py", ".pt", "*")) for name in asked[0][1])
    assert model.config == GPTConfig(**{**vars(CONFIG), "n_tokens": 10})
    assert its is tokenizer
    assert same(params, params_of(hugging_face()))


def test_a_folder_is_loaded_without_the_hubs_packages(monkeypatch, tmp_path, tokenizer):
    for package in ("huggingface_hub", "safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it now raises ImportError
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a" / "b")
    for source in ("a/b", "./a/b", Path("a/b"), str(tmp_path / "a" / "b")):
        params = load(source, mesh=make_mesh(fsdp=2))[1]
        assert same(params, params_of(hugging_face()))
        assert params["wpe"]["weight"].sharding.spec == PartitionSpec(None, "fsdp")


def test_a_short_name_is_the_hubs_even_where_such_a_folder_is(monkeypatch, tmp_path, tokenizer):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "gpt2", {})
    fake_hub(monkeypatch, lambda repo, allow_patterns: save(tmp_path / "cached"))
    assert same(load("gpt2")[1], params_of(hugging_face()))
    with pytest.raises(UserError, match="gpt2 has 0 tensors"):
        load("./gpt2")


@pytest.mark.parametrize("name", ["a/b", "gpt2-xl"])
def test_without_the_hubs_package_the_extra_is_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=rf"init_from={name}.*pip install 'gpt_jax\[hub\]'"):
        load(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpt2", "init_from=gpt2 cannot be fetched from Hugging Face's hub"),
        ("a/b", "init_from=a/b: no such folder here, and it cannot be fetched"),
    ],
)
def test_offline_one_line_names_what_helps(monkeypatch, name, said):
    def download(repo, allow_patterns):
        raise OSError("no route to host\n" + "and a long explanation " * 99)

    fake_hub(monkeypatch, download)
    with pytest.raises(UserError) as error:
        load(name)
    message = str(error.value)
    assert message.startswith(said)
    assert "(OSError: no route to host and a long" in message
    assert "name a folder with its config.json and model.safetensors" in message
    assert "HF_HOME" in message
    assert "\n" not in message
    assert len(message) < 400


def test_a_model_in_the_hubs_cache_is_loaded_offline(monkeypatch, tmp_path, tokenizer):
    """Where transformers has fetched it, say; by huggingface_hub itself."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--openai-community--gpt2"
    blobs = save(repository / "blobs")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    for path in blobs.iterdir():
        (repository / "snapshots" / ("0" * 40) / path.name).symlink_to(path)
    assert same(load("gpt2")[1], params_of(hugging_face()))
    with pytest.raises(UserError, match="init_from=gpt2-xl cannot be fetched"):
        load("gpt2-xl")


@pytest.mark.parametrize(
    "source",
    ["run", "a/b/c", "../x", "./x", "a/", "/a", "a/b.pt", "-a/b", Path("a/b"), "a/b\n", "é/b",
     "x" * 5000, "a\0b"],
    ids=lambda source: repr(source)[:30],
)  # fmt: skip
def test_what_is_no_name_of_the_hub_is_not_looked_for_there(monkeypatch, tmp_path, source):
    monkeypatch.chdir(tmp_path)
    Path("run/checkpoints").mkdir(parents=True)
    Path("run/config.json").write_text("{}")
    assert not gpt2.is_theirs(source)


# ---- the presets


NARROW = GPTConfig(**{**vars(CONFIG), "vocab_size": 50257, "block_size": 16})


@pytest.fixture
def small_gpt2(tmp_path, monkeypatch):
    """A folder with a narrow GPT-2 and data of its ids; and how the hub is asked for it."""
    monkeypatch.chdir(tmp_path)
    folder = save(tmp_path / "model", hugging_face(NARROW), vocab_size=50257, n_positions=16)
    meta = {"vocab_size": 50304, "dtype": "uint16", "tokenizer": tiktoken_tokenizer("gpt2").spec}
    for name in ("shakespeare", "openwebtext"):
        data = Path("data", name)
        data.mkdir(parents=True)
        (data / "meta.json").write_text(json.dumps(meta))
        for split in ("train", "val"):
            ids = np.random.default_rng(0).integers(0, 50257, 200)
            ids.astype("<u2").tofile(data / f"{split}.bin")
    # the bytes of an id, for bits per byte, need no files of GPT-2's
    encoding = SimpleNamespace(decode_single_token_bytes=lambda _: b"x")
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: encoding)
    asked = []
    fake_hub(monkeypatch, lambda repo, allow_patterns: asked.append(repo) or str(folder))
    return asked


def start(monkeypatch, *argv):
    shape = ["--block_size=8", "--batch_size=1", "--eval_iters=1", "--data=1", "--device=cpu"]
    monkeypatch.setattr(sys, "argv", ["train.py", *argv, *shape])
    assert train.main() == 0


@pytest.mark.parametrize(
    ("preset", "name"),
    [
        ("eval_gpt2", "gpt2"),
        ("eval_gpt2_medium", "gpt2-medium"),
        ("eval_gpt2_large", "gpt2-large"),
        ("eval_gpt2_xl", "gpt2-xl"),
    ],
)
def test_the_presets_evaluate_from_the_hub_and_from_a_folder(
    small_gpt2, monkeypatch, capsys, preset, name
):
    start(monkeypatch, preset)
    assert small_gpt2 == [f"openai-community/{name}"]
    hub = capsys.readouterr().out.splitlines()[-1]
    start(monkeypatch, preset, "--init_from=model")
    assert hub == capsys.readouterr().out.splitlines()[-1]
    assert hub.startswith("step 0: train loss ")
    assert len(small_gpt2) == 1


def test_shakespeare_is_finetuned_from_the_hub_and_from_a_folder_and_goes_on(
    small_gpt2, monkeypatch, capsys
):
    few = ["--gradient_accumulation_steps=2", "--max_iters=2", "--always_save_checkpoint=True"]
    lines = []
    for i, extra in enumerate(([], ["--init_from=./model"])):
        start(monkeypatch, "finetune_shakespeare", f"--out_dir=out{i}", *extra, *few)
        out = capsys.readouterr().out.splitlines()
        lines.append([line.split(", time")[0] for line in out if line.startswith("iter ")])
    assert small_gpt2 == ["openai-community/gpt2-xl"]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 2
    model, params, _ = load(Path("out1"))
    assert (model.config.activation, model.config.block_size) == ("gelu_tanh", 8)  # cropped
    before = params_of(hugging_face(NARROW), NARROW)
    moved = np.abs(params["wte"]["weight"] - before["wte"]["weight"]).max()
    assert 0 < moved < 1e-3
    start(monkeypatch, "--init_from=resume", "--out_dir=out1", "--max_iters=3")
    assert "iteration 2" in capsys.readouterr().out


def test_a_run_does_not_write_over_the_model_that_it_starts_from(small_gpt2, monkeypatch, capsys):
    before = Path("model/config.json").read_bytes()
    monkeypatch.setattr(sys, "argv", ["train.py", "finetune_shakespeare", "--init_from=model",
                                      "--out_dir=model", "--data=1", "--block_size=8"])  # fmt: skip
    assert train.main() == 2
    assert "out_dir=model holds a model of Hugging Face's" in capsys.readouterr().err
    assert Path("model/config.json").read_bytes() == before


def test_a_run_stays_a_run_whatever_was_exported_into_its_folder(tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert gpt2.is_theirs(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert gpt2.is_theirs(tmp_path)
    (tmp_path / "checkpoints" / "10").mkdir()
    assert not gpt2.is_theirs(tmp_path)
