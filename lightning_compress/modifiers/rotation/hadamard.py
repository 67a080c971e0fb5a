r"""Orthogonal matrices that spread each coordinate over all of them: Hadamard matrices and random ones.

    H H^T = n I, entries +-1                       a Hadamard matrix of order n; n is 1, 2 or a multiple of 4
    H_2k  = [[H_k, H_k], [H_k, -H_k]]              Sylvester 1867: all powers of two
    H_ab  = H_a (x) H_b
    n = q + 1,     q = 3 mod 4 a prime power       Paley 1933, first construction:  I + [[0, 1], [-1, Q]]
    n = 2 (q + 1), q = 1 mod 4 a prime power       second: [[0, 1], [1, Q]] with 0 -> [[1, -1], [-1, -1]],
                                                   +-1 -> +-[[1, 1], [1, -1]]
    Q_ab = chi(a - b)                              chi: 1 for squares of the field of q elements, else -1; chi(0) = 0

Nothing is tabulated. Every matrix here is normalized: its first row and its first column are ones. The orders below
400 that these do not give are 92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292, 324, 356, 372 and 376; no width
of a common model needs one of them (11008 = 344 * 32, 14336 = 28 * 512, 18944 = 148 * 128).

Shapes: n the order, m its factor that is not a power of two, so that n = m 2^k.
"""

import math
from itertools import product

import torch
from torch import Generator, Tensor

from lightning_compress.ops.hadamard import hadamard_transform

__all__ = [
    "check_order",
    "fast_hadamard_transform",
    "hadamard",
    "is_order",
    "random_hadamard",
    "random_orthogonal",
    "random_signs",
]


