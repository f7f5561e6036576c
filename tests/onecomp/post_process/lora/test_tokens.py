import torch

from onecomp.post_process.lora.tokens import IGNORED, Batch, write_tokens


def test_shorter_samples_are_padded_at_their_end():
    batch = Batch.of([torch.tensor([1, 2, 3]), torch.tensor([4])])
    assert batch.input_ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[1, 2, 3], [4, IGNORED, IGNORED]]


def test_predictions_are_those_of_the_targets():
    batch = Batch.of([torch.tensor([1, 2, 3]), torch.tensor([4, 5])])
    logits = torch.arange(6.0).reshape(2, 3, 1)
    assert batch.targets.tolist() == [2, 3, 5]
    assert batch.predictions(logits).flatten().tolist() == [0, 1, 3]
    whole = Batch.of([torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])])
    assert whole.predictions(logits).flatten().tolist() == [0, 1, 3, 4]


def test_samples_come_back_from_their_file(tmp_path):
    samples = [[5, 6, 7], [8, 9]]
    tokens = write_tokens(tmp_path / "tokens.arrow", iter(samples))
    assert len(tokens) == 2
    assert tokens.lengths == [3, 2]
    assert [tokens.sample(number).tolist() for number in range(2)] == samples
    assert tokens.batch([1, 0]).input_ids.tolist() == [[8, 9, 0], [5, 6, 7]]
