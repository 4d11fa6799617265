"""Scores from a file, instead of magnitudes."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import nm_jax as nm
from tests.checkpoint.cases import normal


def kept(path, name):
    return load_file(path)[name] != 0


def best_of_four(scores, axis):
    """The two largest of every four along an axis, by sorting."""
    moved = np.moveaxis(scores, axis, -1)
    groups = moved.reshape(*moved.shape[:-1], -1, 4)
    ranks = np.argsort(np.argsort(-groups, axis=-1), axis=-1)
    return np.moveaxis((ranks < 2).reshape(moved.shape), -1, axis)


@pytest.mark.parametrize(
    ("shape", "axes", "diagonal"),
    [((8, 12), "oi", (12,)), ((12, 8), "io", (12,)), ((3, 8, 12), "boi", (3, 12)), ((8, 12, 3, 2), "oibb", (72,))],
)
def test_diagonals_of_gram_matrices(tmp_path, shape, axes, diagonal):
    """|w| times the norm of its input, whatever the layout."""
    weight, sums = normal(0, shape), np.random.default_rng(1).uniform(0, 9, diagonal).astype(np.float32)
    save_file({"a.weight": weight}, tmp_path / "in")
    nm.save_scores(tmp_path / "scores", {"a": {"weight": sums}})
    report = nm.prune_checkpoint(tmp_path / "in", tmp_path / "out", [("a", "2:4", axes)], scores=tmp_path / "scores")
    others = [n if letter != "o" else 1 for n, letter in zip(shape, axes, strict=True)]
    scores = np.abs(weight) * np.sqrt(sums).reshape(others)
    expected = best_of_four(scores, axes.index("i"))
    np.testing.assert_array_equal(kept(tmp_path / "out", "a.weight"), expected)
    assert (expected != best_of_four(np.abs(weight), axes.index("i"))).any()
    share = np.abs(weight)[expected].sum() / np.abs(weight).sum()
    assert report["a.weight"].record.retained == pytest.approx(share, abs=2e-6)
    assert nm.verify_checkpoint(tmp_path / "out").ok


def test_scores_are_used_as_they_are(tmp_path):
    weight, scores = normal(0, (8, 12)), normal(1, (8, 12))
    save_file({"a.weight": weight, "b.weight": normal(2, (8, 12))}, tmp_path / "in")
    nm.save_scores(tmp_path / "scores", {"a.weight": scores, "b.weight": None})
    assert set(load_file(tmp_path / "scores")) == {"a.weight"}
    nm.prune_checkpoint(tmp_path / "in", tmp_path / "out", [("a/", "2:4")], scores=tmp_path / "scores")
    np.testing.assert_array_equal(kept(tmp_path / "out", "a.weight"), best_of_four(scores, 1))


def test_records_of_inputs_are_wandas_scores(tmp_path):
    weight, inputs = normal(0, (12, 8)), normal(1, (30, 12))
    gram = nm.Gram.from_inputs(jnp.asarray(inputs))
    nm.save_checkpoint(tmp_path / "in", {"fc": {"kernel": weight}}, [("fc", None)])
    nm.save_scores(tmp_path / "scores", {"fc": {"kernel": gram}})
    nm.prune_checkpoint(tmp_path / "in", tmp_path / "out", "2:4", scores=tmp_path / "scores")
    scores = np.abs(weight) * np.linalg.norm(inputs.astype(np.float64), axis=0)[:, None]
    np.testing.assert_array_equal(kept(tmp_path / "out", "fc/kernel"), best_of_four(scores, 0))


def test_scores_that_do_not_fit(tmp_path):
    save_file({"a.weight": normal(0, (8, 12)), "b.weight": normal(1, (8, 12))}, tmp_path / "in")
    cases = {
        "no scores for 'b.weight'": {"a.weight": np.ones(12)},
        r"'a.weight' have the shape \(11,\)": {"a.weight": np.ones(11), "b.weight": np.ones(12)},
        "'a.weight' cannot be pruned, its scores hold NaN": {
            "a.weight": np.full((8, 12), np.nan),
            "b.weight": np.ones(12),
        },
    }
    for k, (message, scores) in enumerate(cases.items()):
        nm.save_scores(tmp_path / f"scores{k}", scores)
        with pytest.raises(ValueError, match=message):
            nm.prune_checkpoint(tmp_path / "in", tmp_path / "out", "2:4", scores=tmp_path / f"scores{k}")
    save_file({"a.weight": np.ones((8, 12), np.int8), "b.weight": np.ones(12, np.int8)}, tmp_path / "integers")
    with pytest.raises(ValueError, match=r"'a\.weight' are I8"):
        nm.prune_checkpoint(tmp_path / "in", tmp_path / "out", "2:4", scores=tmp_path / "integers")
    assert not (tmp_path / "out").exists()


def test_a_diagonal_does_not_tell_of_groups(tmp_path):
    gram = nm.Gram(jnp.ones((2, 4, 4)), jnp.ones((2, 4)), jnp.ones(2), "iiio", groups=2)
    with pytest.raises(ValueError, match=r"conv/kernel: .* 2 feature groups"):
        nm.save_scores(tmp_path / "scores", {"conv": {"kernel": gram}})
