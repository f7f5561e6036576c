import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from onecomp import ModelConfig
from onecomp.errors import InputError
from onecomp.post_process import teacher as teacher_module
from onecomp.post_process.distillation import TopTokens
from onecomp.post_process.lora import answers as answers_module
from onecomp.post_process.lora.answers import (
    KL,
    MSE,
    Answer,
    BothAnswers,
    Kept,
    LiveAnswers,
    Question,
    keep_answers,
    kept_bytes,
    split_question,
)
from onecomp.post_process.lora.losses import LoraLoss
from onecomp.post_process.lora.outputs import blocks_of, outputs_of
from onecomp.post_process.lora.tokens import TokenFile, write_tokens
from onecomp.post_process.teacher import require_room

LENGTHS = [7, 12, 3]
FLOAT32 = Kept(torch.float32, torch.float32)


@pytest.fixture
def tokens(tmp_path) -> TokenFile:
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(0, 256, (length,), generator=generator) for length in LENGTHS]
    return write_tokens(tmp_path / "tokens.arrow", (sample.tolist() for sample in samples))


@pytest.fixture
def student(quantized, original):
    """Runs the quantized model on a batch; hidden states of both blocks."""
    model = quantized()
    blocks = blocks_of(model, original)
    with torch.no_grad():
        yield lambda batch: outputs_of(model, blocks, batch, (0, 1))


