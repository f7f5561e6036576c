"""Metrics as a Prometheus server would read them, and what is refused before Ray is asked."""

import re
import subprocess
import sys

import pytest

from cluster.metrics import KINDS, Meters

SECONDS = 120
RECORD = """
import sys, time, urllib.request
import ray
from cluster.metrics import Meters

DEADLINE = time.monotonic() + 60
EXPECTED = sys.argv[1:]

@ray.remote(num_cpus=0)
class Recorder:
    def work(self):
        meters = Meters("r1")
        for seconds in (0.5, 0.25, 0):
            meters.count("onecomp_seconds_busy", seconds, worker=3, method="observe")

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
         _system_config={"metrics_report_interval_ms": 1000})
recorder = Recorder.remote()
ray.get(recorder.work.remote())
meters = Meters("r1")
for name, value, tags in [
    ("onecomp_units_done", 2, {"worker": 0, "method": "merge"}),
    ("onecomp_units_done", 3, {"worker": 0, "method": "merge"}),
    ("onecomp_units_done", 1, {"worker": 1, "method": "merge"}),
    ("onecomp_bytes_moved", 2**33, {"worker": 1}),
    ("onecomp_seconds_waiting", 1.5, {"worker": 1}),
    ("onecomp_fallbacks", 1, {}),
    ("onecomp_blocks_done", 1, {"run": "r2"}),
    ("onecomp_workers", 8, {}),
    ("onecomp_workers", 7, {}),
    ("onecomp_workers_lost", 1, {}),
]:
    meters.record(name, value, **tags)
[node] = ray.nodes()
page = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
text = ""
while time.monotonic() < DEADLINE and not all(name in text for name in EXPECTED):
    time.sleep(0.2)
    text = urllib.request.urlopen(page, timeout=10).read().decode()
print("\\n".join(line for line in text.splitlines() if "onecomp" in line))
ray.shutdown()
"""


def samples(text: str) -> dict[tuple[str, str, str, str], float]:
    """Values by name, run, worker and method."""
    found = {}
    for line in text.splitlines():
        sample = re.fullmatch(r"ray_(onecomp_\w+)\{(.*)\} (\S+)", line)
        if sample:
            tags = dict(re.findall(r'(\w+)="([^"]*)"', sample[2]))
            key = (sample[1], *(tags.get(name, "") for name in ("run", "worker", "method")))
            found[key] = float(sample[3])
    return found


@pytest.mark.ray
@pytest.mark.slow
def test_every_metric_is_on_the_prometheus_page_of_a_cluster():
    ran = subprocess.run(
        [sys.executable, "-c", RECORD, *KINDS],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert ran.returncode == 0, ran.stderr
    assert samples(ran.stdout) == {
        ("onecomp_units_done_total", "r1", "0", "merge"): 5,
        ("onecomp_units_done_total", "r1", "1", "merge"): 1,
        ("onecomp_bytes_moved_total", "r1", "1", ""): 2**33,
        ("onecomp_seconds_waiting_total", "r1", "1", ""): 1.5,
        ("onecomp_seconds_busy_total", "r1", "3", "observe"): 0.75,
        ("onecomp_fallbacks_total", "r1", "", ""): 1,
        ("onecomp_blocks_done_total", "r2", "", ""): 1,
        ("onecomp_workers", "r1", "", ""): 7,
        ("onecomp_workers_lost_total", "r1", "", ""): 1,
    }
    for name, kind in KINDS.items():
        assert re.search(rf"# HELP ray_{name}(_total)? {re.escape(kind.description)}", ran.stdout)


def test_what_is_not_declared_is_refused():
    meters = Meters()
    with pytest.raises(
        ValueError, match=r"there is no metric 'onecomp_unit_done'\. Known: onecomp_"
    ):
        meters.record("onecomp_unit_done", 1)
    with pytest.raises(ValueError, match="there is no metric"):
        meters.count("blocks", 1)
    with pytest.raises(ValueError, match="onecomp_fallbacks has no tag block; known: "):
        meters.count("onecomp_fallbacks", 1, block=3)


def test_counters_only_grow_and_gauges_are_only_set():
    meters = Meters()
    with pytest.raises(ValueError, match="onecomp_fallbacks cannot count -1"):
        meters.record("onecomp_fallbacks", -1)
    with pytest.raises(ValueError, match="onecomp_workers cannot count 1"):
        meters.count("onecomp_workers", 1)
    with pytest.raises(ValueError, match="onecomp_blocks_done cannot be set to 1: it is a counter"):
        meters.gauge("onecomp_blocks_done", 1)
