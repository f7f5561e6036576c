"""What starts clusters is valid by the strictest schema at hand, and agrees with the project."""

import copy
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler._private.util import prepare_config, validate_config
from ray_head import ROOT

KUBERAY = ROOT / "deploy" / "kuberay"
DEFINITIONS = ROOT.parent / "shared" / "kuberay"
"""KubeRay's custom-resource definitions, where a checkout has them beside it."""
FILES = {"RayCluster": "rayclusters", "RayJob": "rayjobs"}
MANIFESTS = ["raycluster.yaml", "rayjob.yaml"]
IMAGE_PATH = "/opt/onecomp/"

needs_definitions = pytest.mark.skipif(
    not DEFINITIONS.is_dir(), reason="KubeRay's custom-resource definitions are not there"
)


def manifest(name: str) -> dict:
    return yaml.safe_load((KUBERAY / name).read_text())


def cluster_config() -> dict:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def pinned(package: str) -> str:
    [version] = re.findall(rf"^{package}==([\w.]+)", constraints(), re.MULTILINE)
    return version


def constraints() -> str:
    return (ROOT / "constraints.txt").read_text()


@cache
def validator(kind: str) -> jsonschema.Draft7Validator:
    """Of KubeRay's schema, made strict: Kubernetes drops unknown fields, here they are errors."""
    text = (DEFINITIONS / f"ray.io_{FILES[kind]}.yaml").read_text()
    versions = yaml.load(text, Loader=yaml.CSafeLoader)["spec"]["versions"]
    [schema] = [v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1"]
    strict(schema)
    return jsonschema.Draft7Validator(schema)


def strict(schema: object) -> None:
    if isinstance(schema, list):
        for part in schema:
            strict(part)
    if not isinstance(schema, dict):
        return
    if schema.pop("x-kubernetes-int-or-string", False):
        schema["type"] = ["integer", "string"]
    if isinstance(schema.get("properties"), dict) and not schema.get(
        "x-kubernetes-preserve-unknown-fields"
    ):
        schema.setdefault("additionalProperties", False)
    for part in list(schema.values()):
        strict(part)


def problems(document: dict) -> list[str]:
    found = validator(document["kind"]).iter_errors(document)
    return [f"{'/'.join(map(str, error.path))}: {error.message}" for error in found]


@needs_definitions
@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_are_what_kuberay_defines(name):
    assert problems(manifest(name)) == []


def misspell(document: dict) -> None:
    document["spec"]["enableInTreeAutoscalling"] = True


def give_text_for_a_number(document: dict) -> None:
    document["spec"]["workerGroupSpecs"][0]["maxReplicas"] = "8"


def misspell_in_the_pod(document: dict) -> None:
    pod = document["spec"]["workerGroupSpecs"][0]["template"]["spec"]
    pod["containers"][0]["lifecycle"] = {"prestop": {}}


def leave_out(document: dict) -> None:
    del document["spec"]["headGroupSpec"]


@needs_definitions
@pytest.mark.parametrize(
    "spoil", [misspell, give_text_for_a_number, misspell_in_the_pod, leave_out]
)
def test_the_schema_finds_mistakes(spoil: Callable[[dict], None]):
    document = manifest("raycluster.yaml")
    spoil(document)
    assert problems(document) != []


def test_ray_derives_an_autoscaling_cluster_of_spot_machines_from_the_manifest():
    document = manifest("raycluster.yaml")
    document["metadata"]["namespace"] = "default"
    derived = _derive_autoscaling_config_from_ray_cr(document)
    group = derived["available_node_types"]["gpu"]
    assert (group["min_workers"], group["max_workers"]) == (0, 8)
    assert (group["resources"]["GPU"], group["resources"]["CPU"]) == (1, 7)
    assert derived["available_node_types"][derived["head_node_type"]]["resources"]["CPU"] == 0
    assert document["spec"]["autoscalerOptions"]["version"] == "v2"


def test_the_job_brings_the_cluster_of_the_other_manifest():
    job, cluster = manifest("rayjob.yaml"), manifest("raycluster.yaml")
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]


def test_a_retried_job_resumes_and_a_finished_one_leaves_nothing():
    spec = manifest("rayjob.yaml")["spec"]
    assert spec["backoffLimit"] > 0
    assert "--overwrite" not in spec["entrypoint"]
    assert spec["shutdownAfterJobFinishes"]
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["suspend"] is False