def hadamard(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A Hadamard matrix [n, n] of +-1, first row and column ones.

    Raises:
        ValueError: None is known here; the message lists the nearest orders that have one.
    """
    check_order(n)
    m, power = _split(n)
    H_nn = torch.kron(_of_odd_kind(m), _sylvester(power))
    return H_nn.to(dtype)


def is_order(n: int) -> bool:
    """True when :func:`hadamard` has a matrix of this order."""
    return n >= 1 and _split(n)[0] > 0


def check_order(n: int) -> None:
    """ValueError names the nearest orders below and above when there is no matrix of order n."""
    if not is_order(n):
        below = next((k for k in range(n - 1, 0, -1) if is_order(k)), None)
        above = next(k for k in range(max(n, 0) + 1, 2 * max(n, 1) + 8) if is_order(k))
        near = f"{above}" if below is None else f"{below} and {above}"
        block = max((k for k in range(1, n) if n % k == 0 and is_order(k)), default=1)
        hint = f"blocks of {block} divide it" if block > 1 else "no block above 1 divides it"
        raise ValueError(f"no Hadamard matrix of order {n} can be built; the nearest orders are {near}, and {hint}")


def fast_hadamard_transform(x: Tensor, *, transpose: bool = False) -> Tensor:
    """x H of the last dimension in O(n (m + log n)), with H = ``hadamard(n)``; not scaled by 1 / sqrt(n).

    Args:
        x: [..., n], floating point.
        transpose: x H^T instead, which undoes it.
    """
    n = x.shape[-1]
    check_order(n)
    m, _ = _split(n)
    if m == 1:
        return hadamard_transform(x)
    H_mm = _of_odd_kind(m).to(x)
    return hadamard_transform(x, H_mm.t() if transpose else H_mm)


def random_signs(n: int, generator: Generator) -> Tensor:
    """[n] of +-1, float64, on the CPU."""
    return torch.randint(0, 2, (n,), generator=generator, device="cpu").double() * 2 - 1


def random_hadamard(n: int, generator: Generator, *, keep_mean: bool = False) -> Tensor:
    """diag(+-1) H / sqrt(n), orthogonal, float64 [n, n].

    Args:
        n: An order that has a Hadamard matrix.
        generator: Random generator of the signs.
        keep_mean: H diag(1, +-1, ..., +-1) H^T / n instead: it keeps the vector of ones, and with it the mean of every
            vector, so that LayerNorm commutes with it.
    """
    H_nn = hadamard(n)
    signs_n = random_signs(n, generator)
    if not keep_mean:
        return signs_n[:, None] * H_nn / math.sqrt(n)
    signs_n[0] = 1
    return (H_nn * signs_n) @ H_nn.t() / n


def random_orthogonal(n: int, generator: Generator, *, keep_mean: bool = False) -> Tensor:
    """Uniform over all orthogonal matrices (QR of a Gaussian, without the signs of R's diagonal), float64 [n, n].

    Args:
        n: Any size.
        generator: Random generator of the Gaussian.
        keep_mean: Uniform over the matrices that keep the vector of ones.
    """
    size = n - 1 if keep_mean else n
    Q, R = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64, device="cpu"))
    Q = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
    if not keep_mean:
        return Q
    padded = torch.eye(n, dtype=torch.float64, device="cpu")
    padded[1:, 1:] = Q
    v = torch.full((n,), -1 / math.sqrt(n), dtype=torch.float64, device="cpu")  # reflects ones / sqrt(n) onto e_1
    v[0] += 1
    if n > 1:
        padded -= 2 * torch.outer(v, v @ padded) / (v @ v)
        padded -= 2 * torch.outer(padded @ v, v) / (v @ v)
    return padded


# -- the constructions ------------------------------------------------------------------------------------------------


def _split(n: int) -> tuple[int, int]:
    """(m, 2^k) with n = m 2^k, a matrix of order m, and k as large as can be; (0, 0) when there is none."""
    power = n & -n if n > 0 else 1
    while power >= 1 and n > 0:
        if _has_odd_kind(n // power):
            return n // power, power
        power //= 2
    return 0, 0


def _sylvester(n: int) -> Tensor:
    H = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while len(H) < n:
        H = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu"), H)
    return H


def _has_odd_kind(m: int) -> bool:
    return m == 1 or (m % 4 == 0 and (_paley(m) is not None or _factors(m) is not None))


def _of_odd_kind(m: int) -> Tensor:
    """Normalized, [m, m]."""
    if m == 1:
        return torch.ones(1, 1, dtype=torch.float64, device="cpu")
    if (kind := _paley(m)) is not None:
        H = _paley_first(m - 1) if kind == 1 else _paley_second(m // 2 - 1)
    else:
        factors = _factors(m)
        assert factors is not None
        H = torch.kron(hadamard(factors[0]), hadamard(factors[1]))
    H = H * H[0]
    return H * H[:, :1]


def _paley(m: int) -> int | None:
    """Which of Paley's constructions gives order m."""
    if _prime_power(m - 1) and (m - 1) % 4 == 3:
        return 1
    return 2 if m % 4 == 0 and (m // 2 - 1) % 4 == 1 and _prime_power(m // 2 - 1) else None


def _factors(m: int) -> tuple[int, int] | None:
    """m = a b with matrices of both orders, neither of them a power of two."""
    for a in range(12, math.isqrt(m) + 1, 4):
        if m % a == 0 and _has_odd_kind(a) and _has_odd_kind(m // a):
            return a, m // a
    return None


def _paley_first(q: int) -> Tensor:
    S = torch.zeros(q + 1, q + 1, dtype=torch.float64, device="cpu")
    S[0, 1:], S[1:, 0], S[1:, 1:] = 1, -1, _jacobsthal(q)
    return S + torch.eye(q + 1, dtype=torch.float64, device="cpu")


def _paley_second(q: int) -> Tensor:
    S = torch.zeros(q + 1, q + 1, dtype=torch.float64, device="cpu")
    S[0, 1:], S[1:, 0], S[1:, 1:] = 1, 1, _jacobsthal(q)
    a = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu")
    b = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64, device="cpu")
    return torch.kron(S, a) + torch.kron(torch.eye(q + 1, dtype=torch.float64, device="cpu"), b)


def _jacobsthal(q: int) -> Tensor:
    """chi(a - b) for all elements of the field of q = p^k elements, [q, q]."""
    power = _prime_power(q)
    assert power is not None
    p, k = power
    elements = list(product(range(p), repeat=k))  # polynomials, highest coefficient first
    weights = torch.tensor([p**i for i in reversed(range(k))], dtype=torch.int64, device="cpu")
    modulus = _irreducible(p, k)
    squares = {_times(a, a, modulus, p) for a in elements if any(a)}
    chi = torch.tensor(
        [0.0 if not any(a) else 1.0 if a in squares else -1.0 for a in elements], dtype=torch.float64, device="cpu"
    )
    A = torch.tensor(elements, dtype=torch.int64, device="cpu")
    return chi[((A[:, None] - A[None]) % p * weights).sum(-1)]


def _times(a: tuple[int, ...], b: tuple[int, ...], modulus: tuple[int, ...], p: int) -> tuple[int, ...]:
    """a b modulo x^k + modulus, coefficients modulo p."""
    k = len(a)
    c = [0] * (2 * k - 1)
    for i, j in product(range(k), repeat=2):
        c[i + j] = (c[i + j] + a[i] * b[j]) % p
    for i in range(k - 1):  # x^k = -modulus, the highest power first
        for j in range(k):
            c[i + 1 + j] = (c[i + 1 + j] - c[i] * modulus[j]) % p
    return tuple(c[k - 1 :])


def _irreducible(p: int, k: int) -> tuple[int, ...]:
    """The k low coefficients of a monic polynomial of degree k over p elements without divisors of lower degree."""
    reducible = set()
    for degree in range(1, k // 2 + 1):
        for low, rest in product(product(range(p), repeat=degree), product(range(p), repeat=k - degree)):
            a, b, c = (1, *low), (1, *rest), [0] * (k + 1)
            for i, j in product(range(len(a)), range(len(b))):
                c[i + j] = (c[i + j] + a[i] * b[j]) % p
            reducible.add(tuple(c[1:]))
    return next(c for c in product(range(p), repeat=k) if c not in reducible)


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k for an odd prime p, else None."""
    if q < 3 or q % 2 == 0:
        return None
    p = next((d for d in range(3, math.isqrt(q) + 1, 2) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None
