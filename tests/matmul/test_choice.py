"""Which implementation runs a product, and what is said where none does."""

import dataclasses
import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nm_jax.matmul import (
    IMPLEMENTATIONS,
    Implementation,
    Measurement,
    Product,
    _choice,
    ampere,
    load_profile,
    nm_matmul,
    profile_path,
    reference,
    save_profile,
)
from tests.matmul.cases import gpu, transposable
from tests.matmul.implementations import REFERENCE

GPU = gpu("9.0", "Test GPU")
MEASURED = Measurement(
    "Test GPU", "fast", 1, jax.__version__, "bfloat16", 4096, 1024, 2048, dense=1.0, sparse=0.6, packing=0.2
)
ASKED = Product(jnp.bfloat16, 4096, 1024, 2048)


def kernel(name="fast", reason=None, product=reference.product, version=1):
    return Implementation(name, lambda *_: reason, product, version=version)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A GPU with a kernel, and a profile of its own."""
    monkeypatch.setenv("NM_JAX_PROFILE", str(tmp_path / "profile.json"))
    _choice.warn_once.cache_clear()

    def set_up(*kernels):
        monkeypatch.setattr(_choice, "IMPLEMENTATIONS", (*kernels, REFERENCE))

    set_up(kernel())
    return set_up


def measure(**changes):
    save_profile([dataclasses.replace(MEASURED, **changes)])


def ask(**changes):
    return _choice.choose(None, dataclasses.replace(ASKED, **changes), GPU)


# ------------------------------------------------------------------------------------------------ a table of choices

# What an H100 might give: tokens, rows, k, seconds of the dense product, of the sparse one and of packing.
H100 = gpu("9.0", "NVIDIA H100 80GB HBM3")
TIMES = [
    (4096, 4096, 4096, 190e-6, 150e-6, 50e-6),
    (8192, 8192, 8192, 1500e-6, 1000e-6, 160e-6),
    (8192, 14336, 4096, 1350e-6, 1000e-6, 140e-6),
]
CHOICES = [
    # shape, packed, dtype -> sparse, or what the warning says
    ((8192, 8192, 8192), False, "bfloat16", None),
    ((65536, 8192, 8192), False, "bfloat16", None),  # larger than measured: trusted
    ((8192, 16384, 16384), False, "bfloat16", None),
    ((8192, 8192, 8192), True, "bfloat16", None),
    ((6000, 8192, 8192), False, "bfloat16", None),  # a little smaller
    ((4096, 4096, 4096), False, "bfloat16", "what was measured at 4096 x 4096 x 4096, .* 0.95 times"),
    ((4096, 4096, 4096), True, "bfloat16", None),  # 1.27 times, without packing
    ((65536, 4096, 4096), False, "bfloat16", None),  # more tokens: packing counts less
    ((2048, 4096, 4096), True, "bfloat16", None),  # half the tokens: 1.07
    ((1024, 4096, 4096), True, "bfloat16", "expected to run at 0.87 times the dense speed"),
    ((2048, 2048, 2048), True, "bfloat16", "expected to run at 0.67 times the dense speed"),
    ((8192, 14336, 4096), False, "bfloat16", None),
    ((40, 8192, 8192), True, "bfloat16", "hopper: tiles of .* fit .* badly"),
    ((8192, 8192, 8192), False, "float32", "hopper: the dtype is float32"),
]


@pytest.mark.parametrize(("sizes", "packed", "dtype", "why"), CHOICES)
def test_choices_on_an_h100(machine, monkeypatch, sizes, packed, dtype, why):
    monkeypatch.setattr(_choice, "IMPLEMENTATIONS", IMPLEMENTATIONS)
    monkeypatch.setattr(ampere, "FIRST_JAX", (0, 10, 0))
    save_profile(
        [
            Measurement(H100.device_kind, "hopper", IMPLEMENTATIONS[0].version, jax.__version__, "bfloat16", *row)
            for row in TIMES
        ]
    )
    product = Product(dtype, *sizes, packed)
    if why is None:
        assert _choice.choose(None, product, H100).name == "hopper"
        return
    shape = " x ".join(map(str, sizes))
    with pytest.warns(UserWarning, match=rf"k = {shape}\) runs dense on NVIDIA H100.*{why}") as said:
        assert _choice.choose(None, product, H100) is None
    assert "ampere: the d" in str(said[0].message)  # device, or dtype
    with warnings.catch_warnings(action="error"):  # said once
        assert _choice.choose(None, product, H100) is None


# ------------------------------------------------------------------------------------------------------- the profile


def test_expected_gain_by_hand():
    """Tokens share the packing; each halving of a size loses a fifth of the dense speed; doubling loses nothing."""
    for change, expected in [
        ({}, 1 / 0.8),
        ({"packed": True}, 1 / 0.6),
        ({"tokens": 8192}, 1 / 0.7),
        ({"tokens": 2048}, 1 / 1.0 - 0.2),
        ({"rows": 512, "k": 1024, "packed": True}, 1 / 0.6 - 0.4),
        ({"rows": 2048, "k": 1024, "packed": True}, 1 / 0.6 - 0.2),
    ]:
        gain = MEASURED.expected_gain(dataclasses.replace(ASKED, **change))
        np.testing.assert_allclose(gain, expected, rtol=1e-12, err_msg=str(change))


def test_a_kernel_is_chosen_where_it_is_expected_to_pay(machine):
    measure()
    assert ask().name == "fast"
    assert ask(tokens=16 * 4096).name == "fast"
    with pytest.warns(UserWarning, match="measured at 4096 x 1024 x 2048, it is expected to run at 0.80 times"):
        assert ask(tokens=2048) is None
    with pytest.warns(UserWarning, match="it was not measured in float32"):
        assert ask(dtype=jnp.float32) is None


def test_float16_is_taken_to_run_as_bfloat16_does_and_that_is_said_unless_it_was_measured(machine):
    measure()
    with pytest.warns(UserWarning, match="not measured in float16, and is taken to run as it was measured in bfloat16"):
        assert ask(dtype=jnp.float16).name == "fast"
    with warnings.catch_warnings(action="error"):  # said once
        assert ask(dtype=jnp.float16).name == "fast"
    save_profile([MEASURED, dataclasses.replace(MEASURED, dtype="float16", sparse=1.5)])
    with pytest.warns(UserWarning, match="expected to run at 0.59 times"):
        assert ask(dtype=jnp.float16) is None


def test_packing_counts_unless_the_weight_is_packed(machine):
    measure(packing=0.5)
    with pytest.warns(UserWarning, match="0.91 times"):
        assert ask() is None
    assert ask(packed=True).name == "fast"


def test_the_nearest_measured_shape_decides(machine):
    """Never a model against a measurement: at 2048 tokens it was slow, whatever 4096 promise."""
    save_profile([MEASURED, dataclasses.replace(MEASURED, tokens=2048, sparse=1.5)])
    assert ask(tokens=3500, packed=True) is not None
    with pytest.warns(UserWarning, match="measured at 2048 x 1024 x 2048"):
        assert ask(tokens=2200, packed=True) is None


def test_the_kernel_that_gains_most_is_chosen_and_one_that_cannot_run_is_named(machine):
    machine(kernel("slow"), kernel("fast", reason="it rains"))
    save_profile([MEASURED, dataclasses.replace(MEASURED, implementation="slow", sparse=0.7)])
    with pytest.warns(UserWarning, match="'fast' was measured to pay but is not used: it rains"):
        assert ask().name == "slow"
    with warnings.catch_warnings(action="error"):  # said once
        assert ask().name == "slow"
    with pytest.raises(ValueError, match="it rains"):
        _choice.choose("fast", ASKED, GPU)


def test_a_gpu_without_measurements_says_why_it_is_dense(machine):
    with pytest.warns(UserWarning, match=r"runs dense on Test GPU: fast: it was not measured.*profile\.json"):
        assert ask() is None
    machine(kernel(reason="jax 0.1 lacks the parts of Pallas that it needs"))
    with pytest.warns(UserWarning, match="runs dense on Test GPU: fast: jax 0.1 lacks"):
        assert ask() is None


def test_what_was_measured_of_another_version_of_the_kernel_does_not_count(machine):
    machine(kernel(version=2))
    measure()
    with pytest.warns(UserWarning) as said:
        assert ask() is None
    assert "another version of the sparse kernel 'fast'" in str(said[0].message)
    assert "this version of it was not measured; run" in str(said[1].message)


def test_what_was_measured_with_another_jax_counts_and_is_reported(machine):
    measure(jax="0.0.1")
    with pytest.warns(UserWarning, match="measured with jax 0.0.1, and this is"):
        assert ask().name == "fast"
    with warnings.catch_warnings(action="error"):  # said once
        assert ask().name == "fast"


def test_profiles_are_saved_and_merged(machine, tmp_path, monkeypatch):
    assert load_profile() == ()
    other = dataclasses.replace(MEASURED, device="Other GPU")
    save_profile([MEASURED, other])
    newer = dataclasses.replace(MEASURED, sparse=0.5)
    assert save_profile([newer]) == profile_path() == tmp_path / "profile.json"
    assert set(load_profile()) == {newer, other}
    (tmp_path / "bad.json").write_text(json.dumps([{"device": 1}]))
    with pytest.raises(ValueError, match=r"bad\.json is no profile.*measure again"):
        load_profile(tmp_path / "bad.json")
    monkeypatch.delenv("NM_JAX_PROFILE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert profile_path() == tmp_path / "nm_jax" / "matmul.json"


# ------------------------------------------------------------------------------------------------------ configurations


@dataclasses.dataclass(frozen=True)
class Tile:
    size: int = 64
    stages: int = 2


def tiled(product, device, config=None):
    """Tiles must not be larger than the tokens."""
    del device
    return None if product.tokens >= (config or Tile()).size else f"{config} is too large"


TILED = Implementation("fast", tiled, lambda a, x, config=None: reference.product(a, x), config=Tile)


def settings(chosen):
    """The configuration that was chosen; `None`: the kernel's own."""
    return chosen.product.keywords["config"] if isinstance(chosen.product, functools.partial) else None