@pytest.mark.parametrize("name", MANIFESTS)
def test_nothing_is_reachable_from_outside_without_asking(name):
    spec = manifest(name)["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert "enableIngress" not in cluster["headGroupSpec"]
    assert cluster["authOptions"] == {"mode": "token"}


def test_worker_pods_drain_before_they_end():
    [group] = manifest("raycluster.yaml")["spec"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    [deadline] = [float(word.partition("=")[2]) for word in command if word.startswith("--dead")]
    assert pod["terminationGracePeriodSeconds"] > deadline
    assert "--now" in command
    assert any("spot" in key for key in pod["nodeSelector"])


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_run_as_a_plain_user_from_an_image_of_ours(name):
    text = (KUBERAY / name).read_text()
    assert text.count("runAsNonRoot: true") == 1  # an anchor, used by head and workers
    for script in re.findall(rf"{IMAGE_PATH}([\w/.]+)", text):
        assert (ROOT / script).exists(), script
    spec = manifest(name)["spec"]
    assert spec.get("rayClusterSpec", spec)["rayVersion"] == pinned("ray")


def test_the_cluster_file_is_one_that_ray_up_takes():
    validate_config(prepare_config(cluster_config()))


def misspell_a_key(config: dict) -> None:
    config["idle_timeout_minute"] = 5


def start_more_than_there_may_be(config: dict) -> None:
    config["available_node_types"]["gpu_worker"]["min_workers"] = 9


def name_another_head(config: dict) -> None:
    config["head_node_type"] = "heads"


@pytest.mark.parametrize("spoil", [misspell_a_key, start_more_than_there_may_be, name_another_head])
def test_ray_finds_mistakes_in_the_cluster_file(spoil: Callable[[dict], None]):
    config = copy.deepcopy(cluster_config())
    spoil(config)
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate_config(prepare_config(config))


def test_the_cluster_file_has_spot_workers_and_a_private_dashboard():
    config = cluster_config()
    worker = config["available_node_types"]["gpu_worker"]
    assert worker["min_workers"] == 0
    assert worker["max_workers"] <= config["max_workers"]
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    [start] = [c for c in config["head_start_ray_commands"] if "ray start" in c]
    assert "--dashboard-host=127.0.0.1" in start
    assert "drain_node.py" in config["worker_start_ray_commands"][-1]


def test_the_cluster_file_carries_what_an_installation_needs():
    carried = {
        remote.removeprefix("~/onecomp/"): local
        for remote, local in cluster_config()["file_mounts"].items()
        if remote.startswith("~/onecomp/")
    }
    assert {remote for remote, local in carried.items() if remote == local} == set(carried)
    assert set(carried) == installed_files() | {"deploy"}
    assert [local for local in carried.values() if not (ROOT / local).exists()] == []


def installed_files() -> set[str]:
    """Top of the tree that the build reads, and the pinned versions."""
    text = (ROOT / "pyproject.toml").read_text()
    packages = re.search(r'^packages = \["(.*)"\]', text, re.MULTILINE)
    assert packages
    [readme] = re.findall(r'^readme = "(.*)"', text, re.MULTILINE)
    return {*packages[1].split('", "'), readme, "LICENSE", "pyproject.toml", "constraints.txt"}


def instructions() -> list[tuple[str, str]]:
    """Instruction and rest of every line of the Dockerfile, continued lines joined."""
    text = (ROOT / "deploy" / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


def test_the_image_has_the_pinned_versions():
    arguments = dict(rest.split("=") for word, rest in instructions() if word == "ARG")
    assert arguments["RAY_VERSION"] == pinned("ray")
    [base] = [rest for word, rest in instructions() if word == "FROM"]
    assert base == "rayproject/ray:${RAY_VERSION}-py311-${VARIANT}"
    installs = [rest for word, rest in instructions() if "pip install" in rest]
    assert f"python -m pip install torch=={pinned('torch')}" in installs
    assert any("PIP_CONSTRAINT=/opt/onecomp/constraints.txt" in rest for _, rest in instructions())


def test_the_image_holds_what_an_installation_needs_and_runs_as_a_plain_user():
    copied = [source for word, rest in instructions() if word == "COPY" for source in sources(rest)]
    assert set(copied) == installed_files() | {"deploy"}
    users = [rest for word, rest in instructions() if word == "USER"]
    assert users[-1] == "1000:100"
    secrets = re.compile(r"secret|token|password|api_key|credential", re.IGNORECASE)
    assert [rest for _, rest in instructions() if secrets.search(rest)] == []


def sources(rest: str) -> list[str]:
    return [word for word in rest.split()[:-1] if not word.startswith("--")]


def test_the_upload_of_a_job_leaves_out_what_it_does_not_need():
    ignored = (ROOT / ".rayignore").read_text().split()
    assert {"/tests/", "/docs/", "*.safetensors", "*.run/"} <= set(ignored)
    assert not {"/onecomp/", "/cluster/", "/actors/", "/deploy/"} & set(ignored)
    assert Path(ROOT / "deploy" / "onecomp_job.py").exists()
