import pickle
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from onecomp.errors import ConfigError, InputError, LayerError
from onecomp.quantizer import GPTQ, GPTQResult, QuantizationResult, ResultLoader, RTNResult


def gptq_results() -> dict[str, QuantizationResult]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(100, 32, generator=generator)
    results = {}
    for name, actorder in [("a", False), ("b", True)]:
        layer = nn.Linear(32, 8)
        nn.init.normal_(layer.weight, generator=generator)
        quantizer = GPTQ(groupsize=16, actorder=actorder)
        results[name] = quantizer.quantize_layer(layer.requires_grad_(requires_grad=False), rows)
    results["c"] = QuantizationResult(
        dequantized_weight=torch.ones(2, 3).half(), quantization_time=1.5
    )
    return results


def assert_same(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for name, result in expected.items():
        assert type(found[name]) is type(result)
        assert found[name].values() == result.values()
        assert found[name].tensors().keys() == result.tensors().keys()
        for key, tensor in result.tensors().items():
            assert found[name].tensors()[key].dtype == tensor.dtype
            assert torch.equal(found[name].tensors()[key], tensor)


@pytest.mark.parametrize("weights_only", [False, True])
def test_saved_results_load_as_they_were(tmp_path, weights_only):
    saving, loading = GPTQ(results=gptq_results()), GPTQ()
    saving.save_results(tmp_path / "results.pt")
    returned = loading.load_results(tmp_path / "results.pt", weights_only=weights_only)
    assert returned is loading.results
    assert_same(loading.results, saving.results)


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickled_object_is_refused_and_its_code_is_not_run(tmp_path, weights_only, writer):
    file, trace = tmp_path / "results.pt", tmp_path / "it_ran"
    if writer == "torch":
        torch.save({"layer": Malicious(trace)}, file)
    else:
        file.write_bytes(pickle.dumps({"layer": Malicious(trace)}, protocol=2))
    with pytest.raises(InputError, match="is not a results file of this package") as caught:
        GPTQ().load_results(file, weights_only=weights_only)
    assert "Pickled objects are refused because reading them can run code" in str(caught.value)
    assert not trace.exists()
    with file.open("rb") as opened:  # the file would have done it
        torch.load(opened, weights_only=False) if writer == "torch" else pickle.load(opened)
    assert trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        {"layer": {"no": "type"}},
        {"layer": 3},
        [1, 2],
        {"weight": torch.ones(2, 3)},
        {"bias": torch.ones(3), "weight": torch.tensor(1.0)},
        {"layer": {"type": "GPTQResult", "tensors": {"unheard": torch.ones(1)}, "values": {}}},
        torch.ones(3),
    ],
)
def test_other_files_are_refused(tmp_path, content):
    file = tmp_path / "other.pt"
    torch.save(content, file)
    with pytest.raises(InputError, match=f"^{file}: is not a results file of this package"):
        GPTQ().load_results(file)


def cut_and_changed(whole: bytes) -> Iterator[bytes]:
    """Files that were cut or written over, and files that never were any."""
    draw = random.Random(0)
    for _ in range(100):
        yield draw.randbytes(draw.choice([1, 4, 100]))
        yield whole[: draw.randrange(len(whole))]
        yield bytes(draw.randrange(256) if draw.random() < 0.02 else byte for byte in whole)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("is_zip", [True, False])
def test_junk_is_refused_whatever_its_bytes(tmp_path, is_zip):
    file = tmp_path / "junk.pt"
    torch.save({"layer": {"values": {}}}, file, _use_new_zipfile_serialization=is_zip)
    for junk in [b"", b"some words\n", b"{}", *cut_and_changed(file.read_bytes())]:
        file.write_bytes(junk)
        with pytest.raises(InputError, match=f"^{file}: is not a results file of this package"):
            GPTQ().load_results(file)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no such file\. Give a file written by save_results\."):
        GPTQ().load_results(tmp_path / "none.pt")


def test_a_result_class_that_is_not_imported_is_named():
    message = r"'Unheard' is not a known result class\. Known: .*GPTQResult, .*Import its module"
    with pytest.raises(ConfigError, match=message):
        QuantizationResult.restore("Unheard", {}, {})


def test_a_result_equals_itself_only():
    for make in (QuantizationResult, GPTQResult, RTNResult):
        one, other = (make(dequantized_weight=torch.ones(2)) for _ in range(2))
        assert one == one
        assert one != other
        assert {one: 1, other: 2} == {other: 2, one: 1}


def test_a_result_without_a_weight_says_so():
    with pytest.raises(NotImplementedError, match="stores no dequantized_weight"):
        QuantizationResult().compute_dequantized_weight()


def test_the_dequantized_weight_is_float16_on_the_cpu():
    for result in gptq_results().values():
        weight = result.compute_dequantized_weight()
        assert weight.dtype == torch.float16
        assert weight.is_contiguous()
        assert torch.equal(weight, result.dequantize().half())


def test_gptq_dequantizes_by_the_formula():
    result = GPTQResult(
        wbits=2,
        groupsize=2,
        qweight=torch.tensor([[0, 1, 2, 3]], dtype=torch.int32),
        scales=torch.tensor([[0.5], [2.0]]).half(),
        qzeros=torch.tensor([[1.0], [3.0]]).half(),
        perm=torch.tensor([3, 0, 1, 2]),
    )
    assert result.group_index.tolist() == [0, 1, 1, 0]
    assert result.dequantize().tolist() == [[-0.5, -4.0, -2.0, 1.0]]


def test_a_loader_holds_the_results_and_refuses_to_quantize(tmp_path):
    expected = gptq_results()
    GPTQ(results=expected).save_results(tmp_path / "results.pt")
    loader = ResultLoader(results_file=str(tmp_path / "results.pt"))
    assert_same(loader.results, expected)
    assert loader.select_layers(nn.Sequential(nn.Linear(2, 2))) == {}
    message = "^the layer: ResultLoader only reads results; use a quantizer.$"
    with pytest.raises(RuntimeError, match=message) as caught:
        loader.quantize_layer(nn.Linear(2, 2))
    assert isinstance(caught.value, LayerError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
