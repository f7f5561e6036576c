import torch
from torch import Tensor

from onecomp.quantizer.drift import drift_problems, drifted


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_drift_is_noise_of_each_input_in_proportion_to_it():
    inputs = draw(200_000, 6) @ draw(6, 6, seed=1)
    hessian = inputs.T @ inputs / len(inputs)
    noise = draw(200_000, 6, seed=9) * (0.1 * hessian.diagonal()).sqrt()
    seen = (inputs + noise).T @ (inputs + noise) / len(inputs)
    assert torch.allclose(seen, drifted(hessian, 0.1), atol=0.02 * hessian.diagonal().max())


def test_no_drift_leaves_the_hessian_and_any_is_a_copy():
    hessian = torch.eye(3)
    assert torch.equal(drifted(hessian, 0.0), hessian)
    assert drifted(hessian, 0.5)[0, 0] == 1.5
    assert hessian[0, 0] == 1


def test_a_ratio_is_a_number_from_0_up():
    assert not drift_problems(0)
    assert drift_problems(-0.1) == ["drift_ratio=-0.1: must be 0 or more."]
    assert len(drift_problems("0.3")) == 1
