import json
import re

import pytest
import torch

from onecomp.calibration.samples import CalibrationSamples
from onecomp.errors import InputError
from onecomp.export import checkpoint
from onecomp.quantizer import GPTQResult, QuantizationResult
from onecomp.store import RunDirectory


def result(wbits: int = 4, *, perm: bool = True, seed: int = 0) -> GPTQResult:
    generator = torch.Generator().manual_seed(seed)
    return GPTQResult(
        wbits=wbits,
        groupsize=16,
        actorder=perm,
        qweight=torch.randint(0, 2**wbits, (8, 32), generator=generator, dtype=torch.int32),
        scales=torch.rand(2, 8, generator=generator).half(),
        qzeros=torch.full((2, 8), 8.0).half(),
        perm=torch.randperm(32, generator=generator) if perm else None,
        relative_output_squared_error=0.1 + 0.2,
    )


def assert_same(found: QuantizationResult, expected: QuantizationResult) -> None:
    assert type(found) is type(expected)
    assert found.values() == expected.values()
    assert found.tensors().keys() == expected.tensors().keys()
    for key, tensor in expected.tensors().items():
        assert found.tensors()[key].dtype == tensor.dtype
        assert torch.equal(found.tensors()[key], tensor)


def test_a_block_is_read_as_it_was_written(tmp_path):
    run = RunDirectory(tmp_path)
    wide = result()
    wide.qweight[0, 0] = 70_000
    written = {
        "z.q": result(8),
        "a.k": result(perm=False),
        "m": QuantizationResult(dequantized_weight=torch.ones(2, 3).half()),
        "wide": wide,
        "negative": QuantizationResult(dequantized_weight=torch.tensor([[-1]], dtype=torch.int32)),
    }
    assert not run.has_block(3)
    run.write_block(3, written)
    assert run.has_block(3)
    read = run.read_block(3)
    assert list(read) == list(written)
    for name, expected in written.items():
        assert_same(read[name], expected)


def test_codes_take_one_byte_each_on_disk(tmp_path):
    run = RunDirectory(tmp_path)
    big = GPTQResult(qweight=torch.full((256, 1024), 255, dtype=torch.int32))
    run.write_block(0, {"layer": big})
    assert run.block_path(0).stat().st_size < big.qweight.numel() + 1000
    assert_same(run.read_block(0)["layer"], big)


def test_results_are_a_mapping_over_all_blocks_that_reads_when_asked(tmp_path):
    run = RunDirectory(tmp_path)
    written = {block: {f"{block}.{n}": result(seed=block) for n in "qk"} for block in (0, 1, 10)}
    for block in (10, 0, 1):
        run.write_block(block, written[block])
    results = run.results()
    assert list(results) == [name for block in (0, 1, 10) for name in written[block]]
    assert len(results) == 6
    run.block_path(10).unlink()  # not read so far, not needed for the others
    assert_same(results["1.k"], written[1]["1.k"])
    assert results["1.k"] is results["1.k"]
    assert "none" not in results


def test_an_empty_run_has_no_results(tmp_path):
    assert dict(RunDirectory(tmp_path).results()) == {}


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_block_is_named_with_a_remedy(tmp_path, damage):
    run = RunDirectory(tmp_path)
    run.write_block(0, {"layer": result()})
    content = run.block_path(0).read_bytes()
    damaged = {"truncated": content[:-10], "empty": b"", "text": b"not a tensor file"}[damage]
    run.block_path(0).write_bytes(damaged)
    message = f"{run.block_path(0)}: cannot be read ("
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        run.read_block(0)
    assert str(caught.value).endswith("Delete it; resume makes the block again.")
    with pytest.raises(InputError, match="resume makes the block again"):
        run.results()


def test_a_file_of_other_tensors_is_no_block(tmp_path):
    run = RunDirectory(tmp_path)
    checkpoint.write_shard(tmp_path / "blocks", "00000.safetensors", {"a": torch.ones(2)})
    with pytest.raises(InputError, match="cannot be read"):
        run.read_block(0)


def test_nothing_is_left_of_a_block_that_could_not_be_written(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_block(0, {"layer": result()})
    before = run.block_path(0).read_bytes()
    unwritable = QuantizationResult(dequantized_weight=torch.ones(2, 2, device="meta"))
    for block in (0, 1):
        with pytest.raises(NotImplementedError):
            run.write_block(block, {"layer": unwritable})
    assert [path.name for path in (tmp_path / "blocks").iterdir()] == ["00000.safetensors"]
    assert run.block_path(0).read_bytes() == before


@pytest.mark.parametrize("has_samples", [False, True])
def test_a_run_is_begun_with_its_record_and_its_tokens(tmp_path, has_samples):
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(InputError, match=r"is not a run directory \(it holds no run.json\)\."):
        run.record()
    samples = CalibrationSamples(torch.arange(6).reshape(2, 3), torch.ones(2, 3, dtype=torch.long))
    run.begin({"wbits": 4, "model": "x"}, samples if has_samples else None)
    assert run.exists
    assert run.record() == {"wbits": 4, "model": "x"}
    if has_samples:
        assert torch.equal(run.samples().input_ids, samples.input_ids)
        assert torch.equal(run.samples().attention_mask, samples.attention_mask)
    else:
        assert run.samples() is None


def test_events_are_lines_in_the_order_of_their_coming(tmp_path):
    run = RunDirectory(tmp_path)
    run.append("block", block=0, error=0.5)
    run.append("finished")
    lines = [json.loads(x) for x in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["block", "finished"]
    assert (lines[0]["block"], lines[0]["error"]) == (0, 0.5)
