r"""Learn a rotation: descend on the orthogonal matrices until rounding to 4 bits loses least.

    L(R) = mean over readers of ||Q(Z R) Q(V R)^T - Z V^T||^2 / ||Z V^T||^2      after SpinQuant, arXiv:2405.16406
    Q    one scale per row, symmetric; the gradient goes straight through its rounding
    M    <- beta M + dL/dR                                  Cayley SGD, Li et al. 2020, arXiv:2002.01113; the equation
    A     = (M R^T - R M^T) tau / |M R^T - R M^T|           of a step is solved, not iterated
    R    <- (I + A / 2)^-1 (I - A / 2) R

SpinQuant trains on the loss of the whole model; here each reader of the stream is judged by its own output, so that
no gradient passes through the model, and its weights need not be in one place. A rotation that must keep the
vector of ones is learned orthogonally to it: A <- P A P, P = I - 1 1^T / n.

Shapes: n size of the space, T tokens, O outputs of a reader.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from lightning_compress.modifiers.rotation.norms import normalized
from lightning_compress.modifiers.rotation.spaces import Norm, Space

__all__ = ["LearnedRotation", "Reader", "TokenSample", "cayley_step", "learn_rotation", "readers_of", "rounding_loss"]

MOMENTUM = 0.9
READERS_PER_STEP = 8  # all readers count every CHECK_EVERY steps
CHECK_EVERY = 10
ROWS = 256  # outputs of a reader that count


class TokenSample:
    """A uniform sample of the vectors of a stream.

    Args:
        size: Number of vectors in the sample.
        generator: Random generator of the sample.
    """

    def __init__(self, size: int, generator: Generator):
        self.size, self.generator = size, generator
        self._rows: Tensor | None = None
        self._keys = torch.empty(0, dtype=torch.float32, device="cpu")

    def update(self, x_NC: Tensor) -> None:
        """Add vectors [N, C]; the sample is on the CPU in float32."""
        keys = torch.cat(
            [self._keys, torch.rand(len(x_NC), generator=self.generator, dtype=torch.float32, device="cpu")]
        )
        rows = x_NC.detach().float().cpu()
        rows = rows if self._rows is None else torch.cat([self._rows, rows])
        best = keys.topk(min(self.size, len(keys))).indices
        self._rows, self._keys = rows[best], keys[best]

    def value(self) -> Tensor | None:
        """[at most size, C] float32; None without vectors."""
        return self._rows


@dataclass(frozen=True)
class Reader:
    """Weights that read one normalized vector of a space.

    Args:
        Z_TC: Normalized vectors, before any gain, float32.
        V_OC: The weights, gain folded in, float32.
    """

    Z_TC: Tensor
    V_OC: Tensor


@dataclass(frozen=True)
class LearnedRotation:
    """A rotation [n, n] float64, and the loss of all readers before and after it was learned."""

    R: Tensor
    before: float
    after: float


@torch.no_grad()
def readers_of(
    model: nn.Module, space: Space, norm: Norm, x_TC: Tensor, ignored: Callable[[str], bool]
) -> Reader | None:
    """The weights that read the vectors x through a norm, with its gain folded in; None when there are none.

    Args:
        model: Model of the weights.
        space: Space of the vectors.
        norm: Normalization of the vectors.
        x_TC: Inputs of the norm.
        ignored: Whether the weights of a module do not count, by its name.
    """
    touches = [touch for touch in space.root().readers if touch.norm == norm and not ignored(touch.slot.module)]
    if not touches:
        return None
    weights = [touch.slot.of(model).detach().movedim(touch.dim, -1).flatten(0, -2).float() for touch in touches]
    V_OC = torch.cat(list({id(touch.slot.of(model)): W for touch, W in zip(touches, weights, strict=True)}.values()))
    Z_TC = normalized(x_TC.to(V_OC.device).double(), norm.centered)
    gain = norm.gain_of(model)
    if norm.bias is not None:
        bias = norm.bias.of(model).detach().double()
        Z_TC = Z_TC + (bias if gain is None else bias / gain.to(bias.device)).to(V_OC.device)
    if gain is not None:
        V_OC = V_OC * gain.to(V_OC)
    return Reader(Z_TC.float(), V_OC)


def learn_rotation(
    R: Tensor, readers: Sequence[Reader], steps: int, rate: float, bits: int, generator: Generator, keep_mean: bool
) -> LearnedRotation:
    """Cayley SGD from R; the best of the matrices on the way, R among them.

    Args:
        R: [n, n] orthogonal.
        readers: Weights and vectors that R rotates.
        steps: Number of steps; the angle of a step falls linearly to zero.
        rate: Mean angle of the first step, in radians.
        bits: Bits of Q, for activations and weights.
        generator: Random generator of the readers of each step, and of their outputs.
        keep_mean: Keep the vector of ones.

    Returns:
        Never worse than R on all readers; orthogonal to 1e-12.
    """
    device = readers[0].Z_TC.device
    chosen = [_some_rows(reader, generator) for reader in readers]
    R = R.to(device, torch.float64)
    with torch.no_grad():
        before = best_loss = float(rounding_loss(R.float(), chosen, bits))
    best, M = R, torch.zeros_like(R)
    for step in range(steps):
        indices = torch.randperm(len(chosen), generator=generator, device="cpu")[:READERS_PER_STEP].tolist()
        with torch.enable_grad():
            variable = R.float().requires_grad_()
            (G,) = torch.autograd.grad(rounding_loss(variable, [chosen[i] for i in indices], bits), variable)
        M = MOMENTUM * M + G.double()
        R = cayley_step(R, M, rate * (1 - step / steps), keep_mean)
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == steps:
            with torch.no_grad():
                loss = float(rounding_loss(R.float(), chosen, bits))
            if loss < best_loss:
                best, best_loss = R, loss
    return LearnedRotation(best.cpu(), before, best_loss)


def rounding_loss(R: Tensor, readers: Sequence[Reader], bits: int) -> Tensor:
    """The relative squared error of the readers' outputs, averaged over readers."""
    losses = []
    for reader in readers:
        exact_TO = reader.Z_TC @ reader.V_OC.t()
        rounded_TO = _rounded(reader.Z_TC @ R, bits) @ _rounded(reader.V_OC @ R, bits).t()
        losses.append((rounded_TO - exact_TO).square().sum() / exact_TO.square().sum().clamp_min(1e-20))
    return torch.stack(losses).mean()


