"""What a plan says of a method that compares its candidates before the run."""

from dataclasses import replace

import pytest

from onecomp import GPTQ, QEPConfig
from onecomp.planning.model import PlannedModel
from onecomp.planning.request import Place, Request, make_estimate
from onecomp.planning.shapes import TextShape
from onecomp.planning.summary import Plan, as_json_values, make_plan
from onecomp.planning.table import as_text
from onecomp.quantizer import DBF, AutoBitQuantizer, Quantizer

PLACE = Place(num_workers=2, gpu="H100", price_per_hour=3.0)


@pytest.fixture(scope="module")
def model(llama_405b) -> PlannedModel:
    return PlannedModel.open(str(llama_405b), "auto", trust_remote_code=False)


def autobit(**options: object) -> AutoBitQuantizer:
    candidates = [GPTQ(wbits=bits, groupsize=128) for bits in (2, 4)]
    return AutoBitQuantizer(**{"quantizers": candidates, "target_bit": 3, **options})


def plan(model: PlannedModel, quantizer: Quantizer, text: TextShape | None = None) -> Plan:
    request = Request(model, quantizer, text or TextShape(128, 2048), QEPConfig())
    return make_plan(request, PLACE)


def test_comparing_takes_as_long_as_all_candidates_and_is_said_and_priced(model):
    found = plan(model, autobit())
    values = as_json_values(found)
    assert values["survey"]["wall_s"] == found.survey.wall_s > found.survey.curvature_s > 0
    assert found.cost == pytest.approx(2 * 3 * (found.estimate.wall_s + found.survey.wall_s) / 3600)
    assert "before it, candidates are compared: about" in as_text(found)
    fewer = plan(model, autobit(quantizers=[GPTQ(wbits=4, groupsize=128)], target_bit=4))
    assert fewer.survey.comparing.work_s < found.survey.comparing.work_s
    assert fewer.survey.curvature_s == found.survey.curvature_s


def test_gradients_are_left_out_where_nothing_weighs_by_them(model):
    assert plan(model, autobit(use_curvature_b=False)).survey.curvature_s == 0
    blind = plan(model, autobit(assignment_strategy="ilp")).survey
    assert (blind.curvature_s, blind.hidden_bytes, blind.comparing.costs.text) == (0, 0, None)


def test_hidden_states_of_one_shard_are_held(model):
    found = plan(model, autobit()).survey
    tokens = found.comparing.costs.text.shard_tokens
    assert found.hidden_bytes == 127 * tokens * 16384 * 2


def test_nothing_is_compared_where_the_assignment_follows_from_the_layers(model):
    found = plan(model, autobit(target_bit=1.2))
    assert found.survey is None
    assert as_json_values(found)["survey"] is None
    [bits] = found.estimate.costs.method.rated.assignment.dbf_bits
    alone = make_estimate(
        Request(model, DBF(target_bits=bits), found.estimate.costs.text, QEPConfig()), PLACE
    )
    assert found.estimate.work_s == pytest.approx(alone.work_s, rel=1e-3)
    assert plan(model, GPTQ()).survey is None


def test_an_assignment_decides_which_layers_are_split(model):
    rows_apart = plan(model, autobit()).estimate.costs
    with_dbf = plan(model, autobit(target_bit=2)).estimate.costs
    [kind] = rows_apart.model.kinds
    group = kind.groups[-1]
    assert rows_apart.is_split(group)
    assert not with_dbf.is_split(group)
    assert not replace(rows_apart, num_workers=1).is_split(group)
