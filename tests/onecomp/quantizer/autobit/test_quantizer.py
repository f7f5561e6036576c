"""AutoBit's settings, what its survey measures, and what it makes of a target."""

from dataclasses import replace

import pytest
import torch

from onecomp import GPTQ, QBB, RTN, CalibrationConfig
from onecomp.errors import ConfigError, LayerError
from onecomp.job import quantizer_from_record, quantizer_record
from onecomp.jobs import quantize_group
from onecomp.quantizer import AutoBitQuantizer
from onecomp.quantizer.autobit.assignment import Assignment
from onecomp.quantizer.dbf import DBF, DBFResult
from onecomp.quantizer.factors import HessianFactors
from onecomp.quantizer.pieces import row_pieces
from onecomp.statistics import GroupStatistics

SHAPES = {
    "b.0.q_proj": (64, 64),
    "b.0.k_proj": (32, 64),
    "b.0.v_proj": (32, 64),
    "b.0.o_proj": (64, 64),
    "b.0.gate_proj": (128, 64),
    "b.0.up_proj": (128, 64),
    "b.0.down_proj": (64, 128),
}
OPTIONS = {"groupsize": 32, "mse": True, "q_grid": 50}


def candidates() -> list[GPTQ]:
    return [GPTQ(wbits=bits, **OPTIONS) for bits in (2, 3, 4, 8)]


def method(target: float = 4, **options: object) -> AutoBitQuantizer:
    return AutoBitQuantizer(quantizers=candidates(), target_bit=target, **options)


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in SHAPES.items()
        if shape[1] == 64
    }


def inputs(count: int = 200) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(64, 64, generator=generator)
    return torch.randn(count, 64, generator=generator) @ mixing


def errors(scale: float = 1.0) -> dict[str, list[float]]:
    """Errors of 2, 3, 4 and 8 bits; later layers are more sensitive."""
    return {
        name: [scale * 4.0**index * 4.0**-bits for bits in (2, 3, 4, 8)]
        for index, name in enumerate(SHAPES)
    }


def test_every_problem_is_told_at_once():
    made = method()
    made.quantizers = [RTN(num_layers=3), "GPTQ", method()]
    made.assignment_strategy = "best"
    made.target_bit = 0.5
    made.calibration_config = {"max_length": 3}
    made.dbf_threshold = -1
    made.dbf_iters = 0
    made.fused_groups = [["q_proj"], ["up_proj", "up_proj"]]
    with pytest.raises(ConfigError) as caught:
        made.validate_params()
    assert len(caught.value.problems) == 10
    for part in (
        "num_layers=3",
        "quantizers[1] is a str: must",
        "at least 1",
        "'best'",
        "twice",
        "dbf_iters=0",
    ):
        assert part in str(caught.value)


def test_candidates_are_checked_again_where_they_were_changed():
    broken = GPTQ(wbits=4)
    broken.wbits = 0
    with pytest.raises(ConfigError, match=r"quantizers\[0\].*wbits=0"):
        AutoBitQuantizer(quantizers=[broken], target_bit=4)


@pytest.mark.parametrize("options", [{}, {"target_bit": True}, {"target_bit": 0.9}])
def test_a_target_is_needed_but_for_manual(options):
    with pytest.raises(ConfigError, match="target_bit"):
        AutoBitQuantizer(quantizers=candidates(), **options)
    assert AutoBitQuantizer(quantizers=candidates(), assignment_strategy="manual").name


def test_settings_survive_the_record_of_a_run():
    made = method(3.5, calibration_config=CalibrationConfig("text.txt", max_length=64))
    made.assignment = Assignment({})
    restored = quantizer_from_record(quantizer_record(made))
    assert restored == replace(made, assignment=None)
    assert "assignment" not in quantizer_record(made)
    assert replace(restored) == restored


def test_a_raw_target_becomes_what_it_takes_with_scales():
    made = method(4)
    assert made._assigner.target(SHAPES) == pytest.approx(4 + 20 / 32)
    assert method(4, target_bit_is_effective=True)._assigner.target(SHAPES) == 4
    mixed = AutoBitQuantizer(
        quantizers=[RTN(wbits=4, groupsize=32), RTN(wbits=4)], target_bit=4
    )._assigner.target({"layer": (10, 64)})
    assert mixed == pytest.approx(4 + (20 / 32 + 20 / 64) / 2)


