"""The reduction of a layer's cells: machine code against torch, and against sums written cell by cell."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zfnet import reduction
from zfnet.reduction import compiled, reduce_cells, vectorised


@given(shape=st.tuples(*[st.integers(1, n) for n in (3, 6, 6, 40)]), levels=st.integers(1, 50), seed=st.integers(0))
@settings(max_examples=50)
def test_machine_code_and_torch_find_the_same(shape, levels, seed):
    generator = torch.Generator().manual_seed(seed % 2**63)
    cells = torch.randint(-levels, levels + 1, shape, generator=generator) / 8  # ties everywhere, sums exact
    for one, other in zip(compiled(cells), vectorised(cells), strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)


def test_sums_are_float32_within_a_row_and_float64_beyond_in_the_order_of_the_cells():
    cells = torch.randn(2, 5, 37, 19, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-9, 10)
    expected = np.zeros(19)
    for rows in cells.numpy():
        for row in rows:
            of_row = np.zeros(19, np.float32)
            for cell in row:
                of_row += cell
            expected += of_row
    assert np.array_equal(compiled(cells).total, expected)
    np.testing.assert_allclose(vectorised(cells).total, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_numbers_are_reduced_too(dtype):
    cells = torch.randint(-4, 5, (2, 3, 4, 5), generator=torch.Generator().manual_seed(1)).to(dtype)
    for one, other in zip(reduce_cells(cells), compiled(cells.float()), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_relu_of_the_same_pass_is_torchs_bit_for_bit(dtype):
    cells = torch.randn(2, 3, 5, 37, generator=torch.Generator().manual_seed(2)).to(dtype)
    cells[0, 0, 0, :4] = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0])
    expected = torch.relu(cells)
    found = reduce_cells(cells, rectify=True)
    assert cells.numpy().tobytes() == expected.numpy().tobytes()
    for one, other in zip(found, reduce_cells(expected), strict=True):
        assert one[..., 1:].tobytes() == other[..., 1:].tobytes()  # of NaN, only the sum means something


def test_without_a_folder_for_compiled_code_it_is_compiled_in_memory(monkeypatch):
    import numba.core.caching

    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])
    reduction._kernel.cache_clear()
    try:
        assert compiled(torch.ones(1, 2, 2, 3)).active.tolist() == [4, 4, 4]
    finally:
        reduction._kernel.cache_clear()
