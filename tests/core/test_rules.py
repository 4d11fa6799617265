import ast
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nm_jax as nm
from nm_jax._core.rules import DenseLeaf, SparseLeaf, resolve

W = jnp.ones((8, 16))


def tree(**leaves):
    """Leaves named by '/'-joined paths -> nested dicts."""
    root = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return root


def axes_of(params, rules, **kwargs):
    return {leaf.path: leaf.axes if isinstance(leaf, SparseLeaf) else None for leaf in resolve(params, rules, **kwargs)}


def reason(params, rules, path, **kwargs):
    return next(leaf.reason for leaf in resolve(params, rules, **kwargs) if leaf.path == path)


@pytest.mark.parametrize(
    ("path", "shape", "axes"),
    [
        ("Dense_0/kernel", (8, 16), "io"),
        ("kernel", (8, 16), "io"),
        ("Conv_0/kernel", (3, 3, 8, 16), "bbio"),
        ("out/kernel", (8, 16), "io"),
        ("layers/0/weight", (16, 8), "oi"),
        ("conv/weight", (16, 8, 3, 3), "oibb"),
    ],
)
def test_names_of_the_frameworks(path, shape, axes):
    assert axes_of(tree(**{path: jnp.ones(shape)}), "2:4-T") == {path: axes}
    assert axes_of(tree(**{path: jnp.ones(shape)}), [("k|w", "2:4-T")]) == {path: axes}


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("Dense_0/kernel", (3, 8, 16)),
        ("query/kernel", (8, 4, 8)),
        ("query/kernel", (2, 8, 4, 8)),
        ("out/kernel", (2, 4, 8, 8)),
        ("layers/weight", (16, 8, 4)),
    ],
)
def test_an_ambiguous_kernel_shows_the_rule_to_write(path, shape):
    """The rule to copy leaves it dense: axes to copy would be the guess that the error refuses to make."""
    params = tree(**{path: jnp.ones(shape), "Dense_9/kernel": W})
    with pytest.raises(ValueError, match=r"contracted is ambiguous.*nm_jax.plan.*Or give rules") as error:
        resolve(params, "2:4")
    rules = ast.literal_eval(re.search(r"Or give rules: (\[.*?\]) leaves them dense", str(error.value))[1])
    assert axes_of(params, rules) == {path: None, "Dense_9/kernel": "io"}
    axes = "b" * (len(shape) - 2) + "io"
    assert axes_of(params, [(rules[0][0], "2:4", axes), "2:4"])[path] == axes
    assert not re.search("'[iob]{2,}'", str(error.value))


def test_all_ambiguous_leaves_are_in_one_error():
    params = tree(**{f"block_{k}/kernel": jnp.ones((3, 8, 16)) for k in range(20)})
    with pytest.raises(ValueError, match=r"block_0/kernel: .* and so it is for 19 more.*block_1/kernel .*and 8 more"):
        resolve(params, "2:4-T")


def test_a_doubt_about_the_orientation_is_none_for_transposable_masks():
    params = tree(**{"c_proj/weight": jnp.ones((8, 8)), "c_proj/bias": jnp.ones(8)})
    with pytest.raises(ValueError, match="ambiguous"):
        resolve(params, "2:4")
    (leaf,) = [leaf for leaf in resolve(params, "2:4-T") if isinstance(leaf, SparseLeaf)]
    assert leaf.axes == "oi"
    assert leaf.source.startswith("the same in both orientations")


@pytest.mark.parametrize(
    ("params", "rules", "source"),
    [
        ({"kernel": W}, "2:4", "the name 'kernel' of Flax"),
        ({"kernel": W, "bias": jnp.ones(16)}, "2:4", "the name 'kernel' of Flax and its bias (16,)"),
        ({"w": W}, [("w", "2:4")], "the rule, which gives no axes: (in, out) as everywhere in JAX"),
        ({"w": W}, [("w", "2:4", "oi")], "the rule 'w'"),
        (eqx.nn.Linear(8, 16, key=jax.random.key(0)), "2:4", "the class Linear"),
    ],
)
def test_a_sparse_leaf_says_what_its_axes_rest_on(params, rules, source):
    assert [leaf.source for leaf in resolve(params, rules) if isinstance(leaf, SparseLeaf)] == [source]


def test_leaves_that_stay_dense_say_why():
    params = tree(
        **{
            "Dense_0/kernel": W,
            "Dense_0/bias": jnp.ones(16),
            "scale": jnp.float32(1),
            "Embed_0/embedding": W,
            "token_embed/weight": W,
            "head/kernel": jnp.ones((8, 10)),
            "w": W,
            "rng": jax.random.key(0),
            "step": jnp.int32(3),
            "empty/kernel": jnp.ones((0, 4)),
        }
    )
    why = lambda path: reason(params, "2:4-T", path)  # noqa: E731
    assert "1-D" in why("Dense_0/bias")
    assert "0-D" in why("scale")
    assert "looked up" in why("Embed_0/embedding")
    assert "looked up" in why("token_embed/weight")
    assert why("head/kernel") == "output size 10 is not a multiple of 4"
    assert "name does not tell" in why("w")
    assert "0-D" in why("rng")
    assert "0-D" in why("step")
    assert "no entries" in why("empty/kernel")
    assert axes_of(params, "2:4")["head/kernel"] == "io"  # only the contraction axis matters without -T