def test_fused_layers_get_the_same_candidate_unless_that_is_off():
    groups = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]

    def children(found: Assignment) -> list[set[int]]:
        return [{found.layers[f"b.0.{name}"].child for name in group} for group in groups]

    tied = method().assign(SHAPES, errors())
    assert [len(part) for part in children(tied)] == [1, 1]
    free = method(enable_fused_groups=False).assign(SHAPES, errors())
    assert max(len(part) for part in children(free)) > 1
    assert free.average_bits <= free.target_bits


def test_fused_layers_need_a_candidate_for_all_of_them():
    made = AutoBitQuantizer(
        quantizers=[
            RTN(wbits=4, include_layer_keywords=["q_proj"]),
            RTN(wbits=3, exclude_layer_keywords=["q_proj"]),
        ],
        target_bit=4,
    )
    [problem] = made.model_problems(SHAPES)
    assert "b.0.q_proj, b.0.k_proj, b.0.v_proj are fused" in problem
    made.enable_fused_groups = False
    assert made.model_problems(SHAPES) == []


def test_a_target_out_of_reach_is_refused_before_the_run():
    made = AutoBitQuantizer(
        quantizers=candidates()[1:], target_bit=2.5, auto_dbf=False, enable_fused_groups=False
    )
    [problem] = made.model_problems(SHAPES)
    assert "3.594 to 8.750" in problem


def large(blocks: int = 1) -> dict[str, tuple[int, int]]:
    """The same layers, as large as those of a real model."""
    return {
        name.replace("0", str(block)): (64 * rows, 64 * columns)
        for block in range(blocks)
        for name, (rows, columns) in SHAPES.items()
    }


def test_targets_below_all_candidates_take_dbf_for_all_layers():
    for target in (1.0, 1.05):
        low = method(target)
        assert low.model_problems(large()) == []
        found = low.assign_unmeasured(large())
        low.assignment = Assignment.from_record(found.record())
        assert low.assignment == found
        [(number, child)] = low.used_children()
        assert (number, type(child)) == (len(low.children) - 1, DBF)
        assert found.target_bits - 0.05 < found.average_bits <= found.target_bits
        assert low.remarks(large())[0].endswith(f"all layers get {child.name}.")
    assert method(2.0).assign_unmeasured(SHAPES) is None
    assert method(1.5, auto_dbf=False).assign_unmeasured(SHAPES) is None


def test_square_layers_get_the_bits_that_others_have_no_room_for():
    low = method(1.55, target_bit_is_effective=True)
    found = low.assign_unmeasured(large())
    assert found.dbf_bits[0] > 1.55
    assert 1.5 < found.average_bits <= 1.55


@pytest.mark.parametrize("target", [2.2, 2.5])
def test_an_effective_target_below_the_candidates_takes_all_that_dbf_has_room_for(target):
    low = method(target, target_bit_is_effective=True)
    assert low.model_problems(large()) == []
    assert low.assign_unmeasured(large()).dbf_bits == (2.0,)


def test_a_target_that_the_smallest_candidate_meets_is_met_by_it():
    shapes = {"q": (3584, 3584), "k": (1024, 3584), "up": (12736, 3584), "down": (3584, 12736)}
    for candidates in ([QBB(wbits=4)], [QBB(wbits=2)], [GPTQ(wbits=4), GPTQ(wbits=8)]):
        made = AutoBitQuantizer(quantizers=candidates, target_bit=candidates[0].wbits)
        assert made.assign_unmeasured(shapes) is None
        assert made.model_problems(shapes) == []
        errors = {name: [1.0, *[0.5] * (len(made.survey().quantizers) - 1)] for name in shapes}
        found = made.assign(shapes, errors)
        assert found.average_bits <= found.target_bits * (1 + 1e-9)


def test_tiny_layers_are_refused_where_the_scales_of_dbf_alone_take_more():
    low = method(1, target_bit_is_effective=True)
    [problem] = low.model_problems({"q": (16, 16)})
    assert problem == (
        "target_bit=1 is 1.000 bits a weight with scales: too low for the candidates, and for DBF, "
        "which takes 2.188. Raise it."
    )


