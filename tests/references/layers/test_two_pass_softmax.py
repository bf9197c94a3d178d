"""Two-pass softmax against double precision, against arithmetic on whole numbers, and against XNNPACK's polynomial."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch

import lossary.layers.two_pass_softmax_ as paper
from lossary.layers import ext_add, ext_exp, two_pass_softmax


@pytest.fixture(params=["compiled", "torch"])
def softmax(request, monkeypatch):
    """Both forms of the two passes: numba's, where it is installed, and torch's."""
    if request.param == "compiled":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(paper, "_compiled", lambda: None)
    return two_pass_softmax


def relative_error(got, x, dim=-1):
    exact = torch.softmax(x.double(), dim)
    seen = exact > 1e-37  # single precision ends there
    return (got.double() / exact - 1).abs()[seen].max().item()


@pytest.mark.parametrize("shift", [0.0, 1e4, -2e4])
@pytest.mark.parametrize("spread", [1e-6, 3.0, 30.0, 3000.0])
def test_single_precision_is_right_to_a_millionth(softmax, shift, spread):
    x = spread * torch.randn(20, 777, generator=torch.Generator().manual_seed(0)) + shift
    assert relative_error(softmax(x), x) < 1e-6


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 4095, 4096, 4097, 3_000_000])
def test_every_length_sums_all_of_its_terms(softmax, n):
    x = 3 * torch.randn(1, n, generator=torch.Generator().manual_seed(1))
    assert relative_error(softmax(x), x) < 1e-6


def test_any_dimension_and_any_strides(softmax):
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(2)).mT
    for dim in (0, 1, -1, -3):
        torch.testing.assert_close(softmax(x, dim), torch.softmax(x, dim))


def test_double_precision_is_right_to_1e_14(softmax):
    """log 2, log 3 and log 6 give whole weights, far from where exp overflows and near it."""
    for shift in (0.0, 1000.0, -1e5):
        weights = torch.tensor([2.0, 3.0, 6.0], dtype=torch.float64)
        got = softmax(weights.log() + shift)
        assert (got / (weights / 11) - 1).abs().max() < max(1e-14, 4e-16 * abs(shift))  # log + shift is rounded


@pytest.mark.parametrize(
    "row",
    [
        [-math.inf, 0.0, 1.0],
        [-math.inf, -math.inf],
        [math.inf, 0.0],
        [math.nan, 0.0, 1.0],
        [-3e37, 0.0],
        [1e4, -1e4, 1e4],
        [-1e30, -1e30],
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_finite_is_treated_as_torch_does(softmax, row, dtype):
    x = torch.tensor(row, dtype=dtype)
    torch.testing.assert_close(softmax(x), torch.softmax(x, -1), equal_nan=True)


def test_half_precision_and_dtype(softmax):
    x = torch.randn(4, 100, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert softmax(x).dtype == torch.bfloat16
    torch.testing.assert_close(softmax(x), torch.softmax(x, -1))
    assert softmax(x, dtype=torch.float64).dtype == torch.float64
    assert softmax(torch.empty(3, 0)).shape == (3, 0)


def test_first_and_second_derivatives(softmax):
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    for dim in (0, 1):
        assert torch.autograd.gradcheck(lambda z, dim=dim: softmax(z, dim), x)
        assert torch.autograd.gradgradcheck(lambda z, dim=dim: softmax(z, dim), x)


def test_vmap(softmax):
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(5))
    got = torch.vmap(lambda z: softmax(z, 0), in_dims=2, out_dims=2)(x)
    torch.testing.assert_close(got, torch.softmax(x, 0))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-7), (torch.float64, 4e-15)])
def test_mantissa_and_exponent(dtype, tolerance):
    x = torch.linspace(-1e4, 1e4, 501, dtype=dtype)
    with localcontext(prec=40):
        log2 = Decimal(2).ln()
        for value, mantissa, exponent in zip(x.tolist(), *(part.tolist() for part in ext_exp(x)), strict=True):
            assert exponent == round(Decimal(value) / log2)
            exact = (Decimal(value) - int(exponent) * log2).exp()
            assert float(Decimal(mantissa) / exact) == pytest.approx(1, abs=tolerance)


def test_polynomial_agrees_with_xnnpack():
    """XNNPACK's minimax polynomial (src/f32-raddextexp), evaluated exactly."""
    published = ["1.0", "0x1.FFFFF6p-1", "0x1.FFFDC6p-2", "0x1.555A80p-3", "0x1.573A1Ap-5", "0x1.0F9F9Cp-7"]
    coefficients = [Fraction(float.fromhex(c)) for c in published]
    x = torch.linspace(-0.3465, 0.3465, 201)  # n = 0 within half of ln 2
    m, n = ext_exp(x)
    assert n.abs().max() == 0
    for t, mantissa in zip(x.tolist(), m.tolist(), strict=True):
        theirs = float(sum(c * Fraction(t) ** k for k, c in enumerate(coefficients)))
        assert mantissa == pytest.approx(theirs, rel=4e-7)


def test_pieces_merge_in_any_order():
    """The sum of exp(k ln 2) over k = 0, ..., 999 is 2^1000 - 1, which overflows single precision."""
    x = torch.arange(1000, dtype=torch.float64) * math.log(2)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(6))
    total = (torch.tensor(0.0), torch.tensor(-1e38))
    for piece in x[order]:
        total = ext_add(*ext_exp(piece), *total)
    m, n = total
    assert math.log2(m.item()) + n.item() == pytest.approx(1000.0, abs=1e-10)
    back = ext_add(*total, torch.tensor(0.0), torch.tensor(-1e38))
    assert (back[0], back[1]) == total


def test_refusals():
    with pytest.raises(ValueError, match="dim: expected a whole number >= -2 and <= 1, got 2"):
        two_pass_softmax(torch.zeros(2, 3), 2)
    with pytest.raises(ValueError, match="dtype: expected a floating-point dtype"):
        two_pass_softmax(torch.zeros(2), dtype=torch.int64)
    with pytest.raises(ValueError, match="input: expected a floating-point tensor"):
        ext_exp(torch.tensor([1, 2]))
