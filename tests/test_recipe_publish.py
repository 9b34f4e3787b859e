"""recipes.minirl.publish.publisher: weights for the servers."""

import pytest
import torch

from recipes.minirl.publish.publisher import round_to_fp8_grid


def e4m3_numbers():
    """All finite numbers of float8 e4m3fn, from its definition: 4 exponent, 3 mantissa bits."""
    positive = [m / 8 * 2.0**-6 for m in range(8)]
    positive += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    positive.remove(480.0)  # its bits are nan
    return torch.tensor(sorted({-x for x in positive} | set(positive)), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_takes_the_nearest_e4m3_number_times_the_scale_of_the_row(dtype):
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[2] = 0
    rounded = round_to_fp8_grid(weight)
    assert rounded.dtype == dtype
    assert torch.equal(rounded[2], weight[2])
    grid = e4m3_numbers()
    for row in (0, 1, 3, 4, 5):
        exact = weight[row].double()
        scale = exact.abs().max() / 448
        distance = ((exact / scale)[:, None] - grid).abs().min(dim=1).values * scale
        # The nearest grid point, but for the rounding of float32 and of the result's own dtype.
        error = (rounded[row].double() - exact).abs()
        slack = exact.abs() * torch.finfo(dtype).eps + 1e-6 * scale
        assert (error <= distance + slack).all()
    assert not torch.equal(rounded, weight)
