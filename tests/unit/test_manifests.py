"""What Kubernetes is given: built as it is applied, held against the schemas of KubeRay and Kubernetes, commands run."""

import copy
import functools
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from lib.config import Command, Section, parse_command
from lib.job_server import STOP_WAIT_SECONDS
from lib.score_config import ScoreConfig
from lib.train_config import TrainConfig

REPOSITORY = Path(__file__).parents[2]
KUBERAY = REPOSITORY / "cluster" / "kuberay"
SCHEMAS = REPOSITORY.parent / "shared" / "schemas"
BUILDS = ("base", "overlays/dev", "overlays/prod", "overlays/kept")
KUBERNETES = "1.37"
ROOT_IN_IMAGE = "/opt/textsweep"
CONFIGS: dict[str, type[Section]] = {"train": TrainConfig, "score": ScoreConfig}

Document = dict[str, Any]


@functools.cache
def kubectl() -> str:
    """The program beside this Python, from the tests' requirements, else the machine's own."""
    found = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl")
    assert found, "kubectl is missing; it comes with pip install -e '.[test]'"
    return found


@functools.cache
def built(folder: str) -> tuple[Document, ...]:
    """All documents of an overlay, composed by kustomize as `kubectl apply --kustomize` does it."""
    done = subprocess.run(
        [kubectl(), "kustomize", str(KUBERAY / folder)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def of_kind(folder: str, kind: str) -> list[Document]:
    return [document for document in built(folder) if document["kind"] == kind]


def closed(schema: Any) -> Any:
    """The schema with every object that names its fields refusing others, as the API server's strict validation does."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    names_fields = isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema
    if names_fields and not schema.get("x-kubernetes-preserve-unknown-fields"):
        found["additionalProperties"] = False
    return found


@functools.cache
def ray_validator(kind: str) -> jsonschema.Draft202012Validator:
    path = SCHEMAS / f"{kind.lower()}-v1.json"
    if not path.exists():
        pytest.skip(f"KubeRay's schemas are not beside this checkout ({path.name}); nothing was validated")
    return jsonschema.Draft202012Validator(closed(json.loads(path.read_text())))


def mistakes(document: Document) -> list[str]:
    """What is not as the schema of the document's kind says, fields that it does not know included; of Kubernetes' own kinds the first."""
    if document["apiVersion"].startswith("ray.io/"):
        found = ray_validator(document["kind"]).iter_errors(document)
        return [f"{error.json_path}: {error.message}" for error in found]
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except jsonschema.ValidationError as error:
        return [f"{error.json_path}: {error.message}"]
    return []


def walk(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value in a document, with the way to it."""
    yield path, value
    if isinstance(value, dict):
        for key, part in value.items():
            yield from walk(part, (*path, key))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from walk(part, (*path, number))


def objects_with(folder: str, key: str) -> list[Document]:
    found = (value for document in built(folder) for _, value in walk(document))
    return [value for value in found if isinstance(value, dict) and key in value]


def pods(folder: str) -> list[Document]:
    """Specifications of all pods that a build describes."""
    return objects_with(folder, "containers")


def containers(folder: str) -> list[Document]:
    return [container for pod in pods(folder) for container in pod["containers"]]


def clusters(folder: str) -> list[Document]:
    """Specifications of all Ray clusters that a build describes."""
    return objects_with(folder, "headGroupSpec")


@pytest.mark.parametrize("folder", BUILDS)
def test_what_is_applied_is_what_the_schemas_say(folder: str) -> None:
    assert built(folder)
    for document in built(folder):
        assert not mistakes(document), document["metadata"]["name"]


@pytest.mark.parametrize("folder", ["overlays/prod", "overlays/kept"])
def test_a_misspelt_field_is_seen_wherever_it_is(folder: str) -> None:
    """A field more in every object that has a name, a container, a port, a secret's reference: what says yes above can say no."""
    for document in copy.deepcopy(built(folder)):
        places = [value for path, value in walk(document) if path and isinstance(value, dict) and "name" in value]
        places = [place for place in places if place is not document["metadata"]]
        for place in places:
            place["naem"] = "x"
        seen = [mistake for mistake in mistakes(document) if "naem" in mistake]
        assert len(seen) == (len(places) if document["apiVersion"].startswith("ray.io/") else min(1, len(places)))


def test_every_file_is_part_of_a_build() -> None:
    used = set(KUBERAY.rglob("kustomization.yaml"))
    for file in list(used):
        kustomization = yaml.safe_load(file.read_text())
        generated = [name for maps in kustomization.get("configMapGenerator", ()) for name in maps["files"]]
        used |= {file.parent / name for name in [*kustomization.get("resources", ()), *generated]}
    assert {path for path in KUBERAY.rglob("*.*") if path.is_file()} == {path for path in used if path.is_file()}


def command_of(job: Document) -> tuple[list[str], Command[Any]]:
    """A RayJob's command line behind `python -m jobs.NAME`, as it would be here, and what it says."""
    python, dash_m, module, *arguments = shlex.split(job["spec"]["entrypoint"])
    name = job["metadata"]["name"]
    assert (python, dash_m, module) == ("python", "-m", f"jobs.{name}")
    arguments = [argument.replace(ROOT_IN_IMAGE, str(REPOSITORY)) for argument in arguments]
    return arguments, parse_command(CONFIGS[name], arguments, prog=module, description="")


def spends_its_budget_again(job: Document) -> bool:
    """Whether KubeRay would start a job anew whose budget is spent."""
    command = command_of(job)[1]
    budget = command.config.limits.budget if isinstance(command.config, ScoreConfig) else None
    return budget is not None and job["spec"]["backoffLimit"] > 0


@pytest.mark.parametrize("folder", ["overlays/dev", "overlays/prod"])
def test_a_budget_is_spent_once(folder: str) -> None:
    jobs = of_kind(folder, "RayJob")
    assert not any(spends_its_budget_again(job) for job in jobs)
    (score,) = (copy.deepcopy(job) for job in jobs if job["metadata"]["name"] == "score")
    score["spec"] |= {
        "backoffLimit": 1,
        "entrypoint": f"{score['spec']['entrypoint']} --set limits.budget=9 --set forecast.gpu_hour=1",
    }
    assert spends_its_budget_again(score), "what says no above can say yes"


@pytest.mark.parametrize("folder", ["overlays/dev", "overlays/prod"])
def test_every_entrypoint_is_a_command_of_ours(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = of_kind(folder, "RayJob")
    assert {job["metadata"]["name"] for job in jobs} == set(CONFIGS)
    for job in jobs:
        arguments, command = command_of(job)
        module = f"jobs.{job['metadata']['name']}"
        assert command.run_id == arguments[-1]  # the night replaces it
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(module).main([*arguments, "--help"])
        assert ended.value.code == 0
        assert f"python -m {module}" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["overlays/dev", "overlays/prod"])
def test_a_job_starts_nothing_by_being_applied_and_leaves_nothing_behind(folder: str) -> None:
    for job in of_kind(folder, "RayJob"):
        spec = job["spec"]
        # KubeRay refuses a suspended job that keeps its cluster, and rules of deletion beside that.
        assert (spec["suspend"], spec["shutdownAfterJobFinishes"]) == (True, True)
        assert spec["ttlSecondsAfterFinished"] > 0
        assert "deletionStrategy" not in spec
        assert spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]


def test_a_night_ends_before_the_next_one_begins() -> None:
    (score,) = [job["spec"] for job in of_kind("overlays/prod", "RayJob") if job["metadata"]["name"] == "score"]
    (night,) = [cron["spec"] for cron in of_kind("overlays/prod", "CronJob")]
    tries = 1 + score["backoffLimit"]
    # A try's deadline counts from its own beginning.
    assert tries * score["activeDeadlineSeconds"] < night["jobTemplate"]["spec"]["activeDeadlineSeconds"] < 24 * 3600
    assert night["concurrencyPolicy"] == "Forbid"
    assert night["startingDeadlineSeconds"] < 24 * 3600


@pytest.mark.parametrize("folder", BUILDS)
def test_no_pod_has_more_rights_than_it_needs(folder: str) -> None:
    assert pods(folder)
    for pod in pods(folder):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert not context.get("privileged")
        assert not any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC"))


@pytest.mark.parametrize("folder", BUILDS)
def test_every_container_says_what_it_needs_and_what_it_is(folder: str) -> None:
    for container in containers(folder):
        asked, most = container["resources"]["requests"], container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(asked)
        assert {"cpu", "memory"} <= set(most)
        assert asked["memory"] == most["memory"]  # Ray plans with the limit: memory that is only promised is taken away
        assert re.search(r":\d+\.\d+", container["image"]), "an image by a version, never by latest"


@pytest.mark.parametrize("folder", BUILDS)
def test_every_container_mounts_what_its_pod_has(folder: str) -> None:
    for pod in pods(folder):
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


@pytest.mark.parametrize("folder", BUILDS)
def test_what_is_secret_stands_in_no_manifest_and_every_reference_leads_somewhere(folder: str) -> None:
    described = dict(re.findall(r"^\| `([\w-]+)` \| ((?:`\w+`,? ?)+)", documentation(), re.MULTILINE))
    made = {(document["kind"], document["metadata"]["name"]) for document in built(folder)}
    secrets: dict[str, set[str]] = {}
    for document in built(folder):
        assert document["kind"] != "Secret", "a secret is made by hand, see cluster/README.md"
        for path, value in walk(document):
            if path and path[-1] == "secretKeyRef":
                secrets.setdefault(value["name"], set()).add(value["key"])
            elif path and path[-1] == "secretRef":
                secrets.setdefault(value["name"], set())
            elif path and path[-1] == "secretName":
                secrets.setdefault(value, set()).add("auth_token")  # the key that KubeRay reads
            elif path and path[-1] == "serviceAccountName":
                assert ("ServiceAccount", value) in made, value
            elif path and path[-1] in ("configMap", "configMapRef", "configMapKeyRef"):
                assert ("ConfigMap", value["name"]) in made, value
            elif path and path[-1] == "env":
                named = {item["name"] for item in value if "value" in item}
                assert not {name for name in named if re.search("SECRET|TOKEN|PASSWORD|_KEY", name)}, named
    for name, keys in secrets.items():
        assert name in described, f"the secret {name} is in no table of cluster/README.md"
        assert keys <= set(re.findall(r"`(\w+)`", described[name])), (name, keys)


@functools.cache
def documentation() -> str:
    return (REPOSITORY / "cluster" / "README.md").read_text()


@pytest.mark.parametrize("folder", BUILDS)
def test_a_ray_cluster_is_closed_and_lets_its_jobs_end(folder: str) -> None:
    assert clusters(folder)
    version = next(line.split("==")[1] for line in (REPOSITORY / "constraints.txt").read_text().split() if line.startswith("ray=="))  # fmt: skip
    for spec in clusters(folder):
        assert spec["rayVersion"] == version
        assert spec["authOptions"]["mode"] == "token"
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
        for group in groups:
            pod = group["template"]["spec"]
            (container,) = pod["containers"]
            environment = {item["name"]: item["value"] for item in container["env"]}
            assert environment["RAY_JOB_STOP_WAIT_TIME_S"] == str(STOP_WAIT_SECONDS)
            assert pod["terminationGracePeriodSeconds"] > STOP_WAIT_SECONDS
            for probe in ("readinessProbe", "livenessProbe"):
                assert container[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        for group in spec["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_gpu_workers_come_from_none_when_a_job_asks_for_them() -> None:
    """A job divides what it finds when it starts: one that asked for no GPU would find none."""
    for job in of_kind("overlays/prod", "RayJob"):
        (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        config = command_of(job)[1].config
        assert group["replicas"] == 0
        used = config.resources.num_workers if isinstance(config, TrainConfig) else group["maxReplicas"]
        assert 0 < used <= config.resources.min_gpus <= group["maxReplicas"]
        assert config.resources.wait_seconds <= job["spec"]["preRunningDeadlineSeconds"]


def test_a_try_that_was_killed_is_followed_by_another() -> None:
    for job in of_kind("overlays/prod", "RayJob"):
        assert job["spec"]["backoffLimit"] > 0, job["metadata"]["name"]


def test_gpu_workers_go_down_to_none_and_nobody_else_takes_a_gpu() -> None:
    for spec in clusters("overlays/prod"):
        assert spec["enableInTreeAutoscaling"]
        (group,) = spec["workerGroupSpecs"]
        (container,) = group["template"]["spec"]["containers"]
        assert group["minReplicas"] == 0
        assert container["resources"]["limits"]["nvidia.com/gpu"] == container["resources"]["requests"]["nvidia.com/gpu"] == "1"  # fmt: skip
        assert int(container["resources"]["requests"]["cpu"]) > 1  # readers work beside the actor
        (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
        assert "nvidia.com/gpu" not in head["resources"]["limits"]


def test_only_a_kept_cluster_keeps_its_state_elsewhere() -> None:
    for folder in BUILDS:
        for spec in clusters(folder):
            assert ("gcsFaultToleranceOptions" in spec) is (folder == "overlays/kept")


@pytest.mark.parametrize("folder", BUILDS)
def test_nobody_outside_the_namespace_gets_in_but_the_operator(folder: str) -> None:
    (policy,) = [document["spec"] for document in of_kind(folder, "NetworkPolicy")]
    assert policy["podSelector"] == {}
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    inside, operator = policy["ingress"]
    assert inside == {"from": [{"podSelector": {}}]}
    assert [port["port"] for port in operator["ports"]] == [8265]
    assert all("podSelector" in source for source in operator["from"])


@pytest.mark.parametrize("folder", BUILDS)
def test_what_leaves_the_namespace_goes_to_names_storage_and_kubernetes(folder: str) -> None:
    (policy,) = [document["spec"] for document in of_kind(folder, "NetworkPolicy")]
    inside, names, outside = policy["egress"]
    assert inside == {"to": [{"podSelector": {}}]}
    assert names["to"] == [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}}}]
    assert {port["port"] for port in names["ports"]} == {53}
    assert outside["to"] == [{"ipBlock": {"cidr": "0.0.0.0/0"}}]
    assert {port["port"] for port in outside["ports"]} == {443, 6443}
