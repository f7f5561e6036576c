"""Ray Train gangs, without the library: what comes back, what is resumed, what ends a run."""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import distributed

from cluster.errors import GangFailedError
from cluster.train_gang import GangPlan, Member, run_gang
from onecomp.errors import LayerError

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_executor", "_functions_travel"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]

STEPS = 4


@pytest.fixture(scope="module")
def _functions_travel() -> None:
    """This module is not on the workers' path."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., GangPlan]:
    def make(**settings: Any) -> GangPlan:
        return GangPlan(name="run", folder=tmp_path, num_workers=2, **settings)

    return make


def count(killed_rank: int | None, member: Member) -> dict[str, Any]:
    """Adds up ranks in steps; a rank dies in the third step of the first attempt."""
    total, first = 0.0, 0
    if member.restored is not None:
        files = sorted(path.name for path in member.restored.iterdir())
        assert files == ["rank0.json", "rank1.json"]
        first, total = json.loads((member.restored / f"rank{member.rank}.json").read_text())
    for step in range(first, STEPS):
        if step == 2 and member.rank == killed_rank and member.restored is None:
            time.sleep(2)  # until the checkpoint counts: Ray has to collect it from both ranks
            os.kill(os.getpid(), signal.SIGKILL)
        value = torch.tensor(float(member.rank + 1))
        distributed.all_reduce(value)
        total += value.item()
        if step == 1:
            state = json.dumps([step + 1, total])
            member.save(lambda folder: (folder / f"rank{member.rank}.json").write_text(state))  # noqa: B023
    logging.getLogger("gang").info("rank %d counted to %g", member.rank, total)
    return {"total": total, "first": first, "ranks": member.world_size}


def test_a_killed_rank_is_replaced_and_all_go_on_from_the_checkpoint(plan, caplog):
    with caplog.at_level(logging.INFO, "gang"):
        found = run_gang(count, 1, plan(logger_name="gang"))
    assert found == {"total": 3.0 * STEPS, "first": 2, "ranks": 2}
    assert caplog.messages == [f"rank 0 counted to {3 * STEPS}"]


def refuse(_argument: object, member: Member) -> None:
    """Rank 1 raises what no further attempt would change, while rank 0 waits for it."""
    if member.rank == 1:
        raise LayerError("head", "its weight holds 3 NaN")
    distributed.barrier()


def test_a_final_error_ends_the_run_with_its_type_and_fields(plan):
    with pytest.raises(LayerError) as caught:
        run_gang(refuse, None, plan(final_errors=(LayerError,), max_failures=0))
    assert caught.value.layer_name == "head"


def stumble(_argument: object, member: Member) -> None:
    raise KeyError(f"rank {member.rank} stumbled")


@pytest.mark.slow
def test_any_other_error_is_told_after_the_last_attempt(plan):
    # Ray stops the others when one fails, so that there may be one error or two.
    with pytest.raises(GangFailedError, match=r"rank (\d): .*rank \1 stumbled"):
        run_gang(stumble, None, plan(max_failures=1))


@pytest.mark.slow
def test_a_final_error_is_not_tried_again(plan, tmp_path):
    with pytest.raises(LayerError):
        run_gang(refuse, None, plan(final_errors=(LayerError,), max_failures=5))
