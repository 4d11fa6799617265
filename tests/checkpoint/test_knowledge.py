"""What every tensor of well-known models is, against layouts written by hand; and of tensors that say too little."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import nm_jax as nm
from nm_jax.checkpoint.knowledge import Contents, identify
from tests.checkpoint.cases import normal
from tests.checkpoint.families import FAMILIES, Family
from tests.checkpoint.families_more import MORE
from tests.checkpoint.families_recent import RECENT
from tests.helpers import worst_group

EVERY = FAMILIES | MORE | RECENT


def parsed(family: Family) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes by name, with biases, and what each tensor that has a line is."""
    shapes, kinds = {}, {}
    for line in filter(None, map(str.strip, family.tensors.splitlines())):
        name, shape, kind, *bias = line.split()
        shapes[name] = tuple(map(int, shape.split("x")))
        kinds[name] = kind
        if bias:
            shapes[name.rpartition(".")[0] + ".bias"] = (int(bias[0]),)
    return shapes, kinds


def contents(family: Family, shapes) -> Contents:
    config = {"model_type": family.model_type} if family.model_type else None
    return Contents(shapes, config, {"format": family.format} if family.format else None)


def is_axes(kind: str) -> bool:
    return set(kind) <= set("iob")


def check(found: Contents, name: str, kind: str) -> None:
    finding = identify(found, name)
    known = finding.axes if finding.axes is not None and finding.kept is None else None
    if is_axes(kind):
        assert known is not None, f"{name}: {finding}"
        assert (known.axes, known.either) == (kind, False), f"{name}: {known}"
        assert known.source
    else:
        assert known is None or known.either, f"{name}: {known}"
        said = [finding.kept.reason if finding.kept else "", finding.doubt, known.source if known else ""]
        assert kind.strip(".") in " ".join(said), f"{name}: {finding}"


@pytest.mark.parametrize("family", EVERY)
def test_families(family):
    this = EVERY[family]
    shapes, kinds = parsed(this)
    found = contents(this, shapes)
    for name, kind in kinds.items():
        check(found, name, kind)


@pytest.mark.parametrize("family", [name for name, family in EVERY.items() if family.model_type])
@pytest.mark.parametrize("lost", ["config", "biases"])
def test_with_less_to_go_by_nothing_gets_other_axes(family, lost):
    """Without `config.json`, or without biases, more is not known, and what is known is the same."""
    this = EVERY[family]
    shapes, kinds = parsed(this)
    if lost == "config":
        this = this._replace(model_type="")
    else:
        shapes = {name: shape for name, shape in shapes.items() if name in kinds}
    found = contents(this, shapes)
    for name, kind in kinds.items():
        finding = identify(found, name)
        if is_axes(kind) and finding.axes is not None and not finding.axes.either:
            assert finding.axes.axes == kind, f"{name}: {finding}"
        elif not is_axes(kind):
            check(found, name, "...")


@pytest.mark.parametrize("wrapped", ["_orig_mod.", "module.", "base_model.model.", "params/"])
def test_wrappers_change_nothing(wrapped):
    shapes, kinds = parsed(FAMILIES["bert"])
    found = contents(FAMILIES["bert"], {wrapped + name: shape for name, shape in shapes.items()})
    for name, kind in kinds.items():
        check(found, wrapped + name, kind)


def test_a_config_that_does_not_fit_is_not_believed():
    """`config.json` of GPT-2 beside weights of nanoGPT, and the other way round."""
    shapes, _ = parsed(FAMILIES["nanogpt"])
    check(Contents(shapes, {"model_type": "gpt2"}), "_orig_mod.transformer.h.0.attn.c_proj.weight", "otherwise")
    shapes, _ = parsed(FAMILIES["gpt2"])
    check(Contents(shapes, {"model_type": "gpt_bigcode"}), "transformer.h.0.attn.c_proj.weight", "otherwise")


@pytest.mark.parametrize("model_type", [None, 3, [], ""])
def test_a_config_without_a_model_says_nothing(model_type):
    shapes, kinds = parsed(FAMILIES["llama"])
    found = Contents(shapes, {"model_type": model_type})
    for name, kind in kinds.items():
        check(found, name, kind)


@pytest.mark.parametrize(
    ("entering", "leaving", "axes"),
    [
        ((4, 64, 256), (4, 128, 64), "bio"),
        ((4, 256, 64), (4, 64, 128), "boi"),
        ((4, 64, 64), (4, 32, 64), "bio"),  # as wide as gate and up together
        ((4, 64, 64), (4, 64, 32), "boi"),
        ((4, 64, 128), (4, 64, 64), "bio"),  # as wide as an expert
        ((4, 128, 64), (4, 64, 64), "boi"),
        ((4, 64, 128), (4, 128, 64), "stack"),  # no gate: not what the names say
    ],
)
def test_experts_tell_their_order_together(entering, leaving, axes):
    found = Contents({"mlp.experts.gate_up_proj": entering, "mlp.experts.down_proj": leaving})
    for name in found.shapes:
        check(found, name, axes)


@pytest.mark.parametrize("shape", [(4, 128, 64), (4, 64, 128)])
def test_experts_without_a_gate_need_their_router(shape):
    alone = Contents({"moe.experts.up_proj": shape})
    check(alone, "moe.experts.up_proj", "stack")
    check(
        Contents({"moe.experts.up_proj": shape, "moe.gate.weight": (4, 64)}),
        "moe.experts.up_proj",
        "bio" if shape[1] == 64 else "boi",
    )


def test_a_config_beside_the_file_is_read(tmp_path):
    shapes, _ = parsed(FAMILIES["gpt2, square only"])
    save_file({name: normal(0, shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    report = nm.prune_checkpoint(tmp_path / "model.safetensors", tmp_path / "out", "2:4")
    assert report["h.0.attn.c_proj.weight"].record.source == "config: gpt2, Conv1D"
    assert worst_group(load_file(tmp_path / "out")["h.0.attn.c_proj.weight"], 0, 4) == 2


def test_a_transposable_mask_is_the_same_in_either_orientation(tmp_path):
    """Why a matrix whose orientation is not known may be pruned to one."""
    save_file({"h.c_proj.weight": normal(0, (16, 16))}, tmp_path / "in")
    masks = []
    for k, rules in enumerate(["2:4-T", [(".", "2:4-T", "io")], [(".", "2:4-T", "oi")]]):
        nm.prune_checkpoint(tmp_path / "in", tmp_path / f"out{k}", rules)
        masks.append(load_file(tmp_path / f"out{k}")["h.c_proj.weight"] != 0)
    np.testing.assert_array_equal(masks[0], masks[2])
    np.testing.assert_array_equal(masks[1], masks[2])
