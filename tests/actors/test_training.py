"""The library's gang on Ray: which workers it asks for, and what comes back of a failure."""

import pytest

from actors.training import RayGang
from onecomp.errors import ConfigError, InputError
from onecomp.post_process.gang import GangRequest, default_gang

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]


@pytest.mark.usefixtures("ray_executor")
def test_without_gpus_one_worker_is_the_natural_number():
    with default_gang(GangRequest()) as gang:
        assert isinstance(gang, RayGang)
        assert (gang.num_workers, gang.has_gpus, gang.is_one_machine) == (1, False, True)
    with default_gang(GangRequest(num_workers=2)) as gang:
        assert gang.num_workers == 2


@pytest.mark.usefixtures("ray_executor")
def test_more_workers_than_the_cluster_can_ever_hold_are_refused():
    with pytest.raises(ConfigError, match="999 workers with a CPU each are asked for"):
        default_gang(GangRequest(num_workers=999))


def test_an_address_where_no_cluster_is_is_refused():
    with pytest.raises(InputError, match=r"127\.0\.0\.1:1"):
        default_gang(GangRequest(address="127.0.0.1:1"))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_executor")
def test_errors_of_workers_arrive_as_what_they_are(tmp_path):
    """`os:listdir` takes one argument only."""
    request = GangRequest(num_workers=1, max_failures=0)
    with default_gang(request) as gang, pytest.raises(TypeError, match="listdir"):
        gang.run("os:listdir", str(tmp_path), tmp_path)
