"""How far a network still is from what it will be: cosines of filters and of projections, epoch against epoch.

Zeiler and Fergus, ECCV 2014, Sec. 4 and Fig. 4, look at each feature map's strongest projection as training goes on.
They see the lower layers converge within a few epochs, the upper ones after 40 to 50. The paper shows pictures; here
the same is a number.
"""

import torch
from torch import Tensor


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """[M]: cosine of each of M pairs of tensors [M, ...], taken as vectors, in float64; NaN where either is zero.

    Raises ValueError for tensors of two shapes.
    """
    if one.shape != other.shape:
        raise ValueError(f"shapes {tuple(one.shape)} and {tuple(other.shape)} were given; expected one and the same")
    a, b = (vectors.double().flatten(1) for vectors in (one, other))
    length = a.square().sum(1).sqrt() * b.square().sum(1).sqrt()
    return ((a * b).sum(1) / length).clamp(-1, 1)


def in_field(pixels: Tensor, top: int, left: int, size: tuple[int, int]) -> Tensor:
    """A projection [rows, cols, channels] that was cut to its image, back at its place in the receptive field.

    So projections of cells at the image's border can be compared with others. What lies outside the image is zero, as
    it was before the cut.

    Args:
        pixels: the rows and columns inside the image.
        top, left: first row and column of the field in the image's pixels; negative where it leaves the image.
        size: rows and columns of the field.

    Returns: [*size, channels].
    """
    rows, cols, channels = pixels.shape
    first_row, first_col = max(0, -top), max(0, -left)
    if first_row + rows > size[0] or first_col + cols > size[1]:
        raise ValueError(
            f"{rows} x {cols} pixels at ({first_row}, {first_col}) do not fit into a field of {size[0]} x {size[1]}"
        )
    field = torch.zeros(*size, channels, dtype=pixels.dtype)
    field[first_row : first_row + rows, first_col : first_col + cols] = pixels
    return field
