"""Addresses where no cluster is, asked from a process that is in none."""

import os
import subprocess
import sys

ASK = """
import sys
from cluster.connect import connect
from cluster.errors import ClusterError
for address in sys.argv[1:]:
    try:
        connect(address, num_cpus=1)
    except ClusterError as error:
        print(error)
"""
SECONDS = 90
"""Ray itself tries for minutes; most of these go into its import."""


def test_an_address_where_nothing_listens_is_refused_at_once():
    environment = {name: v for name, v in os.environ.items() if name != "RAY_ADDRESS"}
    ran = subprocess.run(
        [sys.executable, "-c", ASK, "127.0.0.1:9", "ray://127.0.0.1:9", "nonsense"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=SECONDS,
    )
    lines = ran.stdout.splitlines()
    assert len(lines) == 3, ran.stderr
    assert lines[0].startswith("Nothing listens at '127.0.0.1:9' (")
    assert lines[1].startswith("Nothing listens at 'ray://127.0.0.1:9' (")
    assert lines[2].startswith("No Ray cluster of this version answers at 'nonsense' (")
