"""Hadamard matrices of the sizes language models use, and the fast product with them.

A Hadamard matrix is a ±1 matrix with H Hᵀ = n I; H / √n is then orthogonal. Size n is built as

    H(n) = I_blocks ⊗ C ⊗ S,        n = blocks · core · 2^power,

where S[i, j] = (-1)^popcount(i & j) is Sylvester's matrix of size 2^power and C the smallest core
that can be constructed: Paley's over a finite field, a Kronecker product, or Williamson's. Where
no construction reaches n (107 · 128, or any odd n > 1), `blocks` > 1 and H(n) is block diagonal.

Sources: J. J. Sylvester, Phil. Mag. 34 (1867); R. E. A. C. Paley, J. Math. Phys. 12 (1933);
J. Williamson, Duke Math. J. 11 (1944).
"""

from __future__ import annotations

import itertools
import math
import operator
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch

__all__ = ["Factorization", "core", "factor", "is_full", "matrix", "transform"]

# First rows of symmetric circulants A, B, C, D with A² + B² + C² + D² = 4t I, keyed by n = 4t: the
# orders below 172 that nothing else here reaches. Found by search, and proved by the tests.
_WILLIAMSON = {
    92: (
        "+--+--+++------+++--+--",
        "+--+-+-++++++++++-+-+--",
        "+--++-+-+-++++-+-+-++--",
        "+++---++--++++--++---++",
    ),
    116: (
        "+++---++--+-+----+-+--++---++",
        "++++-++-+---++++++---+-++-+++",
        "+-+---++--+-++++++-+--++---+-",
        "++--+--+-+++-++++-+++-+--+--+",
    ),
    156: (
        "++------+--+-+--++-++-++--+-+--+------+",
        "++---+--++----+-+-++++-+-+----++--+---+",
        "++-++-++---+-----+-++-+-----+---++-++-+",
        "+-+-----+-+++--+++----+++--+++-+-----+-",
    ),
}

_SYLVESTER_BITS = 7  # one matmul covers up to 2^7: wider wastes arithmetic, narrower memory passes
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)
_COMPUTE = {
    torch.float16: torch.float32,  # half-precision sums of thousands of terms lose digits
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    **dict.fromkeys(_INTEGERS, torch.int64),
}


@dataclass(frozen=True)
class Factorization:
    """n = blocks · core · 2^power, the shape of H(n) = I_blocks ⊗ C(core) ⊗ S(2^power)."""

    blocks: int
    core: int
    power: int

    @property
    def order(self) -> int:
        """Size of one Hadamard block, core · 2^power; rows of H(n) have norm √order."""
        return self.core << self.power


def core(n: int) -> np.ndarray:
    """Hadamard matrix C of order n, C Cᵀ = n I.

    Sylvester for powers of two; else Paley I (n = q + 1), Paley II (n = 2 (q + 1)), a Williamson
    table, or a Kronecker product of smaller orders, whichever serves first.

    Returns: int8 [n, n] of ±1, cached and read-only.
    Raises: TypeError if n is not an integer, ValueError if no construction here gives order n.
    """
    n = _check_size(n)
    if _recipe(n) is None:
        why = "is not constructible here" if n % 4 == 0 else "cannot exist (1, 2, 4k only)"
        raise ValueError(
            f"a Hadamard matrix of order n={n} {why}; use factor({n}) or matrix({n}), "
            "which fall back to equal Hadamard blocks on the diagonal"
        )
    return _core(n)


