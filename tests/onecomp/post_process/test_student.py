"""A quantized model made trainable for a while, and what of it is trained at which rate."""

import pytest
import torch

from onecomp.post_process.student import ZERO_POINT_TRAVEL, StudentRates, student_of

IDS = torch.arange(24).unsqueeze(0)
RATES = StudentRates(codes_scale=0.1, signs_scale=0.2)
PLAIN = {"uses_bf16": False, "gradient_checkpointing": False}


@pytest.mark.parametrize(
    ("family", "quantizer"),
    [("llama", "symmetric"), ("gemma2", "asymmetric"), ("llama", "dbf"), ("llama", "onebit")],
)
def test_it_answers_as_the_model_does_and_changes_nothing_by_itself(family, quantizer, subject_of):
    subject = subject_of(family, quantizer)
    model = subject.load()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
        with student_of(model, subject.model_config, **PLAIN) as student:
            torch.testing.assert_close(student.logits(IDS), expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(now, before[name]) for name, now in model.state_dict().items())


def test_zero_points_are_trained_where_grids_are_asymmetric_and_stored_whole(subject_of):
    symmetric, asymmetric = subject_of(), subject_of(quantizer="asymmetric")
    with student_of(symmetric.load(), symmetric.model_config, **PLAIN) as student:
        assert {name.rpartition(".")[2] for name in student.parameters()} == {"scale"}
        assert [group.lr for group in student.groups(RATES, 8)] == [0.1]
    model = asymmetric.load()
    layer = model.model.layers[1].mlp.up_proj
    codes = layer.codes().clone()
    with student_of(model, asymmetric.model_config, **PLAIN) as student:
        assert {name.rpartition(".")[2] for name in student.parameters()} == {"scale", "zero"}
        rates = [group.lr for group in student.groups(RATES, 8)]
        assert rates == [0.1, ZERO_POINT_TRAVEL / 8]
        trained = student.layers["model.layers.1.mlp.up_proj"]
        trained.zero.data[:, :4] = torch.tensor([3.4, 3.6, -1.0, 9.0])
        weight = trained.weight().detach()
    assert layer.zero_points()[:, :4].tolist() == [[3, 4, 0, 7]] * len(layer.scales)
    assert torch.equal(layer.codes(), codes)
    assert torch.equal(layer.dequantize(), weight)


def test_gradients_reach_everything_that_is_trained_and_nothing_else(subject_of):
    subject = subject_of(quantizer="asymmetric")
    model = subject.load()
    with student_of(model, subject.model_config, **PLAIN) as student:
        student.logits(IDS).float().square().mean().backward()
        trained = set(student.parameters().values())
        assert len(trained) == 2 * len(student.layers) == 28
        assert all(parameter.grad.abs().sum() > 0 for parameter in trained)
        in_groups = [p for group in student.groups(RATES, 8) for p in group.parameters]
        assert set(in_groups) == trained
        assert len(in_groups) == len(trained)
        assert not any(p.requires_grad for p in set(model.parameters()) - trained)


def test_scales_of_signs_have_the_rate_of_signs(subject_of):
    subject = subject_of(quantizer="onebit")
    with student_of(subject.load(), subject.model_config, **PLAIN) as student:
        [group] = student.groups(RATES, 8)
        assert group.lr == 0.2
        assert len(group.parameters) == 2 * len(student.layers)


def test_parameters_ask_for_gradients_as_before(subject):
    model = subject.load()
    model.model.norm.weight.requires_grad_(requires_grad=False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    assert set(before.values()) == {True, False}
    with student_of(model, subject.model_config, **PLAIN):
        assert not model.lm_head.weight.requires_grad
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_after_an_error_the_layers_are_as_they_were(subject):
    model = subject.load()
    layer = model.model.layers[0].self_attn.q_proj
    scales = layer.scales.detach().clone()

    def fail() -> None:
        with student_of(model, subject.model_config, **PLAIN) as student:
            for parameter in student.parameters().values():
                parameter.data.mul_(2)
            assert model.model.layers[0].self_attn.q_proj is not layer
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model.model.layers[0].self_attn.q_proj is layer
    assert torch.equal(layer.scales, scales)


def test_parameters_in_float16_are_wide_in_training_only(subject_of):
    subject = subject_of("opt", dtype="float16", tie=True)
    model = subject.load()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with student_of(
        model, subject.model_config, uses_bf16=False, gradient_checkpointing=True
    ) as student:
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert student.logits(IDS).dtype == torch.float32
        assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert all(torch.equal(now, before[name]) for name, now in model.state_dict().items())
    assert {p.dtype for p in model.parameters()} == {torch.float16}
