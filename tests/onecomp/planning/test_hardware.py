"""The table of devices: complete, extendable, and strict about what it is given."""

import pytest

from onecomp.errors import InputError
from onecomp.planning.hardware import closest_kind, find_hardware, load_table
from onecomp.planning.operations import Work

KINDS = ("H100", "H200", "B200", "A100-80", "A100-40", "L40S", "RTX-4090", "CPU")
MINE = """
devices:
  Mine:
    memory_gib: 96
    bf16_tflops: 100
    fp32_tflops: 50
    memory_gb_s: 1000
    link_gb_s: 50
    host_gb_s: 25
    kernel_us: 5
    source: its datasheet
"""


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_has_rates_and_a_source(name):
    hardware = find_hardware(name, load_table())
    assert hardware.source
    assert hardware.is_gpu == (name != "CPU")
    assert hardware.model_rates[2] >= hardware.model_rates[4] > hardware.factor_rate


def test_names_are_found_in_any_case():
    assert find_hardware("h100", load_table()) == find_hardware("H100", load_table())


def test_a_kind_that_is_not_known_is_refused_with_those_that_are():
    with pytest.raises(InputError, match=r"H9000: is not a known kind of GPU\. Known: H100, H200"):
        find_hardware("H9000", load_table())


def test_a_file_adds_kinds(tmp_path):
    (tmp_path / "mine.yaml").write_text(MINE)
    table = load_table(tmp_path / "mine.yaml")
    mine = find_hardware("mine", table)
    assert mine.memory_bytes == 96 * 2**30
    assert mine.link_rate == 25e9  # what is sent goes through the host
    assert "H100" in table.devices


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("devices: {X: {memory_gib: 1}}", r"devices\.X\.bf16_tflops: Field required"),
        (MINE.replace("96", "-1"), r"devices\.Mine\.memory_gib: .*greater than 0"),
        ("colour: blue", "colour: Extra inputs are not permitted"),
        ("[", "cannot be read"),
    ],
)
def test_a_file_that_is_not_as_it_must_be_is_refused(tmp_path, content, message):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(InputError, match=message):
        load_table(tmp_path / "bad.yaml")


def test_the_network_is_slower_between_nodes():
    hardware = find_hardware("H100", load_table(), network_gbit=10)
    assert hardware.transfer_s(1e9, num_workers=8) < hardware.transfer_s(1e9, num_workers=9)
    assert hardware.transfer_s(1.25e9, num_workers=9) == pytest.approx(1.0)


def test_corrections_scale_a_phase():
    hardware = find_hardware("CPU", load_table())
    work = Work(float32_operations=1e9)
    corrected = type(hardware)(**(vars(hardware) | {"corrections": {"solve": 3.0}}))
    assert corrected.seconds("solve", work, 4) == pytest.approx(
        3 * hardware.seconds("solve", work, 4)
    )
    assert corrected.seconds("sums", work, 4) == hardware.seconds("sums", work, 4)


@pytest.mark.parametrize(
    ("name", "gib", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", 79.6, "H100"),
        ("NVIDIA A100-SXM4-80GB", 79.3, "A100-80"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100-40"),
        ("NVIDIA GeForce RTX 4090", 23.6, "RTX-4090"),
        ("Tesla T4", 14.6, "RTX-4090"),  # not known: the one with the closest memory
    ],
)
def test_a_gpu_is_known_by_its_name(name, gib, kind):
    assert closest_kind(name, gib * 2**30, load_table()) == kind


def test_half_a_device_takes_twice_as_long():
    whole = find_hardware("A100-80", load_table())
    half, work = whole.share(0.5), Work(model_operations=1e15, memory_bytes=1e12)
    assert half.expected_s(work, 2) == pytest.approx(2 * whole.expected_s(work, 2))
    assert half.memory_bytes == whole.memory_bytes / 2
