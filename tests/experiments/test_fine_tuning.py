"""The fine-tuned encoders: schedule, batches, losses, and studies from weights to tables, with a vocabulary of 30."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from rich.console import Console
from safetensors.numpy import load_file
from scipy import stats

from experiments.configs import fine_tuning, squad, sst_2, sts_b
from experiments.configs.fine_tuning import Encoder, Examples, FineTuning
from experiments.configs.study import Preset, Variant, folder
from experiments.data import squad_score, squad_windows
from experiments.data.errors import DataError
from experiments.data.glue import Sentences
from experiments.data.squad import Question
from experiments.data.wordpiece import Tokenizer
from experiments.harness import Run
from experiments.networks import bert
from experiments.train.folder import MODEL
from tests.experiments import golden_bert

WORDS = [f"w{k}" for k in range(26)]
TOKENIZER = Tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])
CONFIG = bert.Config(vocabulary=30, width=16, hidden=32, layers=2, heads=4, positions=256)
SHAPES = json.loads(golden_bert.FILE.read_text())["pooled"]["shapes"]
WEIGHTS = golden_bert.weights(SHAPES | {"embeddings.position_embeddings.weight": [256, 16]})
START = Encoder(WEIGHTS, TOKENIZER)
RECIPE = FineTuning(epochs=2, batch=8, rate=1e-3)
DRAW = np.random.default_rng(0)


def sentences(count):
    return [" ".join(DRAW.choice(WORDS, DRAW.integers(3, 9))) for _ in range(count)]


def question(number):
    """The answer is the word after the one that is asked for."""
    words = list(DRAW.choice(WORDS, 12, replace=False))
    place = int(DRAW.integers(11))
    answer = words[place + 1]
    at = len(" ".join(words[: place + 1])) + 1
    return Question(f"q{number}", words[place], " ".join(words), ((answer, at),))


PAIRS = [Sentences(sentences(n), sentences(n), DRAW.uniform(0, 5, n)) for n in (24, 13)]
LABELLED = [Sentences(sentences(n), None, DRAW.integers(0, 2, n).astype(np.int32)) for n in (24, 13)]
QUESTIONS = [[question(k) for k in range(n)] for n in (24, 13)]


def preset(module, data):
    return Preset(RECIPE, module(CONFIG), lambda path: Examples("toy", *data), lambda path: START, seeds=1)


STUDIES = {each.STUDY.name: each.STUDY for each in (sts_b, sst_2, squad)}
PRESETS = {
    "sts_b": preset(bert.SentenceEmbedding, PAIRS),
    "sst_2": preset(bert.Classification, LABELLED),
    "squad": preset(bert.SpanExtraction, QUESTIONS),
}


def task(name):
    chosen = PRESETS[name]
    return STUDIES[name].learned(chosen, chosen.data(None), START, 0)


def test_the_rate_rises_for_a_tenth_and_falls_to_nothing():
    rate = FineTuning(epochs=2, rate=4e-5).schedule(50)
    found = [float(rate(step)) for step in (0, 5, 10, 55, 100)]
    np.testing.assert_allclose(found, [0, 2e-5, 4e-5, 2e-5, 0], atol=1e-12)


@pytest.mark.parametrize("name", PRESETS)
def test_a_batch_is_a_function_of_its_number(name):
    one, again = task(name), task(name)
    for number in (0, 7, 3):
        first, second = one.batch(number), again.batch(number)
        assert {len(each) for each in first} == {8}
        for x, y in zip(first, second, strict=True):
            np.testing.assert_array_equal(x, y)
    assert any(not np.array_equal(x, y) for x, y in zip(one.batch(0), one.batch(1), strict=True))


def test_losses_are_those_of_their_formulas():
    """Of logits and vectors by NumPy in float64; padding has no chance to be an answer."""
    logits = DRAW.normal(size=(3, 5, 2)).astype(np.float32)
    attended = np.arange(5) < np.array([[5], [3], [2]])
    answer = np.array([[4, 4], [0, 2], [1, 1]])
    chances = np.exp(logits.astype(np.float64)) * attended[..., None]
    chances /= chances.sum(1, keepdims=True)
    wanted = -np.mean([np.log(chances[k, answer[k, j], j]) for k in range(3) for j in range(2)])
    np.testing.assert_allclose(float(squad.span_loss(logits, attended, answer)), wanted, rtol=1e-6)


def test_questions_are_learned_by_the_windows_of_their_answers():
    tokens, attended, segments, answer = task("squad").batch(2)
    for row, (first, last) in enumerate(answer):
        asked = tokens[row, 1]
        found = np.flatnonzero((tokens[row] == asked) & (segments[row] == 1))
        assert first == last == found[0] + 1 and attended[row, first]


VARIANTS = {
    "sts_b": ("2:4-T", "2:4-T", None),
    "sst_2": ("ASP 2:4", "2:4", None),
    "squad": ("4:8-T, every 40", "4:8-T", 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_studies_from_weights_to_tables(name, tmp_path):
    title, pattern, every = VARIANTS[name]
    variants = (Variant("dense"), Variant(title, pattern, refresh_every=every))
    study = dataclasses.replace(STUDIES[name], variants=variants, presets={"cpu": PRESETS[name]})
    options = type("Options", (), {"quick": False, "minutes": None, "runs": tmp_path, "seeds": None})
    options.data = options.weights = None
    run = Run(options, "cpu", Console(quiet=True), tmp_path / "cpu.json", name)
    result = run.record(study.experiment().measure(run))
    n, m = map(int, pattern.removesuffix("-T").split(":"))
    for variant, row in zip(variants, result["rows"], strict=True):
        arrays = load_file(tmp_path / name / "cpu" / folder(variant, 0) / MODEL)
        params = unflatten_dict({tuple(key.split("/")): value for key, value in arrays.items()})["params"]
        for figure, value in judged(name, params).items():
            assert row["evaluations"][figure][-1] == pytest.approx(value, abs=1e-3)
        kept = params["bert"]["layer0"]["ffn1"]["kernel"] != 0
        most = kept.reshape(16 // m, m, 32).sum(1).max(), kept.reshape(16, 32 // m, m).sum(2).max()
        assert most[0] == (n if variant.pattern else m)
        assert most[1] == (n if (variant.pattern or "").endswith("-T") else m)
    (shown,) = study.experiment().tables(result)
    assert [row[0] for row in shown.rows] == ["dense", title] and shown.rows[1][-1] == "1 (2 of 2 epochs)"


def judged(name, params):
    """The figures of a model, one example at a time and without padding."""
    module = PRESETS[name].module

    def outputs(*parts):
        tokens, segments = (np.array([each], np.int32) for each in TOKENIZER.joined(*parts))
        return np.asarray(module.apply({"params": params}, tokens, np.ones_like(tokens, bool), segments))[0]

    def pieces(text):
        return TOKENIZER.pieces([text])[0][0]

    if name == "sts_b":
        first, second = ([outputs(pieces(text)) for text in each] for each in (PAIRS[1].first, PAIRS[1].second))
        cosine = [float(one @ other) for one, other in zip(first, second, strict=True)]
        return {"spearman": 100 * stats.spearmanr(cosine, PAIRS[1].labels).statistic}
    if name == "sst_2":
        found = [outputs(pieces(text)).argmax() for text in LABELLED[1].first]
        return {"accuracy": 100 * np.mean(np.array(found) == LABELLED[1].labels)}
    windows = squad_windows.windows(QUESTIONS[1], TOKENIZER, length=256)
    logits = [outputs(pieces(each.question), pieces(each.context)) for each in QUESTIONS[1]]
    return squad_score.score(QUESTIONS[1], squad_windows.answers(QUESTIONS[1], windows, logits))


def test_what_does_not_fit_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"embeddings\.\S+ is \(.*16.*\), and the network wants \(.*32.*\)"):
        START.variables(bert.SpanExtraction(dataclasses.replace(CONFIG, width=32)), 0, ("span",))
    with pytest.raises(DataError, match=r"--weights FOLDER/model\.safetensors"):
        fine_tuning.public(None)
    with pytest.raises(DataError, match=r"No such file or directory: .*model\.safetensors"):
        fine_tuning.public(tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"name the folder of train-v1\.1\.json and dev-v1\.1\.json, --data"):
        squad.official(None)
    (tmp_path / "train-v1.1.json").write_text("{")
    with pytest.raises(DataError, match=r"train-v1\.1\.json: no JSON"):
        squad.official(tmp_path)
    (tmp_path / "train.tsv").write_text("sentence\tlabel\nfine\t2\n")
    with pytest.raises(DataError, match=r"train\.tsv: line 2: label is '2', not 0 or 1"):
        sst_2.read(tmp_path)
    with pytest.raises(DataError, match=r"stsb-en-train\.csv"):
        sts_b.read(tmp_path)


def test_the_vocabulary_of_a_tokenizer_is_held_against_the_weights():
    with pytest.raises(DataError, match="30 pieces and the word embedding 29 rows"):
        Encoder(WEIGHTS | {"embeddings.word_embeddings.weight": np.zeros((29, 16))}, TOKENIZER).variables(
            bert.Bert(dataclasses.replace(CONFIG, vocabulary=29)), 0
        )


def test_presets_are_the_papers():
    assert squad.STUDY.presets["paper"].module.config == bert.LARGE
    assert {v.pattern for v in squad.VARIANTS} == {None, "2:4", "2:4-T", "4:8-T"}
    assert (
        jax.tree.leaves([p.recipe.batch for s in (squad, sst_2, sts_b) for p in s.STUDY.presets.values()]) == [32] * 9
    )
