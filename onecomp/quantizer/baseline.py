"""What a layer would be without any search: the least that a method has to be better than."""

import torch
from jaxtyping import Float
from torch import Tensor

from onecomp.quantizer.grid import fit_grid, round_to_nearest


def nearest_weight(
    weight: Float[Tensor, "out in"], *, wbits: int, groupsize: int = -1, sym: bool = False
) -> Float[Tensor, "out in"]:
    """Every weight rounded to the nearest value of its group's plain grid (RTN), float32.

    Args:
        weight: Float32 weight.
        wbits: Bits per weight, 1 to 8.
        groupsize: Columns that share a scale; -1 for a whole row.
        sym: Symmetric grids.
    """
    size = weight.shape[1] if groupsize == -1 else groupsize
    groups = weight.T.reshape(-1, size, len(weight))
    grid = fit_grid(groups, wbits=wbits, sym=sym)
    centred = round_to_nearest(groups, grid) - grid.zero_point[:, None, :]
    return (centred * grid.scale[:, None, :]).reshape(weight.shape[1], -1).T.contiguous()


def sign_mean_weight(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """The sign of every weight times its row's mean magnitude, zero counted as positive.

    The least-squares scale of given signs (Rastegari et al., 2016, XNOR-Net, arXiv:1603.05279,
    section 3.1).
    """
    signs = torch.where(weight < 0, -1.0, 1.0)
    return signs * weight.abs().mean(dim=1, keepdim=True)
