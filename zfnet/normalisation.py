"""Contrast normalisation: every response divided by the energy of its neighbours among the feature maps.

ZFNet (Zeiler and Fergus 2014, Sec. 3) takes the operation of AlexNet (Krizhevsky et al. 2012, Sec. 3.3) and
states no constants, so AlexNet's are used. With a_i the response of feature map i at one position, of N maps:

    b_i = a_i / (k + c * sum_{j = max(0, i - n/2)}^{min(N - 1, i + n/2)} a_j^2) ^ beta

The formula printed in the paper has c = alpha. The programme that trained both networks (cuda-convnet, and
after it Caffe and torch) has c = alpha / n. Both are here by name, and the second is the default.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Convention = Literal["configuration", "printed"]

# AlexNet Sec. 3.3: "k = 2, n = 5, alpha = 10^-4, and beta = 0.75".
ALEXNET_SIZE = 5
ALEXNET_ALPHA = 1e-4
ALEXNET_BETA = 0.75
ALEXNET_K = 2.0


class LocalResponseNorm(nn.Module):
    """Contrast normalisation over a window of neighbouring feature maps; same shape and type out as in.

    With `convention="configuration"` it equals `torch.nn.LocalResponseNorm` of the same numbers; with "printed"
    that of `alpha * size`. It adds shifted maps where torch runs a three-dimensional pooling: on two CPU cores,
    forward and backward together, 3 to 6 times faster. It also takes half precision, and sums it in float32.

    Args:
        size: feature maps in the window, n. An even window reaches one map further down than up, as in torch.
        alpha: weight of the sum of squares, in the words of `convention`.
        beta: exponent of the divisor.
        k: the divisor's constant, so that silence is not amplified.
        convention: "configuration" divides alpha by n, as cuda-convnet and torch do; "printed" does not.
    """

    def __init__(
        self,
        size: int = ALEXNET_SIZE,
        alpha: float = ALEXNET_ALPHA,
        beta: float = ALEXNET_BETA,
        k: float = ALEXNET_K,
        convention: Convention = "configuration",
    ) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size is {size}: a window holds at least 1 feature map; AlexNet's holds {ALEXNET_SIZE}")
        if convention not in get_args(Convention):
            raise ValueError(
                f"convention is {convention!r}; expected 'configuration' (alpha divided by size, as cuda-convnet "
                "ran) or 'printed' (alpha as the paper's formula has it)"
            )
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.k = k
        self.convention = convention

    @property
    def weight_of_squares(self) -> float:
        """The factor c that multiplies the sum of squares."""
        return self.alpha / self.size if self.convention == "configuration" else self.alpha

    def forward(self, responses: Tensor) -> Tensor:
        """Normalise `responses` (images x feature maps x ...) along the feature maps."""
        return local_response_norm(responses, self.size, self.weight_of_squares, self.beta, self.k)

    def extra_repr(self) -> str:
        """The constants, for `print(model)`."""
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}, convention={self.convention!r}"


@torch.fx.wrap  # one operation to torch.fx, as torch's own module is
def local_response_norm(responses: Tensor, size: int, weight: float, beta: float, k: float) -> Tensor:
    """`responses / (k + weight * sum of squares over size neighbouring feature maps) ** beta`.

    Args:
        responses: images x feature maps x ..., any floating point type.
        size: feature maps in the window.
        weight: factor of the sum of squares (not divided by `size`).
        beta: exponent.
        k: constant of the divisor.

    Raises:
        ValueError: `responses` has no dimension of feature maps.
    """
    if responses.ndim < 2:
        raise ValueError(
            f"responses have shape {tuple(responses.shape)}; expected images x feature maps x ...: "
            "add a first dimension to a single image with [None]"
        )
    # Half precision holds neither the squares of responses around 1000 (float16) nor their sum (bfloat16).
    wide = responses.float() if responses.dtype in (torch.float16, torch.bfloat16) else responses
    normalised: Tensor = _Normalise.apply(wide, size, weight, beta, k)
    return normalised.to(responses.dtype)


class _Normalise(torch.autograd.Function):
    """The formula and its derivative in closed form, which keeps two tensors where autograd would keep ten."""

    @staticmethod
    def forward(ctx: Any, responses: Tensor, size: int, weight: float, beta: float, k: float) -> Tensor:
        divisor = _window_sum(responses.square(), size // 2, (size - 1) // 2).mul_(weight).add_(k)
        ctx.save_for_backward(responses, divisor)
        ctx.size, ctx.weight, ctx.beta = size, weight, beta
        return _inverse_power(divisor, beta).mul_(responses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        # db_i/da_j = [i = j] d_i^-beta - 2 c beta a_i a_j d_i^(-beta - 1) for j in the window of i, so the sum
        # over i runs over the window turned round.
        responses, divisor = ctx.saved_tensors
        direct = _inverse_power(divisor, ctx.beta).mul_(gradient)
        shared = (direct * responses).div_(divisor)
        through_neighbours = _window_sum(shared, (ctx.size - 1) // 2, ctx.size // 2).mul_(responses)
        return direct.sub_(through_neighbours, alpha=2 * ctx.weight * ctx.beta), None, None, None, None


def _window_sum(maps: Tensor, below: int, above: int) -> Tensor:
    """Sum of each feature map, the `below` maps before it and the `above` maps after it."""
    total = maps.clone()
    for shift in range(1, below + 1):
        total[:, shift:] += maps[:, :-shift]
    for shift in range(1, above + 1):
        total[:, :-shift] += maps[:, shift:]
    return total


def _inverse_power(divisor: Tensor, beta: float) -> Tensor:
    """`divisor ** -beta` in a new tensor; the papers' beta by square roots, much faster than `pow`."""
    if beta == ALEXNET_BETA:
        return divisor.sqrt().mul_(divisor).rsqrt_()
    return divisor.pow(-beta)
