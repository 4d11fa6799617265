"""Rows by their name, and shapes as text."""

import types

import pytest

from nm_jax._core.tables import row_of, shape_text


def test_rows_by_their_name():
    rows = [types.SimpleNamespace(path=path, name=path.upper()) for path in "ab"]
    assert row_of(rows, "b", "in the plan") is rows[1]
    assert row_of(rows, "A", "in the plan", "name") is rows[0]
    with pytest.raises(KeyError, match="'c' is not in the plan"):
        row_of(rows, "c", "in the plan")


@pytest.mark.parametrize(("shape", "text"), [((), "scalar"), ((3,), "3"), ((3, 3, 8), "3x3x8")])
def test_shapes_as_text(shape, text):
    assert shape_text(shape) == text