def test_a_kernel_runs_in_the_configuration_that_was_measured_to_be_the_fastest(machine):
    machine(TILED)
    large, small = (("size", 256), ("stages", 3)), (("size", 32),)
    save_profile(
        [
            MEASURED,
            dataclasses.replace(MEASURED, sparse=0.5, config=large),
            dataclasses.replace(MEASURED, sparse=0.4, config=small),
            dataclasses.replace(MEASURED, sparse=0.7, config=small),  # the other side; the slower one counts
            dataclasses.replace(MEASURED, tokens=512, sparse=0.4, packing=0.01, config=small),
        ]
    )
    assert settings(ask()) == settings(ask(tokens=8192)) == settings(ask(rows=512)) == Tile(256, 3)
    assert settings(ask(tokens=512)) == Tile(32)
    assert settings(ask(rows=400, packed=True)) is None  # not half of what was measured
    assert ask() is ask(tokens=8192)  # one object, so that programs are compiled once
    assert settings(_choice.choose("fast", ASKED, GPU)) == Tile(256, 3)
    assert settings(_choice.choose(TILED, ASKED, GPU)) is None
    with pytest.raises(ValueError, match="too large"):
        _choice.choose("fast", dataclasses.replace(ASKED, tokens=16), GPU)


def test_a_configuration_that_does_not_fit_or_does_not_exist_is_left_aside(machine):
    machine(TILED)
    measure(config=(("size", 5000),))
    assert ask() is TILED  # its tile is larger than the 4096 tokens
    for kernel, config, why in [
        (TILED, (("width", 3),), "unexpected keyword argument 'width'"),
        (dataclasses.replace(TILED, config=None), (("size", 3),), "it has none at all"),
    ]:
        machine(kernel)
        measure(config=config)
        with pytest.warns(UserWarning, match=f"fast has no configuration .*{why}.*run python"):
            assert ask() is kernel


