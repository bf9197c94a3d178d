"""Two-pass softmax: exponentials as pairs of mantissa and exponent, so that no pass is spent on the maximum.

Softmax subtracts the maximum only lest exp overflows. Written as m * 2^n with n a float of its own, exp(x) cannot
overflow, and sums of such pairs take one pass over the input; a second pass writes the result. Three arrays go through
memory instead of four. That can pay only where memory is the limit: on a CPU, for rows that do not fit its cache, with
numba installed (`pip install lossary[fast]`). For shorter rows, on a GPU and inside attention torch.softmax is the
better choice. A gain besides the paper's: sums over long rows do not lose precision, as torch's do in float32.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lossary import require
from lossary.paper import Paper
from lossary.roles import layer

PAPER = Paper(
    title="The Two-Pass Softmax Algorithm",
    year=2020,
    helps=("inference-cost",),
    departs=(
        "numba or torch instead of AVX intrinsics",
        "polynomial by Chebyshev interpolation, not the minimax one of XNNPACK; of degree 11 in double precision",
        "sums leave single precision after 4096 terms",
        "infinities and NaN are treated as torch.softmax does",
    ),
    equation=(
        r"\operatorname{softmax}(x)_i=\frac{m_i\,2^{\,n_i-N}}{\sum_k m_k\,2^{\,n_k-N}},\qquad "
        r"n_i=\operatorname{round}(x_i\log_2 e),\quad m_i=e^{x_i-n_i\ln2},\quad N=\max_k n_k"
    ),
    url="https://arxiv.org/abs/2001.04438",
)


@layer(shape=(4, 6), examples=({}, {"dim": 0}))
def two_pass_softmax(
    input: Float[Tensor, "*shape"], dim: int = -1, dtype: torch.dtype | None = None
) -> Float[Tensor, "*shape"]:
    """exp(x_i) / sum_k exp(x_k) along a dimension, algorithm 3; has the signature of torch.softmax.

    Relative error below 1e-6 in single precision while |x| < 2e4 (below 1e-14 in double while |x| < 1e6); further out
    it grows with the spacing of floating-point numbers around x. A result below 1e-38 may be 0. As with torch.softmax
    a row with NaN or inf, or of -inf alone, is NaN. bfloat16 and float16 are computed in single precision. Twice
    differentiable.

    Args:
        input: at least one dimension.
        dim: along which the result sums to 1.
        dtype: floating-point type that the input is cast to first.

    Raises:
        ValueError: an input that is not floating-point or has no such dim, or a dtype that is not floating-point.

    >>> two_pass_softmax(torch.tensor([1000.0, 1000.0, -1000.0]))
    tensor([0.5000, 0.5000, 0.0000])
    """
    require.floating("input", input, at_least_dims=1)
    require.whole("dim", dim, at_least=-input.ndim, at_most=input.ndim - 1)
    if dtype is not None:
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating-point dtype, got {dtype}")
        input = input.to(dtype)
    return _Softmax.apply(input, dim % input.ndim - input.ndim)


def ext_exp(input: Float[Tensor, "*shape"]) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """exp(x) = m 2^n, elementwise, as the pair (m, n): n is whole, m about sqrt(1/2) to sqrt(2); it never overflows.

    n = round(x log2 e) and m = exp(x - n ln 2), with ln 2 in two parts (Cody and Waite) and the exponential by a
    polynomial. -inf gives an n near -1.4e38, inf and NaN an m that is NaN. float16 and bfloat16 give float32.

    Raises:
        ValueError: an input that is not floating-point.

    >>> ext_exp(torch.tensor([1.0, 1000.0]))  # e = 1.3591 * 2
    (tensor([1.3591, 0.8095]), tensor([1.0000e+00, 1.4430e+03]))
    """
    require.floating("input", input)
    x = input.to(_wide(input.dtype)).clamp(min=_LOWEST)
    high, low, coefficients = _REDUCTION[x.dtype]
    n = torch.round(x * (1 / _LN2))
    t = (x - n * high - n * low).clamp(-0.5, 0.5)  # beyond only where x is too large for its spacing
    m = torch.full_like(t, coefficients[-1])
    for c in coefficients[-2::-1]:
        m = m * t + c
    return m, n


def ext_add(m1: Tensor, n1: Tensor, m2: Tensor, n2: Tensor) -> tuple[Tensor, Tensor]:
    """m1 2^n1 + m2 2^n2, elementwise, as a pair whose n is the larger of the two. (0, -1e38) is the zero.

    >>> half, two = (torch.tensor(0.5), torch.tensor(1000.0)), (torch.tensor(1.0), torch.tensor(1001.0))
    >>> ext_add(*half, *two)  # 0.5 * 2^1000 + 1 * 2^1001
    (tensor(1.2500), tensor(1001.))
    """
    n = torch.maximum(n1, n2)
    return m1 * torch.exp2(n1 - n) + m2 * torch.exp2(n2 - n), n


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(input: Tensor, dim: int) -> Tensor:
        x = input.to(_wide(input.dtype))
        compiled = None if torch.compiler.is_compiling() else _compiled()
        if compiled is None or x.dtype != torch.float32 or x.device.type != "cpu" or not x.numel():
            return _in_chunks(x, dim).to(input.dtype)
        rows = x.detach().movedim(dim, -1).contiguous()
        result = torch.empty_like(rows)
        n = rows.shape[-1]
        compiled(rows.view(-1, n).numpy(), result.view(-1, n).numpy())
        return result.movedim(-1, dim).to(input.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.dim = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        flow = grad * y
        return flow - y * flow.sum(ctx.dim, keepdim=True), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], input: Tensor, dim: int) -> tuple[Tensor, int]:
        return _Softmax.apply(input.movedim(in_dims[0], 0), dim), 0  # dim counts from the end


def _in_chunks(x: Tensor, dim: int) -> Tensor:
    """The two passes in torch, chunk by chunk, so that what is between them stays in the cache."""
    if not x.numel():
        return x.clone()
    chunks = x.split(_CHUNK, dim)
    total, top = x.new_zeros(()), x.new_full((), _LOWEST)
    for chunk in chunks:
        m, n = ext_exp(chunk)
        most = n.amax(dim, keepdim=True)
        total, top = ext_add(total, top, (m * torch.exp2(n - most)).sum(dim, keepdim=True), most)
    return torch.cat([m / total * torch.exp2(n - top) for m, n in map(ext_exp, chunks)], dim)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


_LN2 = math.log(2.0)
_LOWEST = -1e38  # stands for -inf, whose difference from itself is not a number
_CHUNK = 1 << 16


def _reduction(bits: int, degree: int) -> tuple[float, float, tuple[float, ...]]:
    """ln 2 as a short number, whose product with n is exact, plus a rest; and exp on [-ln 2 / 2, ln 2 / 2]."""
    high = round(_LN2 * 2**bits) / 2**bits
    beyond_double = 2.3190468138462996e-17
    fit = np.polynomial.Chebyshev.interpolate(np.exp, degree, domain=[-_LN2 / 2, _LN2 / 2])
    return high, _LN2 - high + beyond_double, tuple(fit.convert(kind=np.polynomial.Polynomial).coef.tolist())


_REDUCTION = {torch.float32: _reduction(9, 5), torch.float64: _reduction(32, 11)}


# The same in machine code. Its numbers are of single precision, or numba would compute in double.
_LOG2E, _HIGH, _LOW = (np.float32(v) for v in (1 / _LN2, *_REDUCTION[torch.float32][:2]))
_C0, _C1, _C2, _C3, _C4, _C5 = (np.float32(c) for c in _REDUCTION[torch.float32][2])
_FLOOR, _HALF, _ZERO, _TINY = (np.float32(v) for v in (_LOWEST, 0.5, 0.0, -127.0))
_BIAS, _SHIFT = np.int32(127), np.int32(23)
_LANES = 64  # four vectors of AVX-512
_BLOCK = 64 * _LANES  # so many terms are added in single precision


@functools.cache
def _compiled() -> Callable[[Any, Any], None] | None:
    """`_rows` in machine code, or None where numba is not installed."""
    try:
        from numba import njit
        from numba.extending import register_jitable
    except ImportError:
        return None
    options = {"fastmath": {"contract"}, "error_model": "numpy"}
    for function in (_pair, _power):
        register_jitable(**options)(function)
    compiled: Callable[[Any, Any], None] = njit(nogil=True, cache=True, **options)(_rows)
    return compiled


def _pair(x):  # type: ignore[no-untyped-def]
    """ext_exp of a number. The comparisons let NaN through."""
    x = _FLOOR if x < _FLOOR else x
    n = np.rint(x * _LOG2E)
    t = x - n * _HIGH - n * _LOW
    t = -_HALF if t < -_HALF else t
    t = _HALF if t > _HALF else t
    return ((((_C5 * t + _C4) * t + _C3) * t + _C2) * t + _C1) * t + _C0, n


def _power(n):  # type: ignore[no-untyped-def]
    """2^n for whole n <= 0, by writing n into the exponent's bits; 0 below 2^-126."""
    return np.int32((np.int32(max(n, _TINY)) + _BIAS) << _SHIFT).view(np.float32)