def cayley_step(R: Tensor, M: Tensor, angle: float, keep_mean: bool = False) -> Tensor:
    """One step against the direction M along the orthogonal matrices.

    Args:
        R: [n, n] orthogonal, float64.
        M: [n, n], a gradient or its running sum.
        angle: Root mean square of the angles that the step turns by, in radians.
        keep_mean: Keep the vector of ones.
    """
    n = len(R)
    A = M @ R.t()
    A = A - A.t()
    if keep_mean:
        A = A - A.mean(0, keepdim=True)
        A = A - A.mean(1, keepdim=True)
    size = A.norm() / n**0.5
    if not size > 0:
        return R
    half, I_nn = A * (angle / size / 2), torch.eye(n, dtype=R.dtype, device=R.device)
    return torch.linalg.solve(I_nn + half, R - half @ R)


def _rounded(x: Tensor, bits: int) -> Tensor:
    """Round to a symmetric grid with one scale per row; the gradient passes the rounding, and reaches the scale."""
    high = 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / (high + 0.5)
    v = x / scale
    return (v + (v.round().clamp(-high - 1, high) - v).detach()) * scale


def _some_rows(reader: Reader, generator: Generator) -> Reader:
    rows = torch.randperm(len(reader.V_OC), generator=generator, device="cpu")[:ROWS]
    return Reader(reader.Z_TC, reader.V_OC[rows.to(reader.V_OC.device)])
