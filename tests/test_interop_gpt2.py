"""OpenAI's weights in Hugging Face's layout: made-up arrays with the real names and shapes."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import GPTConfig
from gpt_jax.errors import UserError
from gpt_jax.interop import gpt2
from gpt_jax.interop.nanogpt import from_state_dict, to_state_dict
from gpt_jax.model import GPT, count_params

CONFIG = GPTConfig(
    n_layer=2, n_head=2, n_embd=8, block_size=6, vocab_size=11, bias=True, activation="gelu_tanh"
)


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


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(
        jax.tree.map(np.array_equal, a, b)
    )


def test_conv1d_weights_are_taken_as_they_are():  # M15
    arrays, params = hugging_face(), gpt2.from_hugging_face(hugging_face(), CONFIG)
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
    params = gpt2.from_hugging_face(arrays, CONFIG)
    assert same(params, from_state_dict(nanogpt, CONFIG))
    back = to_state_dict(params)
    assert {name: x.tobytes() for name, x in nanogpt.items()} == {
        name: back[name].tobytes() for name in nanogpt
    }


def test_names_of_the_whole_model_are_taken_too():
    plain = hugging_face()
    named = {f"transformer.{name}": x for name, x in plain.items()}
    named["lm_head.weight"] = plain["wte.weight"]
    assert same(gpt2.from_hugging_face(named, CONFIG), gpt2.from_hugging_face(plain, CONFIG))


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_masks_are_ignored(prefix):  # M15
    arrays = {f"{prefix}{name}": x for name, x in hugging_face().items()}
    masks = {}
    for i in range(2):
        masks[f"{prefix}h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 6, 6), np.float32))
        masks[f"{prefix}h.{i}.attn.masked_bias"] = np.float32(-1e4)
    ours = gpt2.from_hugging_face({**arrays, **masks}, CONFIG)
    assert same(ours, gpt2.from_hugging_face(arrays, CONFIG))


def test_a_missing_array_is_named():
    arrays = hugging_face()
    del arrays["h.1.mlp.c_fc.bias"]
    with pytest.raises(UserError, match=r"no 'transformer\.h\.1\.mlp\.c_fc\.bias'"):
        gpt2.from_hugging_face(arrays, CONFIG)


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_the_four_sizes_have_openais_parameter_counts(name, total):  # M15
    config = gpt2.config_of(name, "bfloat16")
    assert (config.vocab_size, config.block_size, config.bias) == (50257, 1024, True)
    assert (config.activation, config.dtype, config.dropout) == ("gelu_tanh", "bfloat16", 0.0)
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(GPT(config).init, jax.random.key(0), tokens)["params"]
    assert count_params(params, non_embedding=False) == total


@pytest.mark.parametrize("package", ["huggingface_hub", "safetensors.numpy"])
def test_without_the_hubs_packages_the_extra_is_named(monkeypatch, package):
    fake_hub(monkeypatch, lambda repo, file: file, hugging_face())
    monkeypatch.setitem(sys.modules, package, None)  # importing it now raises ImportError
    with pytest.raises(UserError, match=r"init_from=gpt2-xl.*pip install 'gpt_jax\[hub\]'"):
        gpt2.load("gpt2-xl", "float32")


def fake_hub(monkeypatch, download, arrays):
    hub = SimpleNamespace(hf_hub_download=download)
    files = SimpleNamespace(load_file={"model.safetensors": arrays}.get)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "safetensors", SimpleNamespace(numpy=files))
    monkeypatch.setitem(sys.modules, "safetensors.numpy", files)


def test_a_download_that_fails_is_one_line_with_the_model_and_the_reason(monkeypatch):
    def download(repo, file):
        raise OSError("no route to host\nand a long explanation")

    fake_hub(monkeypatch, download, {})
    with pytest.raises(UserError) as error:
        gpt2.load("gpt2", "float32")
    assert str(error.value) == "init_from=gpt2: the weights cannot be had: no route to host"


def test_load_fetches_openais_file(monkeypatch):
    asked = []

    def download(repo, file):
        asked.append((repo, file))
        return file

    fake_hub(monkeypatch, download, hugging_face())
    monkeypatch.setattr(gpt2, "config_of", lambda name, dtype: CONFIG)
    monkeypatch.setattr(gpt2, "tiktoken_tokenizer", lambda name: f"tokenizer of {name}")
    model, params, tokenizer = gpt2.load("gpt2-medium", "float32")
    assert asked == [("openai-community/gpt2-medium", "model.safetensors")]
    assert model.config == CONFIG
    assert tokenizer == "tokenizer of gpt2"
    assert same(params, gpt2.from_hugging_face(hugging_face(), CONFIG))
    assert {type(x) for x in jax.tree.leaves(params)} == {np.ndarray}
