"""DBF beside a plain loop of its ADMM in float64: seconds and output error on one layer.

    OMP_NUM_THREADS=1 python benchmarks/dbf_speed.py --size 256 --iters 600

The loop is the published one: random start, importance of inputs by the Hessian's diagonal, three
inner steps, no refining. Both get the same weight, Hessian, bits and ``iters``.
"""

import argparse
import time

import torch
from torch import Tensor

from onecomp.quantizer import DBF
from onecomp.quantizer.dbf.rank import rank_of
from onecomp.quantizer.factors import HessianFactors


def project(point: Tensor, generator: torch.Generator) -> Tensor:
    """Signs times the magnitudes' leading singular pair, by ten power iterations."""
    magnitude = point.abs()
    row = torch.rand(magnitude.shape[1], generator=generator, dtype=torch.float64)
    column = magnitude @ row
    for _ in range(10):
        column = magnitude @ row
        column = column / column.norm()
        row = magnitude.T @ column
    return torch.where(point < 0, -1.0, 1.0) * column[:, None] * row


def solve(fixed: Tensor, target: Tensor, state: list[Tensor], rho: float, draws: torch.Generator):
    """Three inner steps for one factor."""
    gram = fixed.T @ fixed
    eye = torch.eye(len(gram), dtype=torch.float64)
    gram += 0.03 * gram.diagonal().mean() * eye
    lower, linear = torch.linalg.cholesky(gram + rho * eye), fixed.T @ target
    value, dual = state
    for _ in range(3):
        solved = torch.cholesky_solve(linear + rho * (value - dual), lower)
        value = project(solved + dual, draws)
        dual = dual + solved - value
    state[:] = value, dual


def plain_loop(weight: Tensor, hessian: Tensor, rank: int, iters: int) -> Tensor:
    """The weight that the factors stand for."""
    draws = torch.Generator().manual_seed(0)
    importance = hessian.diagonal().double().clamp_min(1e-8).sqrt()
    target = weight.double() * importance
    sides = [
        [torch.randn(rank, size, generator=draws, dtype=torch.float64)] for size in weight.shape
    ]
    left, right = ([value, torch.zeros_like(value)] for [value] in sides)
    norms = torch.ones(rank, 1, dtype=torch.float64)
    for step in range(iters):
        rho = 0.03 + 0.97 * min(1.0, step / max(1, iters - 3)) ** 3
        fixed = right[0] / (right[0].norm(dim=1, keepdim=True) + 1e-12)
        solve(fixed.T, target.T, left, rho, draws)
        norms = left[0].norm(dim=1, keepdim=True) + 1e-12
        solve((left[0] / norms).T, target, right, rho, draws)
    return ((left[0] / norms).T @ right[0] / importance).float()


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--iters", type=int, default=600)
    parser.add_argument("--target-bits", type=float, default=1.5)
    options = parser.parse_args()
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(options.size, options.size, generator=draws)
    inputs = torch.randn(4 * options.size, options.size, generator=draws)
    inputs = inputs @ torch.randn(options.size, options.size, generator=draws)
    hessian = 2 / len(inputs) * inputs.T @ inputs

    def show(name: str, started: float, found: Tensor) -> None:
        seconds, off = time.process_time() - started, weight - found
        error = ((off @ hessian) * off).sum() / ((weight @ hessian) * weight).sum()
        print(f"{name:<12} {seconds:8.2f} CPU s   relative output error {error:.4f}")

    started = time.process_time()
    quantizer = DBF(target_bits=options.target_bits, iters=options.iters)
    result = quantizer.quantize_weights({"layer": weight}, HessianFactors(hessian))["layer"]
    show("DBF", started, result.dequantize())
    started = time.process_time()
    rank = rank_of(options.size, options.size, options.target_bits)
    show("plain loop", started, plain_loop(weight, hessian, rank, options.iters))


if __name__ == "__main__":
    main()
