"""BERT against `transformers`, its sizes against the published ones, and what weights do not fit."""

import dataclasses
import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import nm_jax as nm
from experiments.networks import LanguageModel, bert, bert_weights
from tests.experiments import golden_bert
from tests.experiments.golden_bert import ATTENDED, SEGMENTS, TOKENS
from tests.matmul.test_api import calls

GOLDEN = json.loads(golden_bert.FILE.read_text())
SMALL = bert.Config(vocabulary=30, width=16, hidden=32, layers=2, heads=4, positions=12)
MODULES = {
    "encoder": bert.Bert(SMALL),
    "pooled": bert.Pooled(SMALL),
    "classification": bert.Classification(SMALL, classes=3),
    "span": bert.SpanExtraction(SMALL),
}


def arrays(name):
    return golden_bert.weights(GOLDEN[name]["shapes"])


def random(module, *inputs):
    """Parameters, without a program to compile for each shape."""
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * draw.normal(size=leaf.shape), jnp.float32), shapes)


# ---------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("name", MODULES)
def test_outputs_are_those_of_transformers(name):
    variables = bert_weights.from_torch(MODULES[name], arrays(name))
    found = jax.jit(MODULES[name].apply)(variables, TOKENS, ATTENDED, SEGMENTS)
    wanted = np.array(GOLDEN[name]["outputs"])
    # What a padded position says is never read.
    rows = ATTENDED if wanted.ndim == 3 else ...
    np.testing.assert_allclose(np.asarray(found)[rows], wanted[rows], rtol=1e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="the golden outputs: install transformers")
def test_golden_outputs_are_those_of_the_transformers_installed():
    for name, fresh in golden_bert.outputs().items():
        assert fresh["shapes"] == GOLDEN[name]["shapes"]
        np.testing.assert_allclose(fresh["outputs"], GOLDEN[name]["outputs"], atol=2e-5)


@pytest.mark.parametrize(
    "config, parameters", [(bert.BASE, 109_482_240), (bert.LARGE, 335_141_888), (bert.MINILM, 22_713_216)]
)
def test_published_numbers_of_parameters(config, parameters):
    shapes = bert.shapes(bert.Pooled(config))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


def test_padding_does_not_change_a_sentence():
    module = bert.SentenceEmbedding(SMALL)
    tokens = jnp.array([[1, 5, 7, 2, 0, 0, 0, 0]])
    variables = {"params": random(module, tokens, tokens > 0)}
    long, short = (jax.jit(module.apply)(variables, tokens[:, :k], tokens[:, :k] > 0) for k in (8, 4))
    np.testing.assert_allclose(long, short, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(long), 1, rtol=1e-5)


def test_dropout_is_at_work_in_training_alone():
    module = MODULES["classification"]
    variables = bert_weights.from_torch(module, arrays("classification"))
    apply = jax.jit(functools.partial(module.apply, train=True))
    one, again, other = (apply(variables, TOKENS, ATTENDED, rngs={"dropout": jax.random.key(k)}) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).min() > 1e-3


# ---------------------------------------------------------------------------------------------------- weights and sizes


def test_weights_with_and_without_their_prefix_in_both_files(tmp_path):
    given = arrays("classification")
    save_file(given, tmp_path / "w.safetensors")
    np.savez(tmp_path / "w.npz", **{name.removeprefix("bert."): value for name, value in given.items()})
    # Older files call a norm's parameters gamma and beta.
    old = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): value
        for name, value in given.items()
    }
    module = MODULES["classification"]
    trees = [bert_weights.from_torch(module, w) for w in (given, old)]
    trees += [
        bert_weights.from_torch(module, bert_weights.read(tmp_path / f"w.{end}")) for end in ("safetensors", "npz")
    ]
    wanted = jax.eval_shape(module.init, jax.random.key(0), TOKENS, ATTENDED)
    assert jax.tree.map(jnp.shape, trees[0]) == jax.tree.map(jnp.shape, wanted)
    for tree in trees[1:]:
        jax.tree.map(np.testing.assert_array_equal, tree, trees[0])


def test_a_head_that_is_not_there_starts_anew_when_that_is_asked_for():
    module = MODULES["span"]
    with pytest.raises(ValueError, match=r"nothing for span/\w+; fresh=\('span',\) starts anew"):
        bert_weights.from_torch(module, arrays("pooled"))
    one, other = (bert_weights.from_torch(module, arrays("pooled"), fresh=("span",), seed=k)["params"] for k in (1, 2))
    assert 0 < np.std(one["span"]["kernel"]) < 0.05 and not np.any(one["span"]["bias"])
    assert np.any(one["span"]["kernel"] != other["span"]["kernel"])
    np.testing.assert_array_equal(
        one["bert"]["word_embedding"]["embedding"], arrays("pooled")["embeddings.word_embeddings.weight"]
    )


def without(given, name):
    return {key: value for key, value in given.items() if key != name}