def test_a_target_above_all_candidates_is_said():
    [remark] = method(20).remarks(large())
    assert "bits a weight with scales, but the candidates take 8.750 at most" in remark
    assert method(8).remarks(large()) == []


def test_candidates_with_rules_of_their_own_get_the_hessian_that_dbf_needs():
    low = AutoBitQuantizer(
        quantizers=[RTN(wbits=4, include_layer_keywords=["proj"])],
        target_bit=1.5,
        dbf_threshold=1.0,
    )
    assert type(low.assign_unmeasured(SHAPES)) is Assignment
    assert low.flag_hessian
    assert low.flag_calibration
    plain = AutoBitQuantizer(
        quantizers=[RTN(wbits=2), RTN(wbits=4)], target_bit=3, assignment_strategy="ilp"
    )
    assert not plain.flag_hessian


def test_dbf_is_no_candidate_twice_nor_with_more_bits_than_any_layer_holds():
    own = AutoBitQuantizer(quantizers=[DBF(target_bits=1.5), GPTQ(wbits=2)], target_bit=1.5)
    assert own.survey().quantizers == own.quantizers
    own.quantizers[0].results["layer"] = DBFResult()  # of an earlier run by itself
    assert len(own.survey().quantizers) == 2
    high = AutoBitQuantizer(quantizers=[GPTQ(wbits=2)], target_bit=2.5, dbf_threshold=3)
    assert high.survey().quantizers[1] == DBF(target_bits=2.0)


def test_dbf_competes_where_the_target_is_low():
    shapes = large(blocks=8)
    low = AutoBitQuantizer(
        quantizers=[GPTQ(wbits=bits, groupsize=64) for bits in (1, 2, 3)],
        target_bit=2,
        enable_fused_groups=False,
        dbf_iters=7,
    )
    assert low.survey().quantizers == [*low.quantizers, DBF(target_bits=2.0, iters=7)]
    assert any("DBF_2bit is a candidate" in remark for remark in low.remarks(shapes))
    errors = {name: [9.0, 3.0, 1.0, 4.0 if "o_proj" in name else 2.0] for name in shapes}
    low.assignment = low.assign(shapes, errors)
    kinds = {name: type(low.children[low.child_of(name)]) for name in shapes}
    assert set(kinds.values()) == {DBF, GPTQ}
    assert all(kinds[f"b.{block}.o_proj"] is GPTQ for block in range(8))
    assert low.assignment.target_bits - 0.05 < low.assignment.average_bits
    assert low.assignment.average_bits <= low.assignment.target_bits
    assert len(low.survey().quantizers) == 4
    assert len(method(2.01).survey().quantizers) == 4


@pytest.mark.parametrize("strategy", ["activation_aware", "ilp"])
def test_the_survey_finds_what_candidates_do_with_their_own_settings(strategy):
    """Symmetric grids with a search, not a stand-in for them (and the Hessian, unless plain)."""
    made = method(assignment_strategy=strategy)
    made.quantizers = [*made.quantizers, RTN(wbits=3, groupsize=16, sym=True)]
    statistics = GroupStatistics.of(inputs(), None)
    used = statistics if strategy == "activation_aware" else None
    found, _ = quantize_group(made.survey(), weights(), used, None)
    hessian = statistics.hessian()
    for index, candidate in enumerate(made.quantizers):
        factors = HessianFactors(hessian if used else torch.eye(64))
        results = candidate.quantize_weights(weights(), factors)
        for name, weight in weights().items():
            delta = (weight - results[name].dequantize()).double()
            matrix = hessian.double() if used else torch.eye(64, dtype=torch.float64)
            expected = ((delta @ matrix) * delta).sum(dim=1)
            torch.testing.assert_close(
                found[name].errors[index].double(), expected, rtol=1e-4, atol=1e-6
            )
    assert found["b.0.q_proj"].num_tokens == (200 if used else 1)


