"""The descriptions of clusters and jobs: valid where there is a schema, and of one mind with the rest of the tree."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import jsonschema
import pytest
import ray
import yaml
from ray._private.runtime_env.packaging import create_package

from srr_dist.command import parse_run, run_parser
from srr_dist.config import RunConfig
from tests.cluster.local import ROOT

RAYCLUSTER, RAYJOB = ROOT / "cluster" / "kuberay-raycluster.yaml", ROOT / "jobs" / "kuberay-rayjob.yaml"
RUNTIME_ENV = ROOT / "jobs" / "runtime_env.yaml"
KUBERAY = [RAYCLUSTER, RAYJOB]
AWS, DOCKERFILE = ROOT / "cluster" / "aws.yaml", ROOT / "cluster" / "Dockerfile"
SCRIPTS = [ROOT / "cluster" / "local.sh", ROOT / "jobs" / "submit.sh", ROOT / ".ci" / "run"]
CREDENTIALS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"}

# Fields of KubeRay's ray.io/v1, as its API reference lists them; below a pod's template Kubernetes has its own.
JOB_FIELDS = {
    "entrypoint", "runtimeEnvYAML", "jobId", "metadata", "backoffLimit", "activeDeadlineSeconds", "rayClusterSpec",
    "clusterSelector", "submissionMode", "submitterConfig", "submitterPodTemplate", "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished", "suspend", "managedBy", "deletionStrategy", "entrypointNumCpus", "entrypointNumGpus",
    "entrypointResources",
}  # fmt: skip
CLUSTER_FIELDS = {
    "rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs",
    "suspend", "managedBy", "headServiceAnnotations", "gcsFaultToleranceOptions", "upgradeStrategy",
}  # fmt: skip
HEAD_FIELDS = {"rayStartParams", "template", "serviceType", "headService", "enableIngress", "resources", "labels"}
WORKER_FIELDS = {
    "groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "idleTimeoutSeconds", "rayStartParams",
    "template", "scaleStrategy", "suspend", "resources", "labels",
}  # fmt: skip


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def cluster_spec(path: Path) -> dict[str, Any]:
    spec = load(path)["spec"]
    return spec.get("rayClusterSpec", spec)


def groups(path: Path) -> list[dict[str, Any]]:
    spec = cluster_spec(path)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def containers(path: Path) -> Iterator[dict[str, Any]]:
    for group in groups(path):
        yield from group["template"]["spec"]["containers"]


def pinned(package: str) -> str:
    return re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def image() -> str:
    return f"srr-dist:{project()['version']}"


def test_configuration_for_ray_up_fits_rays_own_schema() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(load(AWS), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(load(AWS) | {"max_workers": "four"}, schema)


def test_configuration_for_ray_up_has_a_head_without_work_and_spot_workers_that_need_no_keys() -> None:
    config = load(AWS)
    kinds = config["available_node_types"]
    head = kinds.pop(config["head_node_type"])
    assert head["resources"]["CPU"] == 0
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1]
    assert all(kind["resources"]["GPU"] > 0 and kind["min_workers"] == 0 for kind in kinds.values())
    assert all(kind["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot" for kind in kinds.values())
    assert all(kind["max_workers"] <= config["max_workers"] for kind in kinds.values())
    assert all("IamInstanceProfile" in kind["node_config"] for kind in [head, *kinds.values()])
    assert not any(name in AWS.read_text() for name in CREDENTIALS)


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_kuberay_object_has_only_fields_that_kuberay_knows(path: Path) -> None:
    document, spec = load(path), cluster_spec(path)
    assert document["apiVersion"] == "ray.io/v1"
    assert document["kind"] == {RAYCLUSTER: "RayCluster", RAYJOB: "RayJob"}[path]
    assert document["kind"] == "RayCluster" or document["spec"].keys() <= JOB_FIELDS
    assert spec.keys() <= CLUSTER_FIELDS
    assert {"rayStartParams", "template"} <= spec["headGroupSpec"].keys() <= HEAD_FIELDS
    for group in spec["workerGroupSpecs"]:
        assert {"groupName", "rayStartParams", "template"} <= group.keys() <= WORKER_FIELDS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in groups(path):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_kuberay_pods_have_credentials_from_secrets_alone_and_shared_memory_in_memory(path: Path) -> None:
    for group in groups(path):
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in pod["containers"]:
            variables = {variable["name"]: variable for variable in container["env"]}
            assert variables.keys() >= {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
            for name in CREDENTIALS & variables.keys():
                assert variables[name].keys() == {"name", "valueFrom"}
                assert variables[name]["valueFrom"]["secretKeyRef"].keys() >= {"name", "key"}
            (mount,) = (mount for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm")
            assert volumes[mount["name"]]["emptyDir"]["medium"] == "Memory"


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_kuberay_head_does_no_work_and_workers_have_gpus_and_bear_spot_nodes(path: Path) -> None:
    head, *workers = groups(path)
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in str(head)
    for worker in workers:
        pod = worker["template"]["spec"]
        assert any("spot" in toleration["key"] for toleration in pod["tolerations"])
        assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_rayjob_runs_a_complete_command_of_as_many_workers_as_it_has_and_resumes_by_itself() -> None:
    spec = load(RAYJOB)["spec"]
    python, flag, module, *arguments = shlex.split(spec["entrypoint"])
    assert (python, flag, module) == ("python", "-m", "srr_dist.quantize")
    config = parse_run(run_parser("quantize", ""), arguments)
    assert isinstance(config, RunConfig)
    assert config.quantize.model == "s3://models/meta-llama/Llama-3.1-70B"
    assert config.job.workers == sum(group["replicas"] for group in groups(RAYJOB)[1:])
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0


def test_rayjob_has_the_variables_of_submitted_jobs() -> None:
    in_image = yaml.safe_load(load(RAYJOB)["spec"]["runtimeEnvYAML"])
    assert in_image == {"env_vars": load(RUNTIME_ENV)["env_vars"]}


def test_submitted_job_brings_the_code_and_nothing_that_lies_beside_it(tmp_path: Path) -> None:
    for path in ("srr_dist/solve/layer.py", "jobs/presets/8B.yaml", "my-model/model.safetensors", "text.txt", ".env"):
        (tmp_path / "checkout" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "checkout" / path).write_text(path)
    package = tmp_path / "package.zip"
    create_package(str(tmp_path / "checkout"), package, True, excludes=load(RUNTIME_ENV)["excludes"])
    assert sorted(ZipFile(package).namelist()) == ["jobs/presets/8B.yaml", "srr_dist/solve/layer.py"]


def test_versions_agree_in_every_description() -> None:
    for path in KUBERAY:
        assert cluster_spec(path)["rayVersion"] == pinned("ray")
        assert {container["image"] for container in containers(path)} == {image()}
    assert load(AWS)["docker"]["image"] == image()
    text = DOCKERFILE.read_text()
    assert f"-t {image()} " in text
    assert re.search(r"^FROM python:(\d+\.\d+)-", text, re.MULTILINE)[1] == project()["requires-python"].removeprefix(
        ">="
    )


def test_image_is_pinned_and_runs_as_an_ordinary_user() -> None:
    text = DOCKERFILE.read_text()
    installs = re.findall(r"^RUN pip install .*$", text, re.MULTILINE)
    assert len(installs) == 2
    assert all("-c constraints.txt" in line for line in installs)
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1] != "root"
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for name in line.split()}
    assert all((ROOT / name).exists() for name in copied)
    kept = {line[1:] for line in DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().split() if line[0] == "!"}
    assert kept == copied


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_passes_shellcheck(script: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
