"""The language-model results: what is learned, judged, shown and compared."""

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from rich.console import Console
from safetensors.numpy import load_file

from experiments.configs import language, language_model, refresh_interval
from experiments.configs.study import Preset, Study, Variant, folder
from experiments.harness import Run
from experiments.networks import LanguageModel
from experiments.train.folder import MODEL

TOKENS = np.random.default_rng(0).integers(0, 3, 400).astype(np.int32)
DATA = language.Pieces("random", TOKENS[:300], TOKENS[300:], 8)
SMALL = LanguageModel(vocabulary=11, width=8, hidden=16, layers=1, heads=2, positions=8)
PRESET = Preset(language.AdamW(epochs=2, batch=9, rate=0.03), SMALL, lambda folder: DATA, seeds=1)
VARIANTS = (Variant("dense"), Variant("2:4-T", "2:4-T", refresh_every=2))


def test_every_token_is_to_be_guessed_from_those_before():
    inputs, targets = DATA.test
    assert inputs.shape == targets.shape == (12, 8)
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    np.testing.assert_array_equal(targets.ravel(), DATA.held_out[1:97])
    parts = [*DATA.tests(5)]
    assert [len(x) for x, _ in parts] == [5, 5, 2]
    np.testing.assert_array_equal(np.concatenate([y for _, y in parts]), targets)
    batch = DATA.batches(4, seed=1)
    for one, again in zip(batch(3), DATA.batches(4, seed=1)(3), strict=True):
        np.testing.assert_array_equal(one, again)
    assert not np.array_equal(batch(3)[0], batch(4)[0])
    assert (DATA.count, DATA.head(7).count, len(DATA.head(7).test[0])) == (37, 7, 7)


@pytest.mark.slow
def test_sparse_and_dense_are_trained_and_shown_by_their_loss(tmp_path):
    experiment = language.experiment(Study("toy", VARIANTS, {"cpu": PRESET}, language.DENSE, figures=language.FIGURES))
    options = type("Options", (), {"quick": False, "minutes": None, "runs": tmp_path, "seeds": None})
    options.data = options.weights = None
    run = Run(options, "cpu", Console(quiet=True), tmp_path / "cpu.json", "toy")
    result = run.record(experiment.measure(run))
    dense, sparse = result["rows"]
    assert dense["evaluations"]["test_loss"][-1] < 1.6  # log(11) = 2.4 at the start, log(3) = 1.1 at best
    for variant, row in zip(VARIANTS, result["rows"], strict=True):
        arrays = load_file(tmp_path / "toy/cpu" / folder(variant, 0) / MODEL)
        params = unflatten_dict({tuple(name.split("/")): value for name, value in arrays.items()})
        assert 30 < row["evaluations"]["accuracy"][-1] < 60  # of tokens, not of pieces; one of three is chance
        assert row["evaluations"]["test_loss"][-1] == pytest.approx(held_out_loss(params), abs=1e-4)
        kept = params["params"]["layer0"]["ffn1"]["kernel"] != 0
        along = kept.reshape(2, 4, 16).sum(1).max(), kept.reshape(8, 4, 4).sum(2).max()
        assert along == ((2, 2) if variant.pattern else (4, 4))
    (shown,) = experiment.tables(result)
    assert shown.rows[0][:3] == ("dense", f"{dense['evaluations']['test_loss'][-1]:.4f}", None)
    assert shown.rows[1][2] == f"{sparse['evaluations']['test_loss'][-1] - dense['evaluations']['test_loss'][-1]:+.4f}"
    assert shown.rows[1][3].endswith(" %") and shown.rows[1][-1] == "2 of 2"


def held_out_loss(variables):
    """Mean over all held-out tokens, of the probabilities themselves."""
    inputs, targets = DATA.test
    logits = np.asarray(jax.jit(SMALL.apply)(variables, inputs), np.float64)
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return -np.log(np.take_along_axis(chances, targets[..., None], -1)).mean()


def test_texts_with_more_characters_than_tokens_are_refused(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("".join(map(chr, range(48, 48 + 66))) * 2)
    with pytest.raises(ValueError, match=r"mine\.txt: 66 different characters; the network has 65 tokens"):
        language.read(path, 8)
    path.write_text("abcd" * 50)
    assert language.read(path, 8).source == "mine"


def test_what_is_compared():
    found = [(v.pattern, v.refresh_every) for v in language_model.VARIANTS if v.pattern]
    assert found == [("4:8", 1), ("2:4-T", 40), ("4:8-T", 40)]
    assert {v.refresh_every for v in refresh_interval.STUDY.variants} == {1, 10, 40, 100}
    assert all(preset.seeds == 3 for preset in language.PRESETS.values())


def test_only_the_head_and_the_embeddings_stay_dense():
    module = language.PRESETS["cpu"].module
    params = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    patterns = language_model.VARIANTS[2].sparse
    state = jax.eval_shape(patterns(language.AdamW(epochs=1).optimiser(1), list(language.DENSE)).init, params)
    sparse = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(language_masks(state))}
    assert len(sparse) == 6 * module.layers and all("layer" in path and "kernel" in path for path in sparse)


def language_masks(state):
    return state.masks
