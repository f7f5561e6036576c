import torch

from onecomp.calibration.samples import CalibrationSamples


def samples(rows: list[list[int]], mask_value: int = 1) -> CalibrationSamples:
    ids = torch.tensor(rows)
    return CalibrationSamples(input_ids=ids, attention_mask=torch.full_like(ids, mask_value))


def test_content_hash_is_the_same_for_equal_data_in_another_memory_layout():
    ids = torch.arange(6).reshape(2, 3)
    transposed = ids.T.contiguous().T
    assert not transposed.is_contiguous()
    mask = torch.ones_like(ids)
    assert (
        CalibrationSamples(ids, mask).content_hash()
        == CalibrationSamples(transposed, mask).content_hash()
    )


def test_content_hash_tells_ids_masks_order_and_shape_apart():
    different = [
        samples([[1, 2], [3, 4]]),
        samples([[1, 2], [3, 5]]),
        samples([[3, 4], [1, 2]]),
        samples([[1, 2, 3, 4]]),
        samples([[1, 2], [3, 4]], mask_value=0),
    ]
    hashes = {s.content_hash() for s in different}
    assert len(hashes) == len(different)
    assert all(len(h) == 64 for h in hashes)


def test_length_is_the_number_of_samples():
    assert len(samples([[1, 2, 3], [4, 5, 6]])) == 2
