"""Linear maps between states of one width, other than least squares: what rivals put where they cut blocks out.

`ChannelPatch` is LinearPatch (Chen et al., arXiv 2505.24680): P = H D Hᵀ with H a Hadamard matrix over its root, which
spreads the outliers of single channels, and D the ratio of the mean magnitudes after and before the cut. `CosineMap` is
the map of ReplaceMe (Shopkhoev et al., arXiv 2505.02819) that keeps directions rather than distances.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# What ReplaceMe's code fits its map with.
_PASSES, _ROWS_PER_STEP, _RATE = 10, 1024, 1e-4


class ChannelPatch:
    """Accumulates LinearPatch's scales: of each item, the ratio of mean magnitudes per rotated channel; their mean.

    Args:
        width: of both states.

    Raises:
        ValueError: no Hadamard matrix of this width is known.
    """

    def __init__(self, width: int):
        self.rotation = hadamard(width)
        self._ratios, self._items = torch.zeros(width, dtype=torch.float64), torch.zeros((), dtype=torch.float64)

    def update(self, x: Tensor, y: Tensor, items: Tensor) -> None:
        """Add rows.

        Args:
            x, y: `(rows, width)` before and after the cut.
            items: `(rows,)` the sequence or image that each row is of.
        """
        self.rotation = self.rotation.to(x.device)
        x, y = ((rows.to(self.rotation) @ self.rotation).abs() for rows in (x, y))
        for item in items.unique():
            of_item = (items == item).to(x.device)
            self._ratios += (y[of_item].mean(0) / x[of_item].mean(0)).cpu()
            self._items += 1

    def solve(self, total: Callable[[Tensor], Tensor]) -> Tensor:
        """`(width, width)` the patch, symmetric; `total` sums a tensor over processes."""
        scales = (total(self._ratios) / total(self._items)).to(self.rotation.device)
        return (self.rotation * scales) @ self.rotation.T


class CosineMap:
    """Collects rows, and maps x so that the mean of 1 − cos(W x, y) over them is small: Adam from the identity.

    The rows stay in memory, in fp32 on the CPU: the objective is no function of sums. Of several processes each is to
    be given all rows, and finds the same map.

    Args:
        width: of both states.
    """

    def __init__(self, width: int):
        self.width = width
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._device = torch.device("cpu")

    def update(self, x: Tensor, y: Tensor, items: Tensor) -> None:
        """Add rows `x` before and `y` after the cut, `(rows, width)`, whatever they are of."""
        self._device = x.device
        self._rows.append((x.float().cpu(), y.float().cpu()))

    @torch.enable_grad()
    def solve(self, total: Callable[[Tensor], Tensor]) -> Tensor:
        """`(width, width)` the map."""
        x, y = map(torch.cat, zip(*self._rows, strict=True))
        weight = torch.eye(self.width, device=self._device, requires_grad=True)
        optimizer = torch.optim.Adam([weight], lr=_RATE)
        generator = torch.Generator().manual_seed(0)
        for _ in range(_PASSES):
            for chosen in torch.randperm(len(x), generator=generator).split(_ROWS_PER_STEP):
                rows, wanted = x[chosen].to(self._device), y[chosen].to(self._device)
                loss = 1 - torch.cosine_similarity(rows @ weight.T, wanted).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return weight.detach().double()


def hadamard(width: int) -> Tensor:
    """`(width, width)` an orthogonal matrix of ±1/√width, float64: Sylvester's doublings of one of Paley's.

    For powers of two, and these times 12, 20, 28 and other q + 1 with q a prime of 4k + 3, or 36 and other 2(q + 1)
    with q a prime of 4k + 1. For powers of two, alone or times 12, it is the matrix of LinearPatch's code.

    Raises:
        ValueError: none of this width is known here.

    Example:
        >>> from klas_hf.maths.patches import hadamard
        >>> hadamard(2) * 2**0.5
        tensor([[ 1.,  1.],
                [ 1., -1.]], dtype=torch.float64)
    """
    odd, doublings = width, 0
    while odd % 2 == 0:
        odd, doublings = odd // 2, doublings + 1
    for left in range(doublings, -1, -1):  # the smallest core first
        core = _core(width >> left)
        if core is not None:
            pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
            for _ in range(left):
                core = torch.kron(core, pair)
            return core / width**0.5
    raise ValueError(
        f"got states {width} wide, for which no Hadamard matrix is known here; expected a power of two, alone or times "
        "a number such as 12, 20, 28 or 36. Use another joint: 'least_squares'"
    )


def _core(size: int) -> Tensor | None:
    """Paley's matrix of ±1 of this size, of either construction, where there is one."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if size % 4:
        return None
    eye = torch.eye(size, dtype=torch.float64)
    if _is_prime(size - 1):
        border = _bordered(size - 1)
        border[0] *= -1  # q ≡ 3 mod 4: skew
        return eye - border
    if size % 8 == 4 and _is_prime(size // 2 - 1):
        ones = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        zeros = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_bordered(size // 2 - 1), ones) + torch.kron(eye[: size // 2, : size // 2], zeros)
    return None


def _bordered(q: int) -> Tensor:
    """Jacobsthal's matrix of a prime, χ(i − j), with a row and a column of ones before it and 0 in the corner."""
    residues = {n * n % q for n in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if n in residues else -1.0 for n in range(1, q)], dtype=torch.float64)
    place = torch.arange(q)
    matrix = torch.ones(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 0] = 0
    matrix[1:, 1:] = character[(place[:, None] - place) % q]
    return matrix


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