@lru_cache(maxsize=4096)
def _factor(n: int) -> Factorization:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    divisors = {*small, *(n // d for d in small)}
    order = next(h for h in sorted(divisors, reverse=True) if _recipe(h) is not None)
    powers = range((order & -order).bit_length() - 1, -1, -1)
    power = next(p for p in powers if _recipe(order >> p) is not None)
    return Factorization(blocks=n // order, core=order >> power, power=power)


def factor(n: int) -> Factorization:
    """Shape of H(n): the largest constructible order dividing n, then its smallest core.

    `blocks` is 1 whenever a Hadamard matrix of order n can be constructed. Otherwise H(n) is block
    diagonal, mixing within groups of `order` channels only; odd n gives blocks = n, the identity.

    Raises: TypeError if n is not an integer, ValueError if n < 1.
    """
    return _factor(_check_size(n))


def is_full(n: int) -> bool:
    """Whether H(n) is one Hadamard matrix (True) or block diagonal (False)."""
    return factor(n).blocks == 1


def matrix(n: int) -> np.ndarray:
    """Dense H(n) = I_blocks ⊗ C ⊗ S, in the order `transform` uses; H Hᵀ = (n / blocks) I.

    Returns: int8 [n, n] of ±1, with 0 off the diagonal blocks.
    Raises: as `factor`.
    """
    f = factor(n)
    block = np.kron(core(f.core), core(1 << f.power))
    return np.kron(np.eye(f.blocks, dtype=np.int8), block)


def transform(x: torch.Tensor, transpose: bool = False, *, normalize: bool = True) -> torch.Tensor:
    """Row-vector product x H(n) / √(n / blocks) over the last dimension, without forming H(n).

    x: [..., n], floating point, or signed integers (CPU, normalize=False, summed in int64).
    transpose: multiply by Hᵀ, the inverse when normalized, since H need not be symmetric.
    normalize: divide by √(n / blocks); False keeps the ±1 sums, exact for integers.

    Returns: new tensor, shape and dtype of x; fp16 and bf16 are computed in fp32.
    Raises: TypeError for another type or dtype, or integers with normalize=True; ValueError for a
        0-d x, an empty last dimension, integers off the CPU, or sums beyond a narrow integer dtype.
    """
    _check_input(x, normalize)
    n = x.shape[-1]
    f = factor(n)
    before, after = x.numel() // n * f.blocks, f.order  # y is always [before, ·, after]
    y = x.to(_COMPUTE[x.dtype], copy=f.order == 1)  # the identity still returns a new tensor
    for h in _kronecker_factors(f.core, f.power, y.dtype, y.device):
        size = h.shape[0]
        after //= size
        if after == 1:
            y = y.reshape(before, size) @ (h.T if transpose else h)
        else:
            y = (h if transpose else h.T) @ y.reshape(before, size, after)
        before *= size
    if normalize and f.order > 1:
        y = y * (1 / math.sqrt(f.order))  # last, so that integer-valued sums round only once
    if x.dtype in _INTEGERS and y.numel():
        low, high, limits = int(y.min()), int(y.max()), torch.iinfo(x.dtype)
        if low < limits.min or high > limits.max:
            raise ValueError(f"sums in [{low}, {high}] do not fit {x.dtype}; use x.to(torch.int64)")
    return y.reshape(x.shape).to(x.dtype)


@cache
def _recipe(n: int) -> tuple[str, int] | None:
    """How order n is built, as (construction, its argument); None when nothing here reaches n."""
    if n & (n - 1) == 0:
        return "sylvester", n
    if n % 4:
        return None
    if _prime_power(n - 1):  # n - 1 ≡ 3 (mod 4), as Paley I needs
        return "paley1", n - 1
    if n % 8 == 4 and _prime_power(n // 2 - 1):  # n / 2 - 1 ≡ 1 (mod 4), as Paley II needs
        return "paley2", n // 2 - 1
    if n in _WILLIAMSON:
        return "williamson", n
    divisors = (a for a in range(2, math.isqrt(n) + 1) if n % a == 0)
    a = next((a for a in divisors if _recipe(a) and _recipe(n // a)), None)
    return ("kronecker", a) if a else None


@lru_cache(maxsize=32)  # bounded: an order in the thousands takes tens of megabytes
def _core(n: int) -> np.ndarray:
    name, arg = _recipe(n)
    if name == "sylvester":
        h = np.ones((1, 1), dtype=np.int8)
        while len(h) < n:
            h = np.block([[h, h], [h, -h]])
    elif name == "paley1":
        h = _conference(arg) + np.eye(n, dtype=np.int8)
    elif name == "paley2":
        on = np.array([[1, 1], [1, -1]], dtype=np.int8)
        off = np.array([[1, -1], [-1, -1]], dtype=np.int8)
        h = np.kron(_conference(arg), on) + np.kron(np.eye(n // 2, dtype=np.int8), off)
    elif name == "williamson":
        a, b, c, d = (_circulant(row) for row in _WILLIAMSON[n])
        h = np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])
    else:
        h = np.kron(_core(arg), _core(n // arg))
    h.setflags(write=False)
    return h


def _circulant(row: str) -> np.ndarray:
    """Circulant [t, t] with the first row given in signs."""
    t = len(row)
    signs = np.array([1 if sign == "+" else -1 for sign in row], dtype=np.int8)
    return signs[(np.arange(t) - np.arange(t)[:, None]) % t]


def _conference(q: int) -> np.ndarray:
    """Paley's conference matrix W [q + 1, q + 1]: zero diagonal, W Wᵀ = q I.

    W = [[0, 1ᵀ], [±1, Q]] with Q[i, j] = χ(aᵢ - aⱼ) over GF(q): symmetric for q ≡ 1 (mod 4),
    antisymmetric for q ≡ 3.
    """
    p, k = _prime_power(q)
    code = np.arange(q, dtype=np.int32)  # element number = its coefficients read in base p
    difference = np.zeros((q, q), dtype=np.int32)
    for i in range(k):
        digit = code // p**i % p
        difference += (digit[:, None] - digit) % p * np.int32(p**i)
    w = np.zeros((q + 1, q + 1), dtype=np.int8)
    w[0, 1:] = 1
    w[1:, 0] = 1 if q % 4 == 1 else -1
    w[1:, 1:] = _quadratic_character(p, k)[difference]
    return w


def _quadratic_character(p: int, k: int) -> np.ndarray:
    """χ over GF(p^k), p odd: int8 [p^k], +1 on nonzero squares, -1 on non-squares, 0 at zero.

    GF(p^k) is polynomials in x modulo a monic f of degree k, searched so that the powers of x visit
    all p^k - 1 nonzero elements: that alone makes f irreducible, and the squares the even powers.
    """
    q = p**k
    chi = np.zeros(q, dtype=np.int8)
    one = (1,) + (0,) * (k - 1)  # coefficients, constant first
    for f in itertools.product(range(1, p), *[range(p)] * (k - 1)):  # f(0) ≠ 0, so x is a unit
        walk, element = [], one
        while not walk or element != one:
            walk.append(sum(c * p**i for i, c in enumerate(element)))
            shifted = (0, *element[:-1])  # times x; the top coefficient wraps to -f
            element = tuple((s - element[-1] * c) % p for s, c in zip(shifted, f, strict=True))
        if len(walk) == q - 1:
            chi[walk[0::2]], chi[walk[1::2]] = 1, -1
            return chi
    raise ValueError(f"no primitive polynomial of degree {k} over GF({p}); p must be an odd prime")


@cache
def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None


@lru_cache(maxsize=64)
def _kronecker_factors(
    size: int, power: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Matrices whose Kronecker product, in order, is one block C(size) ⊗ S(2^power)."""
    steps = -(-power // _SYLVESTER_BITS)
    split = [power // steps + (i < power % steps) for i in range(steps)]  # as even as can be
    sizes = [size] * (size > 1) + [1 << bits for bits in split]
    with torch.inference_mode(False):  # a cached inference tensor would break autograd later
        return tuple(torch.tensor(core(s), dtype=dtype, device=device) for s in sizes)


def _check_size(n: int) -> int:
    try:
        size = operator.index(n)
    except TypeError:
        raise TypeError(f"n must be an integer, got {n!r} ({type(n).__name__})") from None
    if size < 1:
        raise ValueError(f"n must be at least 1, got {size}; pass the size of the rotated axis")
    return size


def _check_input(x: torch.Tensor, normalize: bool) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}; use torch.as_tensor")
    if x.dtype not in _COMPUTE:
        raise TypeError(f"x has unsupported dtype {x.dtype}; convert it to torch.float32 first")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be [..., n] with n >= 1, got shape {tuple(x.shape)}")
    if x.dtype in _INTEGERS:
        if normalize:
            raise TypeError(
                f"x has dtype {x.dtype}, which cannot hold x H / √n; use normalize=False"
            )
        if x.device.type != "cpu":
            raise ValueError(f"integer x is on {x.device}; integers run on the CPU, use x.cpu()")
