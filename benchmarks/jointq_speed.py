"""JointQ's local search of whole layers, beside the same search row by row in float64.

    python benchmarks/jointq_speed.py

Both begin at round-to-nearest and go through the groups once. Row by row means: for every step the
error of all single steps of the group's codes is computed anew, as the formula says. It is timed on
a few rows, and the time is scaled to all. Weights and inputs are random, inputs correlated.
"""

import time

import torch
from torch import Tensor

from onecomp.quantizer.jointq.local_search import search_groups
from onecomp.quantizer.jointq.problem import Problem, damped, nearest_state, regularizer

LAYERS = ((576, 576), (576, 1536))
"""Outputs and inputs of o_proj and down_proj of a small model."""
GROUPSIZE, WBITS = 64, 3
NUM_ROWS = 6
"""Rows that are also solved one by one."""


def main() -> None:
    """Print seconds and objectives of both."""
    torch.set_num_threads(1)
    for out_features, in_features in LAYERS:
        problem = random_problem(out_features, in_features)
        state = nearest_state(problem)
        started = time.process_time()
        search_groups(problem, state)
        seconds = time.process_time() - started
        started = time.process_time()
        slow = torch.stack([search_row(problem, row) for row in range(NUM_ROWS)])
        slow_seconds = (time.process_time() - started) * out_features / NUM_ROWS
        found = state.objective()[:NUM_ROWS]
        print(
            f"{out_features} x {in_features}: {seconds:.2f} s, row by row in float64 "
            f"{slow_seconds:.1f} s, {slow_seconds / seconds:.0f} times as long; "
            f"objective {found.sum() / slow.sum():.4f} of its"
        )


def random_problem(out_features: int, in_features: int) -> Problem:
    """A layer with Gaussian weights, whose inputs have a few strong directions."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2048, in_features, generator=generator)
    inputs += torch.randn(2048, 64, generator=generator) @ torch.randn(
        64, in_features, generator=generator
    )
    hessian = 2 / len(inputs) * inputs.T @ inputs
    gram = damped(hessian, 0.1 * regularizer(hessian, "diagonal", 0.5))
    columns = torch.randn(in_features, out_features, generator=generator)
    return Problem(columns, gram, GROUPSIZE, WBITS, symmetric=False)


def search_row(problem: Problem, row: int) -> Tensor:
    """Objective of one row after one search of every group, in float64."""
    start = nearest_state(problem.rows(torch.tensor([row])))
    gram, weight = problem.gram.double(), problem.columns[:, row].double()
    codes = start.steps[:, 0].double()
    values = codes * problem.per_column(start.scale)[:, 0].double()
    for t, group in enumerate(problem.groups):
        others = values - weight
        others[group] = -weight[group]
        target = -(gram @ others)[group]
        lowest = -start.zero_point[t, 0].item()
        codes[group] = search_codes(gram[group, group], codes[group], target, lowest, problem.maxq)
        seen = gram[group, group] @ codes[group]
        values[group] = codes[group] * (target @ codes[group]) / (seen @ codes[group])
    return (values - weight) @ gram @ (values - weight)


def search_codes(gram: Tensor, codes: Tensor, target: Tensor, lowest: float, maxq: int) -> Tensor:
    """Codes of one group after the best single steps, one after the other."""
    signs = torch.cat([torch.eye(len(codes)), -torch.eye(len(codes))]).double()
    best = (target @ codes).square() / (codes @ gram @ codes)
    for _ in range(len(codes)):
        moved = codes + signs
        explained = (moved @ target).square() / ((moved @ gram) * moved).sum(dim=1)
        barred = ((moved < lowest) | (moved > lowest + maxq)).any(dim=1)
        found, index = explained.masked_fill(barred, -1).max(dim=0)
        if found <= best * (1 + 1e-9):
            break
        best, codes = found, moved[index]
    return codes


if __name__ == "__main__":
    main()