def test_errors_fall_with_bits_and_do_not_depend_on_the_pieces():
    statistics = GroupStatistics.of(inputs(), None)
    wide = {"b.0.up_proj": torch.randn(400, 64, generator=torch.Generator().manual_seed(3))}
    whole, _ = quantize_group(method().survey(), wide, statistics, None)
    parts, _ = quantize_group(method().survey(), wide, statistics, None, tile=130)
    found = whole["b.0.up_proj"].errors
    assert torch.equal(found, parts["b.0.up_proj"].errors)
    assert (found.sum(dim=1).diff() < 0).all()


def test_candidates_are_tried_on_their_own_layers_only():
    made = AutoBitQuantizer(
        quantizers=[RTN(wbits=4), RTN(wbits=2, exclude_layer_keywords=["o_proj"])],
        target_bit=3,
        assignment_strategy="ilp",
    )
    found, _ = quantize_group(made.survey(), weights(), None, None)
    assert found["b.0.o_proj"].errors[1].isinf().all()
    assert found["b.0.q_proj"].errors.isfinite().all()
    of_layers = {name: [1.0, 2.0] if "o_proj" not in name else [1.0, torch.inf] for name in SHAPES}
    assert made.assign(SHAPES, of_layers).layers["b.0.o_proj"].errors == (1.0, None)


def test_each_child_quantizes_its_layers():
    made = method(enable_fused_groups=False)
    made.assignment = made.assign(SHAPES, errors())
    statistics = GroupStatistics.of(inputs(), None)
    results, _ = quantize_group(made, weights(), statistics, None)
    numbers = {made.child_of(name) for name in weights()}
    assert len(numbers) > 2
    for number in numbers:
        own = {n: w for n, w in weights().items() if made.child_of(n) == number}
        alone, _ = quantize_group(made.quantizers[number], own, statistics, None)
        for name in own:
            assert torch.equal(results[name].qweight, alone[name].qweight)
            assert results[name].wbits == made.quantizers[number].wbits


def test_rows_are_cut_only_where_the_child_solves_them_apart():
    made = AutoBitQuantizer(
        quantizers=[
            RTN(include_layer_keywords=["up"]),
            DBF(include_layer_keywords=["q_proj"]),
            RTN(wbits=2, include_layer_keywords=["gate"]),
        ],
        assignment_strategy="manual",
    )
    made.quantizers.append(DBF())  # is for all layers, but others come first
    pieces = row_pieces(made, {"q_proj": 400, "up": 400, "gate": 100}, 64, 130)
    ranges = [[(r.layer_name, len(r)) for r in piece.ranges] for piece in pieces]
    assert [("q_proj", 400)] in ranges
    assert len([part for part in ranges if part[0][0] == "up"]) == 3
    assert all(len(part) == 1 for part in ranges)


def test_manual_takes_the_first_candidate_that_accepts_the_name():
    made = AutoBitQuantizer(
        quantizers=[
            RTN(wbits=8, include_layer_keywords=["down_proj"]),
            RTN(wbits=2, include_layer_keywords=["proj"], exclude_layer_keywords=["o_proj"]),
        ],
        assignment_strategy="manual",
    )
    assert not made.accepts("b.0.o_proj")
    shapes = {name: shape for name, shape in SHAPES.items() if made.accepts(name)}
    found = made.assign_unmeasured(shapes)
    assert {n for n, choice in found.layers.items() if choice.child == 0} == {"b.0.down_proj"}
    assert made.model_problems(shapes) == []


def test_without_an_assignment_nothing_is_quantized():
    with pytest.raises(LayerError, match="has no method for it yet"):
        method().quantize_weights(weights(), None)


def test_text_is_read_only_where_something_needs_it():
    plain = [RTN(wbits=bits) for bits in (2, 4)]
    ilp = AutoBitQuantizer(quantizers=plain, target_bit=3, assignment_strategy="ilp")
    assert (ilp.flag_calibration, ilp.flag_hessian) == (False, False)
    aware = AutoBitQuantizer(quantizers=plain, target_bit=3)
    assert (aware.flag_calibration, aware.survey().flag_hessian) == (True, True)
    low = AutoBitQuantizer(quantizers=plain, target_bit=2, assignment_strategy="ilp")
    assert low.flag_hessian  # it will be DBF