def _rows(x, y):  # type: ignore[no-untyped-def]
    """Write the softmax of each row of x into y. Sums run in lanes side by side, which become vectors."""
    m_lane, n_lane = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    m_sum, n_sum = np.empty(_LANES, np.float64), np.empty(_LANES, np.float32)
    for r in range(len(x)):
        m_sum[:], n_sum[:] = 0.0, _FLOOR
        for start in range(0, x.shape[1], _BLOCK):
            m_lane[:], n_lane[:] = _ZERO, _FLOOR
            block = x[r, start : start + _BLOCK]
            for j in range(0, len(block), _LANES):
                part = block[j : j + _LANES]
                for k in range(len(part)):
                    m, n = _pair(part[k])
                    top = max(n_lane[k], n)
                    m_lane[k] = m_lane[k] * _power(n_lane[k] - top) + m * _power(n - top)
                    n_lane[k] = top
            for k in range(_LANES):
                top = max(n_sum[k], n_lane[k])
                m_sum[k] = m_sum[k] * _power(n_sum[k] - top) + m_lane[k] * _power(n_lane[k] - top)
                n_sum[k] = top
        top, total = n_sum.max(), 0.0
        for k in range(_LANES):
            total += m_sum[k] * _power(n_sum[k] - top)
        scale = np.float32(1.0 / total)
        for j in range(x.shape[1]):
            m, n = _pair(x[r, j])
            y[r, j] = m * scale * _power(n - top)