def test_first_rule_that_matches_decides():
    params = {"params": tree(**{"a/kernel": W, "b/kernel": W, "c/kernel": W, "bias": jnp.ones(4)})}
    leaves = resolve(params, [("^b/", None), ("^(a|b)/", "4:8-T"), ("kernel", "2:4", "oi")])
    found = {leaf.path: (str(leaf.pattern), leaf.axes) for leaf in leaves if isinstance(leaf, SparseLeaf)}
    assert found == {"a/kernel": ("4:8-T", "io"), "c/kernel": ("2:4", "oi")}
    assert {leaf.path: leaf.reason for leaf in leaves if isinstance(leaf, DenseLeaf)} == {
        "b/kernel": "by the rule '^b/'",
        "bias": "no rule matches",
    }


def test_an_explicit_rule_without_axes():
    assert axes_of({"w": W}, [("w", "2:4")]) == {"w": "io"}
    with pytest.raises(ValueError, match="ambiguous"):
        resolve({"w": jnp.ones((2, 8, 16))}, [("w", "2:4")])
    assert axes_of({"embedding": W, "w": W}, [(".", "2:4")]) == {"embedding": None, "w": "io"}
    assert axes_of({"embedding": W}, [("embedding", "2:4", "io")]) == {"embedding": "io"}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("Dense_7", "2:4")], "'Dense_7' matches none of the paths: Dense_0/kernel; bias"),
        ([("head", None), ("kernel", "2:4")], "'head' matches none"),
        ([("kernel", None)], None),
        ([("bias", "2:4")], "no parameter becomes sparse"),
        ([("(", "2:4")], "no valid regular expression"),
        ([(3, "2:4")], "path regex of a rule is a string, got 3"),
        ([(b"kernel", "2:4")], "path regex of a rule is a string, got b'kernel'"),
        ({"kernel": jnp.ones((8, 16), bool)}, r"got a tree of arrays \(dict\): are these masks or parameters"),
        ([W], "a tree of arrays"),
        (b"2:4", "rules must be"),
        ([("kernel",)], "a rule is"),
        ([("kernel", "2:4", "io", 3)], "a rule is"),
        ([("kernel", "2:4", "ox")], "unknown letters 'x'"),
        ([("kernel", "2:4", "bio")], "Dense_0/kernel: .* has 2 dimensions"),
        ([("kernel", "2:3:4")], "is not a sparsity pattern"),
        (["2:4"], "a rule is"),
        ([], "rules must be"),
        ({"kernel": "2:4"}, "rules must be"),
        (None, "rules must be"),
        ("3:7-T", "no parameter becomes sparse.*contraction size 8 is not a multiple of 7"),
    ],
)
def test_wrong_rules(rules, message):
    params = tree(**{"Dense_0/kernel": W, "bias": jnp.ones(16)})
    if message is None:
        assert all(isinstance(leaf, DenseLeaf) for leaf in resolve(params, rules))
        return
    with pytest.raises(ValueError, match=message) as error:
        resolve(params, rules)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, jnp.complex64])
def test_weights_that_are_not_floating_point(dtype):
    with pytest.raises(ValueError, match=rf"kernel: 2:4 needs floating point weights, got {dtype.__name__}"):
        resolve({"kernel": jnp.ones((8, 8), dtype)}, "2:4")


@pytest.mark.parametrize("leaf", [1.0, np.float32(1), "text"])
def test_leaves_that_are_not_arrays(leaf):
    with pytest.raises(ValueError, match=r"no parameter becomes sparse.*not an array"):
        resolve({"kernel": leaf}, "2:4")
    assert axes_of({"kernel": W, "other": leaf}, "2:4") == {"kernel": "io", "other": None}


def test_scalar_arrays_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"no parameter becomes sparse.*0-D"):
        resolve({"kernel": jnp.float32(1)}, "2:4")


def test_partial_policies():
    params = {"kernel": jnp.ones((8, 10)), "other": {"kernel": W}}
    assert axes_of(params, "2:4-T") == {"kernel": None, "other/kernel": "io"}
    assert axes_of(params, "2:4-T", partial="pad") == {"kernel": "io", "other/kernel": "io"}
    with pytest.raises(ValueError, match="kernel: the output axis has size 10, which 4 does not divide"):
        resolve(params, "2:4-T", partial="error")
    with pytest.raises(ValueError, match="partial must be"):
        resolve(params, "2:4-T", partial="wrap")


def test_shapes_are_enough_and_a_tree_without_leaves_is_empty():
    shapes = jax.eval_shape(lambda: {"kernel": W})
    assert axes_of(shapes, "2:4") == {"kernel": "io"}
    assert resolve({}, "2:4") == []
    assert resolve({"a": None}, [("zzz", "2:4")]) == []


def test_many_paths_are_cut_short():
    params = {f"layer_{k}": {"kernel": W} for k in range(100)}
    with pytest.raises(ValueError, match="and 88 more"):
        resolve(params, [("nothing", nm.NM(2, 4))])
