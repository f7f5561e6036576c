"""The loss: what is kept of a teacher, and how much each part counts."""

import math

import pytest
import torch
from jaxtyping import Float
from tiny_models import tiny_model
from torch import Tensor

from onecomp.post_process.distillation import (
    LEAST_REST,
    LossWeights,
    TeacherDistribution,
    TopTokens,
    WholeDistribution,
    training_loss,
)

VOCABULARY = 12
TEMPERATURES = [0.5, 1.0, 2.0]


def draw(seed: int, size: float = 1.0) -> Tensor:
    """Logits of 3 samples of 5 positions."""
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(3, 5, VOCABULARY, generator=generator)


def drawn_ids(seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(seed))


def kept_exactly(logits: Tensor, top: int, temperature: float) -> TopTokens:
    """``TopTokens.of`` without the rounding of logarithms to float16."""
    return TopTokens.of(logits, top, temperature, dtype=torch.float32)


def grouped(probs: Tensor, ids: Tensor) -> Tensor:
    """Mass of the kept tokens, and behind them that of all others."""
    kept = probs.gather(-1, ids.long())
    return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1)


def relative_entropy(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def gradient(teacher: TeacherDistribution, logits: Tensor, temperature: float) -> Tensor:
    logits = logits.clone().requires_grad_()
    teacher.divergence(logits, temperature).sum().backward()
    return logits.grad


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_whole_divergence_is_relative_entropy(temperature):
    teacher, student = draw(0), draw(1)
    p, q = ((logits.double() / temperature).softmax(-1) for logits in (teacher, student))
    found = WholeDistribution(teacher).divergence(student, temperature)
    torch.testing.assert_close(found, relative_entropy(p, q).float())


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_all_tokens_kept_give_the_whole_divergence_and_its_gradient(temperature):
    teacher, student = draw(0), draw(1)
    whole, kept = WholeDistribution(teacher), kept_exactly(teacher, VOCABULARY, temperature)
    torch.testing.assert_close(
        kept.divergence(student, temperature), whole.divergence(student, temperature)
    )
    torch.testing.assert_close(
        gradient(kept, student, temperature), gradient(whole, student, temperature)
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("top", [1, 4, VOCABULARY - 1])
def test_what_kept_tokens_miss_is_the_rests_mass_times_the_divergence_within_it(top, temperature):
    teacher, student = draw(0), draw(1)
    kept = kept_exactly(teacher, top, temperature)
    whole = WholeDistribution(teacher).divergence(student, temperature)
    found = kept.divergence(student, temperature)

    others = teacher.argsort(descending=True)[..., top:]
    p, q = (
        (logits.double() / temperature).softmax(-1).gather(-1, others)
        for logits in (teacher, student)
    )
    mass, mass_of_student = p.sum(-1, keepdim=True), q.sum(-1, keepdim=True)
    missed = mass.squeeze(-1) * relative_entropy(p / mass, q / mass_of_student)
    torch.testing.assert_close(whole - found, missed.float(), rtol=1e-4, atol=2e-6)
    assert (found <= whole + 1e-5).all()
    assert (missed > 1e-5).any() == (top < VOCABULARY - 1)  # a rest of one token has no inside


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("top", [1, 4, VOCABULARY - 1])
def test_the_gradient_of_kept_tokens_is_that_of_the_grouped_distribution(top, temperature):
    teacher, student = draw(0), draw(1)
    kept = kept_exactly(teacher, top, temperature)
    found = gradient(kept, student, temperature)

    logits = student.double().requires_grad_()
    p = grouped((teacher.double() / temperature).softmax(-1), kept.ids)
    q = grouped((logits / temperature).softmax(-1), kept.ids)
    relative_entropy(p, q).sum().backward()
    torch.testing.assert_close(found, logits.grad.float(), rtol=1e-4, atol=1e-6)


def test_the_gradient_agrees_with_finite_differences():
    teacher, student, step = draw(0), draw(1), 1e-2
    kept = kept_exactly(teacher, 4, 1.0)
    found = gradient(kept, student, 1.0)
    for token in range(VOCABULARY):
        change = step * torch.nn.functional.one_hot(torch.tensor(token), VOCABULARY)
        ahead, behind = (kept.divergence(student + sign * change, 1.0) for sign in (1, -1))
        slope = (ahead - behind) / (2 * step)
        torch.testing.assert_close(found[..., token], slope, rtol=0, atol=1e-3)


def test_the_most_probable_tokens_are_kept_in_half_precision():
    logits = draw(0)
    top = TopTokens.of(logits, 4, 2.0)
    exact = kept_exactly(logits, 4, 2.0)
    assert torch.equal(top.ids, exact.ids)
    assert (top.ids.dtype, top.log_probs.dtype) == (torch.int32, torch.float16)
    assert torch.equal(top.log_probs, exact.log_probs.half())
    others = 1 - exact.log_probs.exp().sum(-1)
    torch.testing.assert_close(top.rest, others, rtol=0, atol=2e-3)
    found, expected = (kept.divergence(draw(1), 2.0) for kept in (top, exact))
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)


def test_more_tokens_than_there_are_keep_all():
    logits = draw(0)
    top = TopTokens.of(logits, 100, 1.0)
    assert top.ids.shape == logits.shape
    assert torch.equal(top.ids.long().sort(-1).values, torch.arange(VOCABULARY).expand(3, 5, -1))


@pytest.mark.parametrize("top", [4, VOCABULARY])
def test_a_student_like_the_teacher_has_no_divergence_and_no_gradient(top):
    logits = draw(0)
    for teacher in (WholeDistribution(logits), kept_exactly(logits, top, 1.0)):
        assert teacher.divergence(logits, 1.0).abs().max() < 1e-6
        assert gradient(teacher, logits, 1.0).abs().max() < 1e-6
        assert (teacher.divergence(draw(1), 1.0) > 0).all()


@pytest.mark.parametrize("of_teacher", [1.0, 200.0])
def test_a_student_without_mass_elsewhere_still_has_a_finite_loss(of_teacher):
    student = torch.full((1, 1, VOCABULARY), -200.0)
    student[..., :4] = 200.0
    teacher = torch.zeros(1, 1, VOCABULARY)
    teacher[..., :4] = of_teacher
    kept = kept_exactly(teacher, 4, 1.0)
    rest = kept.rest.double().squeeze()
    p = torch.stack([(1 - rest) / 4] * 4 + [rest + 1e-12])
    q = torch.tensor([0.25] * 4 + [LEAST_REST], dtype=torch.float64)
    found = kept.divergence(student, 1.0).squeeze()
    torch.testing.assert_close(found, relative_entropy(p, q).float(), rtol=1e-2, atol=1e-5)
    assert gradient(kept, student, 1.0).isfinite().all()


def test_the_next_tokens_part_is_transformers_own_loss():
    model = tiny_model("llama")
    ids = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answer = model(input_ids=ids, labels=ids)
    weights = LossWeights(distill=0.0, next_token=1.0)
    found = training_loss(answer.logits, ids, None, weights)
    torch.testing.assert_close(found, answer.loss)


def test_parts_are_weighted_and_the_divergence_by_the_squared_temperature():
    teacher, student, ids = WholeDistribution(draw(0)), draw(1), drawn_ids()
    weights = LossWeights(distill=0.3, next_token=0.7, temperature=2.0)
    found = training_loss(student, ids, teacher, weights)
    told = teacher.divergence(student, 2.0).mean()
    guessed = training_loss(student, ids, None, LossWeights(0.0, 1.0))
    torch.testing.assert_close(found, 0.3 * 4 * told + 0.7 * guessed)


def test_the_divergence_of_nearly_even_distributions_counts_the_same_at_any_temperature():
    teacher, student = WholeDistribution(draw(0, 0.1)), draw(1, 0.1)
    cold, hot = (
        float(training_loss(student, drawn_ids(), teacher, LossWeights(temperature=value)))
        for value in (1.0, 10.0)
    )
    assert cold == pytest.approx(hot, rel=0.1)


def test_a_part_without_weight_is_not_computed():
    class Unasked(TeacherDistribution):
        def divergence(
            self, logits: Float[Tensor, "samples length vocabulary"], temperature: float
        ) -> Float[Tensor, "samples length"]:
            raise AssertionError

    student, ids = draw(1), drawn_ids()
    training_loss(student, ids, Unasked(), LossWeights(0.0, 1.0))
    alone = training_loss(student, ids, WholeDistribution(draw(0)), LossWeights())
    other = training_loss(student, drawn_ids(1), WholeDistribution(draw(0)), LossWeights())
    assert torch.equal(alone, other)  # the tokens themselves do not matter to the divergence


@pytest.mark.parametrize("next_token", [0.0, 1.0])
def test_neither_length_nor_number_of_samples_changes_the_size(next_token):
    weights = LossWeights(1.0 - next_token, next_token)

    def loss(teacher: Tensor, student: Tensor, ids: Tensor) -> float:
        return float(training_loss(student, ids, WholeDistribution(teacher), weights))

    teacher, student, ids = draw(0)[:, :1], draw(1)[:, :1], torch.full((3, 1), 7)
    short = loss(teacher.repeat(1, 4, 1), student.repeat(1, 4, 1), ids.repeat(1, 4))
    long = loss(teacher.repeat(1, 40, 1), student.repeat(1, 40, 1), ids.repeat(1, 40))
    many = loss(teacher.repeat(5, 4, 1), student.repeat(5, 4, 1), ids.repeat(5, 4))
    assert short == pytest.approx(long, rel=1e-5)
    assert short == pytest.approx(many, rel=1e-5)
    assert short > 0.1


def test_a_guess_without_knowledge_costs_the_logarithm_of_the_vocabulary():
    weights = LossWeights(distill=0.0, next_token=1.0)
    found = training_loss(torch.zeros(3, 5, VOCABULARY), drawn_ids(), None, weights)
    assert float(found) == pytest.approx(math.log(VOCABULARY))


def test_logits_in_half_precision_are_judged_in_single_precision():
    student = draw(1).bfloat16()
    for teacher in (
        WholeDistribution(draw(0).bfloat16()),
        TopTokens.of(draw(0).bfloat16(), 4, 1.0),
    ):
        found = training_loss(student, drawn_ids(), teacher, LossWeights(1.0, 1.0))
        wide = training_loss(student.float(), drawn_ids(), teacher, LossWeights(1.0, 1.0))
        assert found.dtype == torch.float32
        assert torch.equal(found, wide)
