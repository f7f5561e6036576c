"""What stands in for quantized layers while they are trained."""

import pytest
import torch
from torch import Tensor, nn

from onecomp.quantizer.dbf.layer import DoubleBinaryLinear
from onecomp.quantizer.gptq.layer import GPTQLinear
from onecomp.quantizer.gptq.trainable import TrainableCodes
from onecomp.quantizer.onebit.layer import OnebitLinear
from onecomp.quantizer.quant_linear import QuantLinear, trainable_layers
from onecomp.quantizer.trainable import Trained, codes_of, signs_of

IN, OUT, RANK = 64, 32, 24


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gptq_layer(*, actorder: bool = False) -> GPTQLinear:
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(IN) // 16
    if actorder:
        groups = groups[torch.randperm(IN, generator=generator)]
    state = {
        "qweight": torch.randint(0, 8, (OUT, IN), generator=generator, dtype=torch.int32),
        "qzeros": torch.randint(0, 8, (4, OUT), generator=generator, dtype=torch.int32),
        "scales": (0.5 + torch.rand(4, OUT, generator=generator)).half(),
        "g_idx": groups.int(),
        "bias": draw(OUT),
    }
    return GPTQLinear.from_saved_state(state, wbits=3, groupsize=16)


def dbf_layer() -> DoubleBinaryLinear:
    generator = torch.Generator().manual_seed(0)
    state = {
        "scaling0": torch.rand(IN, generator=generator).half() + 0.5,
        "bp1": torch.randint(0, 256, (RANK * IN // 8,), generator=generator, dtype=torch.uint8),
        "scaling2": torch.rand(RANK, generator=generator).half() + 0.5,
        "bp3": torch.randint(0, 256, (OUT * RANK // 8,), generator=generator, dtype=torch.uint8),
        "scaling4": torch.rand(OUT, generator=generator).half() + 0.5,
    }
    return DoubleBinaryLinear.from_saved_state(state)


def onebit_layer() -> OnebitLinear:
    generator = torch.Generator().manual_seed(0)
    layer = OnebitLinear(IN, OUT)
    layer.a.data = torch.rand(OUT, generator=generator).half() + 0.5
    layer.b.data = torch.rand(IN, generator=generator).half() + 0.5
    signs = torch.randint(0, 256, (OUT * IN // 8,), generator=generator, dtype=torch.uint8)
    layer.sign_packed = signs
    return layer


LAYERS = [
    pytest.param(gptq_layer, id="gptq"),
    pytest.param(lambda: gptq_layer(actorder=True), id="gptq with g_idx"),
    pytest.param(dbf_layer, id="dbf"),
    pytest.param(onebit_layer, id="onebit"),
]
ALL = Trained(zero_points=True, codes=True, signs=True)


def packed(layer: QuantLinear) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.packed_state().items()}


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("trained", [Trained(), ALL], ids=["scales", "all"])
@pytest.mark.parametrize("has_reference", [False, True])
def test_training_begins_with_the_weight_as_it_is(make, trained, has_reference):
    layer = make()
    reference = layer.dequantize() + 0.3 * draw(OUT, IN) if has_reference else None
    learning = layer.trainable(trained, reference)
    torch.testing.assert_close(learning.weight(), layer.dequantize(), rtol=1e-6, atol=1e-6)
    before = packed(layer)
    layer.adopt(learning)
    assert all(torch.equal(before[name], tensor) for name, tensor in packed(layer).items())


@pytest.mark.parametrize("make", LAYERS)
def test_the_original_weight_may_be_on_another_device(make):
    learning = make().to("meta").trainable(ALL, draw(OUT, IN))
    assert {p.device.type for p in learning.parameters()} == {"meta"}


@pytest.mark.parametrize("make", LAYERS)
def test_what_is_learned_is_what_is_stored(make):
    layer = make()
    learning = layer.trainable(ALL)
    target = layer.dequantize().std() * draw(OUT, IN, seed=1)
    latents = [*learning.zero_points(), *learning.decisions()]
    lr_of_latents = 0.02 if isinstance(learning, TrainableCodes) else 0.1 * ALL.latent_scale
    groups = [
        {"params": list(learning.scales()), "lr": 0.01},
        {"params": latents, "lr": lr_of_latents},
    ]
    optimizer = torch.optim.Adam(groups)
    errors = []
    for _ in range(60):
        error = (learning.weight() - target).square().mean()
        optimizer.zero_grad()
        error.backward()
        assert all(p.grad is not None for group in groups for p in group["params"])
        optimizer.step()
        errors.append(float(error.detach()))
    assert min(errors) < 0.9 * errors[0]
    weight = learning.weight().detach()
    layer.adopt(learning)
    torch.testing.assert_close(layer.dequantize(), weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", LAYERS)
def test_only_what_was_asked_for_changes(make):
    learning = make().trainable(Trained())
    trained = {id(p) for p in learning.parameters() if p.requires_grad}
    assert trained == {id(p) for p in learning.scales()}
    assert not [*learning.zero_points(), *learning.decisions(), *learning.decided()]


def test_layers_come_back_as_they_were_after_an_error():
    model = nn.Sequential(gptq_layer())
    layer, before = model[0], packed(model[0])

    def interrupted() -> None:
        with trainable_layers(model, Trained()) as learning, torch.no_grad():
            learning["0"].scale.mul_(2)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert model[0] is layer
    assert all(torch.equal(before[name], tensor) for name, tensor in packed(layer).items())


def test_layers_take_over_what_was_learned():
    model = nn.Sequential(gptq_layer())
    layer, before = model[0], model[0].dequantize()
    with trainable_layers(model, Trained()) as learning, torch.no_grad():
        learning["0"].scale.mul_(2)
    assert model[0] is layer
    torch.testing.assert_close(layer.dequantize(), 2 * before)


def test_codes_are_the_nearest_and_their_gradient_is_largest_between_two():
    latent = torch.tensor([-0.4, 0.0, 1.45, 2.0, 7.3, 9.0], requires_grad=True)
    codes = codes_of(latent, 7)
    assert codes.tolist() == [0, 0, 1, 2, 7, 7]
    codes.sum().backward()
    assert latent.grad[2] > 20 * latent.grad[3] > 0
    assert latent.grad[5] == 0


def test_the_slope_of_a_sign_is_as_wide_as_the_latent_scale():
    trained = Trained(signs=True)
    latent = torch.tensor([0.0, trained.latent_scale, -10 * trained.latent_scale])
    latent.requires_grad_()
    signs = signs_of(latent, trained)
    assert signs.tolist() == [1, 1, -1]
    signs.sum().backward()
    assert latent.grad[0] == 1
    assert 0.4 < latent.grad[1] < 0.45
    assert latent.grad[2] < 1e-6
