"""What the cost model counts, and what it chooses."""

import dataclasses
import itertools

import jax.numpy as jnp
import pytest

from nm_jax.matmul import Product, _hopper_cost, _tiles, hopper
from tests.matmul.cases import gpu

NAMES = {(192, 3): "192 x 192", (256, 2): "128 x 256", (128, 2): "128 x 128", (64, 2): "128 x 64"}


def name(config):
    tile = NAMES[config.tile_tokens, config.groups]
    return tile if config.cluster == 2 else f"{tile} alone"


@pytest.mark.parametrize(
    ("config", "l2_bytes", "tensor", "shared"),
    [
        # values 128 * 64, words 1024, X 256 * 64 * 2; four m64n256k32: 128 cycles, 2 kB + 16 kB of operands
        (hopper.Config(256, 2, cluster=1), 8192 + 1024 + 32768, 4 * 128, 4 * 144 + 8),
        (hopper.Config(256, 2, cluster=2), 8192 + 1024 + 16384, 4 * 128, 4 * 144 + 8),
        (hopper.Config(192, 3, stages=5), 12288 + 1536 + 12288, 6 * 96, 6 * 112 + 12),
        (hopper.Config(256, 2, tile_k=128, stages=2), 2 * (8192 + 1024 + 16384), 8 * 128, 8 * 144 + 16),
    ],
)
def test_counts_by_hand(config, l2_bytes, tensor, shared):
    step = _hopper_cost.step(config)
    assert (step.l2_bytes, step.tensor_cycles, step.shared_cycles) == (l2_bytes, tensor, shared)
    assert step.cycles == max(l2_bytes / 39, tensor, shared)


def test_bytes_of_a_stage_are_those_of_its_tiles():
    for config in hopper.SHIPPED:
        tokens, rows, k = config.tile_tokens, config.tile_rows, config.tile_k
        assert config.stage_bytes == (rows * k // 2 * 2, rows * k // 2 // 4, tokens * k * 2)
        assert config.shared_bytes <= hopper.SHARED_BYTES


def test_cycles_of_a_product_by_hand():
    """8192 x 8192: 43 x 44 tiles of 192 x 192, 15 rounds on 132 multiprocessors of 128 steps each."""
    config = hopper.Config(192, 3, stages=5)
    tiles = 15 * (128 * 684 + 192 * 192 * 2 / 39)
    assert _hopper_cost.cycles(config, 8192, 8192, 8192) == pytest.approx(_hopper_cost.START + tiles)
    flying = dataclasses.replace(config, in_flight=1)
    assert _hopper_cost.cycles(flying, 8192, 8192, 8192) == pytest.approx(15 * _hopper_cost.START + tiles)


def test_a_product_runs_on_as_many_multiprocessors_as_there_are(monkeypatch):
    assert _hopper_cost.processors() == 132
    pcie = gpu("9.0")
    pcie.core_count = 114
    monkeypatch.setattr(_hopper_cost.jax, "devices", lambda: [pcie])
    assert _hopper_cost.processors() == 114


@pytest.mark.parametrize(
    ("sizes", "chosen"),
    [
        ((8192, 8192, 8192), "192 x 192"),
        ((16384, 4096, 4096), "192 x 192"),
        ((8192, 14336, 4096), "192 x 192"),
        ((4096, 4096, 4096), "128 x 256"),  # 256 clusters in four rounds, where 22 x 22 tiles would need four, too
        ((1024, 4096, 4096), "128 x 256"),  # one round
        ((512, 1024, 1024), "128 x 64"),  # small: as many blocks as there are multiprocessors
        ((100, 11008, 4096), "128 x 128"),
        ((4096, 384, 1024), "128 x 128 alone"),  # pairs of 128 rows would pad 384 by a third
        ((8192, 192, 1024), "192 x 192 alone"),
        ((4096, 128, 256), "128 x 64 alone"),
    ],
)
def test_what_is_chosen(sizes, chosen):
    assert name(hopper.default_config(*sizes)) == chosen


def test_what_is_chosen_is_refused_only_where_all_are():
    for sizes in itertools.product((40, 52, 64, 100, 333, 4096), (64, 128, 200, 384, 1100), (64, 1000)):
        refused = [_tiles.padding(sizes, config.tiles) > _tiles.MOST_PADDING for config in hopper.SHIPPED]
        reason = hopper.supports(Product(jnp.bfloat16, *sizes), gpu("9.0"))
        assert (reason is not None) == all(refused), sizes


@pytest.mark.parametrize(("sizes", "raster"), [((8192, 8192, 8192), 8), ((64, 8192, 8192), 4), ((8192, 192, 512), 4)])
def test_the_raster_reads_the_fewest_different_bytes(sizes, raster):
    """192 x 192 in pairs, 66 at a time: 8 pairs of row tiles by 9 of tokens; by brute force."""
    config = hopper.Config(192, 3, stages=5)
    assert _hopper_cost.best_raster(config, *sizes) == raster
    tokens, rows, _ = _tiles.padded(sizes, config.tiles)
    row_tiles, token_tiles = rows // config.tiles[1], tokens // config.tile_tokens

    def counted(raster):
        """Bytes of a step of all tiles that run at a time, each counted once."""
        high = min(raster, row_tiles)
        running = [(index % high, index // high) for index in range(min(66, high * token_tiles))]
        a, x = {row for row, _ in running}, {token for _, token in running}
        return len(a) * 2 * (12288 + 1536) + len(x) * 24576

    assert counted(raster) == min(map(counted, (4, 8, 16, 32)))