WEIGHTS = {
    "vocabulary": (
        {"vocabulary": 28},
        lambda w: w,
        r"embeddings\.word_embeddings\.weight is \(30, 16\), and the network wants \(28, 16\) \(the vocabulary\)",
    ),
    "layers": ({"layers": 1}, lambda w: w, r"encoder\.layer\.1\.\S+: the network has no such layer"),
    "missing": (
        {},
        lambda w: without(w, "encoder.layer.1.output.dense.bias"),
        r"the weights have nothing for bert/layer1/ffn2/bias",
    ),
    "unknown": (
        {},
        lambda w: w | {"encoder.layer.0.adapter.weight": np.zeros(3)},
        r"encoder\.layer\.0\.adapter\.weight: BERT has no such tensor",
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_do_not_fit(name):
    changes, edit, message = WEIGHTS[name]
    module = bert.Pooled(dataclasses.replace(SMALL, **changes))
    with pytest.raises(ValueError, match=message):
        bert_weights.from_torch(module, edit(arrays("pooled")))


def test_sizes_of_public_weights(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(golden_bert.SIZES | {"model_type": "bert"}))
    assert bert.Config.read(path) == SMALL
    path.write_text(json.dumps(golden_bert.SIZES | {"hidden_act": "relu"}))
    with pytest.raises(ValueError, match="hidden_act is 'relu'; only 'gelu'"):
        bert.Config.read(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="no vocab_size, hidden_size"):
        bert.Config.read(path)


def test_inputs_longer_than_the_positions_are_refused():
    with pytest.raises(ValueError, match="an input of 13 tokens, and there are 12 positions"):
        bert.shapes(bert.Bert(SMALL), length=13)


# ---------------------------------------------------------------------------------------------------------- sparsity


LANGUAGE = LanguageModel(vocabulary=20, width=16, hidden=32, layers=2, heads=2, positions=8)
PLANNED = {**MODULES, "embedding": bert.SentenceEmbedding(SMALL), "language model": LANGUAGE}


@pytest.mark.parametrize("name", PLANNED)
def test_planned_without_a_rule(name):
    """Every projection of every layer is sparse; heads and embeddings are not."""
    module = PLANNED[name]
    inputs = (TOKENS,) if name == "language model" else (TOKENS, ATTENDED, SEGMENTS)
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    # A head is the last layer; where there is none, the last projection is the last one.
    headless = name in ("encoder", "embedding")
    plan = nm.plan(
        lambda p, *x: module.apply({"params": p}, *x),
        params,
        *inputs,
        pattern="2:4-T",
        last="2:4-T" if headless else None,
    )
    sparse = {leaf.path.removeprefix("bert/") for leaf in plan.leaves if leaf.pattern}
    projections = ("query", "key", "value", "attention_out", "ffn1", "ffn2")
    wanted = {f"layer{k}/{part}/kernel" for k in range(2) for part in projections}
    wanted |= {"pooler/kernel"} if name == "classification" else set()
    assert sparse == wanted
    assert all(leaf.axes == "io" for leaf in plan.leaves if leaf.pattern)


@pytest.mark.parametrize("name", ["language model", pytest.param("span", marks=pytest.mark.slow)])
def test_projections_run_through_sparse_products(name):
    dot = nm.dot_general("2:4-T", implementation="reference")
    if name == "span":
        plain, mine = MODULES["span"], bert.SpanExtraction(dataclasses.replace(SMALL, dot_general=dot))
        inputs = (TOKENS, ATTENDED)
    else:
        plain, mine = LANGUAGE, LANGUAGE.clone(dot_general=dot)
        inputs = (TOKENS,)
    kept = np.tile(np.repeat([[1, 0], [0, 1]], 2, axis=1).repeat(2, axis=0), (8, 8))  # two of four, both ways

    def cut(path, leaf):
        sparse = "layer" in jax.tree_util.keystr(path) and leaf.ndim == 2
        return leaf * kept[: leaf.shape[0], : leaf.shape[1]] if sparse else leaf

    params = jax.tree_util.tree_map_with_path(cut, random(plain, *inputs))
    found, wanted = (jax.jit(m.apply)({"params": params}, *inputs) for m in (mine, plain))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    sparse, dense = calls(jax.make_jaxpr(mine.apply)({"params": params}, *inputs).jaxpr)
    # Six projections a layer; scores and mixing of each, and the head, are dense.
    assert (sparse, dense) == (12, 5)


def test_a_language_model_sees_the_past_alone():
    variables = {"params": random(LANGUAGE, TOKENS)}
    apply = jax.jit(LANGUAGE.apply)
    changed = TOKENS.copy()
    changed[:, 5] += 1
    one, other = (apply(variables, tokens) for tokens in (TOKENS, changed))
    np.testing.assert_array_equal(one[:, :5], other[:, :5])
    assert np.all(np.abs(one[:, 5:] - other[:, 5:]).max(axis=-1) > 1e-4)
    assert one.shape == (2, 8, 20)