def test_the_next_token_loss_is_that_of_transformers(quantized, tokens, student):
    batch = tokens.batch([0, 1, 2])
    with torch.no_grad():
        expected = quantized()(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss
    found = LoraLoss(next_token=2.0)(student(batch), batch, Answer())
    assert torch.allclose(found, 2 * expected)


@pytest.mark.parametrize("loss_type", [KL, MSE])
def test_distances_are_means_over_the_tokens_of_each_sample(
    loss_type, tokens, student, quantized, original
):
    """Against a loop over samples, one by one and without padding."""
    teacher, model, temperature = original.load_model(), quantized(), 2.0
    distances, hidden = [], []
    with torch.no_grad():
        for number in range(len(tokens)):
            ids = tokens.sample(number).unsqueeze(0)
            told, said = (m(input_ids=ids, output_hidden_states=True) for m in (teacher, model))
            hidden.append((said.hidden_states[1] - told.hidden_states[1])[0].square())
            told, said = told.logits[0, :-1], said.logits[0, :-1]
            if loss_type == MSE:
                distances.append((said - told).square().mean(-1))
                continue
            said, told = ((x / temperature).log_softmax(-1) for x in (said, told))
            kl = functional.kl_div(said, told, reduction="none", log_target=True).sum(-1)
            distances.append(temperature**2 * kl)
    batch = tokens.batch([0, 1, 2])
    loss = LoraLoss(0.0, 1.0, loss_type, temperature)
    answer = LiveAnswers(original, Question(loss_type)).of([0, 1, 2], batch)
    found = loss(student(batch), batch, answer)
    assert torch.allclose(found, torch.cat(distances).mean(), rtol=1e-4)

    both = LiveAnswers(original, Question(None, (0,))).of([0, 1, 2], batch)
    only_first = outputs_of(model, model.model.layers, batch, (0,))
    found = LoraLoss(0.0, hidden=3.0)(only_first, batch, both)
    assert torch.allclose(found, 3 * torch.cat(hidden).mean(), rtol=1e-4)


@pytest.mark.parametrize("loss_type", [KL, MSE, None])
def test_kept_answers_teach_what_the_live_teacher_does(
    loss_type, tokens, student, original, tmp_path
):
    question = Question(loss_type, (0, 1))
    kept = keep_answers(original, question, FLOAT32, tokens, tmp_path / "kept")
    loss = LoraLoss(0.0, 1.0 if loss_type else 0.0, loss_type or KL, hidden=1.0)
    batch = tokens.batch([2, 0])
    live = LiveAnswers(original, question).of([2, 0], batch)
    found = loss(student(batch), batch, kept.of([2, 0], batch))
    assert torch.allclose(found, loss(student(batch), batch, live), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kept_tokens_have_the_precision_that_is_asked_for(
    dtype, tokens, student, original, tmp_path, monkeypatch
):
    """And the mass of all others is what it was before rounding."""
    monkeypatch.setattr(answers_module, "KEPT_TOKENS", 16)
    question, batch = Question(KL), tokens.batch([1, 0])
    kept = keep_answers(original, question, Kept(dtype), tokens, tmp_path / "kept")
    # One sample at a time, as they are kept: sums of larger batches differ in the last bits.
    live = LiveAnswers(original, question)
    logits = torch.cat([live.outputs(tokens.batch([number])).predictions for number in (1, 0)])
    expected = logits.log_softmax(-1).topk(16)
    read = [load_file(tmp_path / "kept" / f"{number:06d}.safetensors") for number in (1, 0)]
    log_probs, rest = (torch.cat([file[key] for file in read]) for key in ("log_probs", "rest"))
    assert log_probs.dtype == dtype
    assert torch.allclose(log_probs.float(), expected.values, rtol=torch.finfo(dtype).eps, atol=0)
    assert rest.dtype == torch.float32
    assert torch.allclose(rest, 1 - expected.values.exp().sum(-1), atol=1e-6)

    loss, said = LoraLoss(0.0, 1.0), student(batch)
    said.hidden.clear()
    exact = Answer(TopTokens.of(logits.unsqueeze(0), 16, 1.0, dtype=torch.float32))
    found = loss(said, batch, kept.of([1, 0], batch))
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert torch.allclose(found, loss(said, batch, exact), rtol=tolerance)


@pytest.mark.parametrize("keeps_logits", [True, False])
def test_a_part_is_kept_and_a_part_is_asked_again(
    keeps_logits, tokens, student, original, tmp_path
):
    question = Question(KL, (1,))
    kept, live = split_question(question, keeps_logits=keeps_logits, keeps_hidden=not keeps_logits)
    assert bool(kept.loss_type) == bool(live.blocks) == keeps_logits
    read = keep_answers(original, kept, FLOAT32, tokens, tmp_path / "kept")
    joined, batch = BothAnswers(read, LiveAnswers(original, live)), tokens.batch([1, 0])
    whole = LiveAnswers(original, question)
    loss = LoraLoss(0.0, 1.0, hidden=1.0)
    said = student(batch)
    said.hidden.pop(0)
    found, expected = (loss(said, batch, a.of([1, 0], batch)) for a in (joined, whole))
    assert torch.allclose(found, expected, rtol=1e-3)


@pytest.mark.parametrize("question", [Question(KL, (0, 1)), Question(MSE), Question(None, (1,))])
def test_the_room_is_known_before(question, tokens, original, tmp_path):
    keep_answers(original, question, Kept(), tokens, tmp_path / "kept")
    files = sorted((tmp_path / "kept").iterdir())
    assert len(files) == len(LENGTHS)
    config = original.load_config()
    expected = kept_bytes(question, Kept(), LENGTHS, config.vocab_size, config.hidden_size)
    headers = 600 * len(files)
    assert expected <= sum(file.stat().st_size for file in files) <= expected + headers


def test_a_disk_without_room_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_module, "free_disk", lambda _path: 10**9)
    told, remedy = "the teacher's answers would take", "or use fewer samples"
    require_room("LoRA", told, 10**9, tmp_path, remedy=remedy)
    with pytest.raises(InputError, match=r"would take 2\.0 GB, but .* has 1\.0 GB free"):
        require_room("LoRA", told, 2 * 10**9, tmp_path, remedy=remedy)


def test_the_original_is_not_changed_by_teaching(original: ModelConfig):
    answers = LiveAnswers(original, Question(KL))
    assert not any(p.requires_grad for p in answers.model.parameters())
    assert not answers.model.training