def test_a_configuration_survives_its_file(machine):
    kept = dataclasses.replace(MEASURED, config=(("size", 256), ("stages", 3)))
    save_profile([kept])
    assert load_profile() == (kept,)


@pytest.mark.parametrize("kernel", [i for i in IMPLEMENTATIONS if i.is_kernel], ids=lambda i: i.name)
def test_the_kernels_take_their_configurations(kernel):
    shaped = _choice._configured(kernel, (("tile_k", 128), ("stages", 2)))
    assert settings(shaped) == shaped.supports.keywords["config"] == kernel.config(tile_k=128, stages=2)


# ------------------------------------------------------------------------------------------------------ self-checks


def wrong(a, x):
    return reference.product(a, x) + 1


def broken(a, x):
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize("product, words", [(wrong, "it is wrong on a small product, by 1"), (broken, "no such instr")])
def test_a_kernel_that_fails_its_self_check_is_never_used(machine, product, words):
    cpu = jax.devices()[0]
    machine(kernel(product=product))
    measure(device=cpu.device_kind)
    with pytest.raises(ValueError, match=words):
        _choice.choose("fast", ASKED, cpu)
    with pytest.warns(UserWarning, match=words):
        assert _choice.choose(None, ASKED, cpu) is None


def test_the_self_check_runs_once_and_also_while_tracing(machine):
    runs = []

    def counted(a, x):
        runs.append(x.shape)
        return reference.product(a, x)

    implementation = kernel(product=counted)
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.normal(size=(5, 24)), jnp.float32)
    w = jnp.asarray(np.where(transposable(24, 16), generator.normal(size=(24, 16)), 0), jnp.float32)
    for _ in range(2):
        y = jax.jit(functools.partial(nm_matmul, implementation=implementation))(x, w)
    np.testing.assert_allclose(y, x @ w, rtol=1e-5, atol=1e-5)
    assert runs.count((256, 512)) == 1


# ------------------------------------------------------------------------------------------------------------ meshes


@pytest.mark.parametrize(
    ("kind", "chosen"), [(jax.sharding.AxisType.Auto, False), (jax.sharding.AxisType.Manual, True)]
)
def test_under_a_mesh_that_the_compiler_partitions_the_default_is_dense_and_says_so(machine, kind, chosen):
    measure()
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("data",), axis_types=(kind,))):
        if chosen:
            assert ask().name == "fast"
        else:
            with pytest.warns(UserWarning, match=r"runs dense on Test GPU.*call it inside jax\.shard_map"):
                assert ask() is None
