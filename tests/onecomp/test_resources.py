"""What there is for workers: memory within a container's limit, disk."""

from pathlib import Path

import psutil
import pytest

from onecomp.resources import free_host_memory, resources_here

MIB = 2**20


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def second_version(groups: Path, limit: object) -> None:
    write(groups, memory__max=limit, memory__current=90 * MIB)
    write(groups, memory__stat=f"anon 5\ninactive_file {30 * MIB}")


def first_version(groups: Path, limit: object) -> None:
    names = {"memory__limit_in_bytes": limit, "memory__usage_in_bytes": 90 * MIB}
    write(groups / "memory", **names, memory__stat=f"total_inactive_file {30 * MIB}")


@pytest.mark.parametrize("write_group", [first_version, second_version])
def test_a_containers_limit_counts_without_what_it_can_give_back(tmp_path, write_group):
    write_group(tmp_path, 100 * MIB)
    assert free_host_memory(tmp_path) == 40 * MIB
    write_group(tmp_path, 10 * MIB)
    assert free_host_memory(tmp_path) == 0


@pytest.mark.parametrize(
    ("write_group", "limit"), [(first_version, 2**63 - 4096), (second_version, "max")]
)
def test_no_limit_is_no_limit(tmp_path, write_group, limit):
    write_group(tmp_path, limit)
    assert free_host_memory(tmp_path) > 40 * MIB


def test_a_machine_without_groups_has_what_is_available(tmp_path):
    available = psutil.virtual_memory().available
    assert free_host_memory(tmp_path) == pytest.approx(available, rel=0.2)


def test_what_this_process_holds_counts_as_free(tmp_path):
    """An estimate is of all that it will hold, what it has imported included."""
    resources = resources_here(tmp_path / "not" / "there", num_workers=3)
    [process] = resources.workers
    assert process.host_memory is not None
    assert resources.run_disk is not None
    assert process.host_memory > psutil.Process().memory_info().rss
    assert (resources.in_process, resources.num_workers) == (True, 3)
