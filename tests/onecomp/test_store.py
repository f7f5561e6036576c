import json
import pickle
import re
import socket
from dataclasses import replace

import pytest
import torch

from onecomp.calibration.samples import CalibrationSamples
from onecomp.errors import InputError
from onecomp.export import checkpoint
from onecomp.lease import LeaseLostError
from onecomp.quantizer import GPTQResult, QuantizationResult
from onecomp.storage import open_path
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


def group(block: int, **fields: object) -> dict:
    return {"event": "group", "block": block, "layers": {"q": {"error": 0.1 + 0.2}}, **fields}


def test_lines_that_a_killed_driver_did_not_write_are_added_once(tmp_path):
    run = RunDirectory(tmp_path)
    journals = {
        block: [group(block, group=0), group(block, group=1), {"event": "block", "block": block}]
        for block in range(3)
    }
    for block, journal in journals.items():
        run.write_block(block, {"layer": result()}, journal)
    run.write_block(3, {"layer": result()})  # by a version that keeps none
    for event in [*journals[1], journals[2][0]]:
        run.append(**event)
    for _ in range(2):
        run.repair_journal()
        told = [event for kind in ("group", "block") for event in run.events(kind)]
        assert len(told) == 9
        for event in (event for journal in journals.values() for event in journal):
            assert sum(known.items() >= event.items() for known in told) == 1
    assert_same(run.read_block(2)["layer"], result())


def test_a_block_without_events_is_stored_as_it_always_was(tmp_path):
    RunDirectory(tmp_path / "a").write_block(0, {"layer": result()})
    RunDirectory(tmp_path / "b").write_block(0, {"layer": result()}, [])
    first, second = (RunDirectory(tmp_path / name).block_path(0).read_bytes() for name in "ab")
    assert first == second
    assert b"journal" not in first[:1000]


def test_finished_blocks_are_listed_in_order(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.block_files() == {}
    for block in (10, 2):
        run.write_block(block, {"layer": result()})
    (tmp_path / "blocks" / ".00003.safetensors.12.tmp").touch()
    assert [*run.block_files()] == [2, 10]


def test_a_worker_sees_whether_the_directory_is_the_drivers(tmp_path):
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(
        InputError, match=rf"run: is not seen by worker 3 on {socket.gethostname()}"
    ):
        run.require_visible("worker 3")
    run.begin({"run_id": "one"}, None)
    run.require_visible()
    bound = replace(run, run_id="one")
    bound.require_visible()
    run.begin({"run_id": "two"}, None)
    message = (
        rf"is another directory for this process on {socket.gethostname()} than for the driver"
    )
    with pytest.raises(InputError, match=message):
        bound.require_visible()


def test_the_memory_of_another_process_is_named_as_what_it_is():
    run = RunDirectory(open_path("memory://nobody-wrote-here/run"))
    with pytest.raises(InputError, match="memory:// is seen by one process: give --num-workers 0"):
        run.require_visible("worker 0")


def test_a_driver_that_lost_its_lease_writes_no_block_from_any_process(tmp_path):
    with RunDirectory(tmp_path).lease() as run:
        travelled = pickle.loads(pickle.dumps(run))
        travelled.write_block(0, {"layer": result()})
        [lease] = tmp_path.glob("lease-*.json")
        (tmp_path / "lease-000002.json").write_text(lease.read_text().replace(run.owner, "another"))
        for holder in (run, travelled):
            with pytest.raises(LeaseLostError, match="has taken it over while this driver"):
                holder.write_block(1, {"layer": result()})
    assert not RunDirectory(tmp_path).has_block(1)
    assert [path.name for path in tmp_path.glob("lease-*.json")] == ["lease-000002.json"]


def test_a_run_directory_travels_with_what_it_is_bound_to(s3):
    with RunDirectory(s3 / "run").lease() as run:
        bound = replace(run, run_id="one")
        bound.append("group", block=0)
        travelled = pickle.loads(pickle.dumps(bound))
        assert travelled == bound
        travelled.require_lease()
        travelled.write_block(0, {"layer": result()})
        assert_same(bound.read_block(0)["layer"], result())
        assert_same(bound.results()["layer"], result())
        assert bound.has_block(0)
        assert not bound.has_block(1)


def test_an_earlier_run_is_set_aside_and_dropped(s3, tmp_path):
    for place in (tmp_path / "run", s3 / "run"):
        run = RunDirectory(place)
        for name in ("one", "two", "three"):
            run.set_aside()
            run.begin({"name": name}, None)
            run.write_block(0, {name: result()})
            run.append("block", block=0)
        kept = RunDirectory(place / "replaced")
        assert (kept.record(), list(kept.results())) == ({"name": "one"}, ["one"])
        assert len(kept.events("block")) == len(run.events("block")) == 1
        run.drop_replaced()
        assert not (place / "replaced").exists()
        assert list(run.results()) == ["three"]
