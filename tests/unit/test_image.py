"""The images: what can be known of them without building them, which needs a registry of base images."""

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lib.job_server import STOP_WAIT_SECONDS
from tests.unit.test_manifests import BUILDS, REPOSITORY, ROOT_IN_IMAGE, containers

DOCKERFILE = REPOSITORY / "cluster" / "docker" / "Dockerfile"


def instructions(name: str) -> list[str]:
    """The arguments of every instruction of one kind, continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return re.findall(rf"^{name}\s+(.*)$", joined, re.MULTILINE)


def copied() -> list[Path]:
    """Files and folders of the repository that go into the image."""
    return [REPOSITORY / source for line in instructions("COPY") for source in line.split()[:-1]]


def tracked(path: Path) -> list[str]:
    done = subprocess.run(
        ["git", "ls-files", "--", str(path)], cwd=REPOSITORY, capture_output=True, text=True, timeout=30
    )
    if done.returncode:
        pytest.skip("not a git checkout: nothing is known of what is tracked")
    return done.stdout.split()


def test_the_linter_has_nothing_to_say() -> None:
    found = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    assert found, "hadolint is missing; it comes with pip install -e '.[test]'"
    done = subprocess.run([found, str(DOCKERFILE)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_copied_is_there_tracked_and_let_through() -> None:
    allowed = [line[1:] for line in (REPOSITORY / ".dockerignore").read_text().split() if line.startswith("!")]
    assert copied()
    for path in copied():
        assert tracked(path), path
        assert f"{path.name}/**" in allowed or path.name in allowed, path
    assert len(allowed) == len(copied()), "more is let through than is copied"


def test_packages_are_installed_as_make_install_does_it_from_wheels_alone() -> None:
    pip = re.compile(r"pip install (.*)")
    image = [shlex.split(match[1]) for line in instructions("RUN") if (match := pip.search(line.split("&&")[0]))]
    recipe = re.findall(r"\$\(BIN\)/pip install (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    make = [shlex.split(line) for line in recipe]
    assert len(image) == len(make) == 2
    for inside, outside in zip(image, make, strict=True):
        assert inside[:2] == ["--only-binary", ":all:"]
        for command in (inside, outside):
            assert command[command.index("-c") + 1] == "constraints.txt"
    assert image[0][-1] == make[0][-1] == "torch"
    text = DOCKERFILE.read_text()
    assert text.rindex("RUN pip install") < text.index("COPY lib"), "gigabytes of packages lie below the code"
    assert text.rindex("RUN pip install") < text.index("COPY jobs")
    # The project's dependencies; with extras of its own where the tests have theirs.
    assert re.fullmatch(r"\.\[.+\]", image[1][-1])
    assert re.fullmatch(r"\.\[test\]", make[1][-1])
    known = set(re.findall(r"^(\w+) = \[", (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE))
    extras = {extra for line in instructions("ENV") for extra in re.findall(r"EXTRAS=(\S+)", line)}
    assert extras
    assert {extra for line in extras for extra in line.split(",")} <= known


def installed_below(requirements: list[str]) -> set[str]:
    """Names of the packages that these requirements install on this machine, with all that those need."""
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        for extra in {"", *one.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            below = [Requirement(line) for line in importlib.metadata.requires(name) or ()]
            waiting += [found for found in below if not found.marker or found.marker.evaluate({"extra": extra})]
    return {name for name, _ in seen}


def test_all_that_is_installed_has_a_version() -> None:
    """What the packages need that we name, too: an image that is built again is the same."""
    lines = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert not [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)], (
        "a local version fits one build alone"
    )
    pinned = {canonicalize_name(line.split("==")[0]) for line in lines}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = {
        extra for line in instructions("ENV") for one in re.findall(r"EXTRAS=(\S+)", line) for extra in one.split(",")
    }
    named = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    needed = installed_below(named)
    assert {"torch", "ray", "grpcio", "openvino", "peft"} <= needed
    assert needed <= pinned, needed - pinned


def test_bases_are_pinned_and_nobody_is_root() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE.read_text(), flags=re.MULTILINE)[1:]
    names = {stage.split()[2] for stage in stages}
    for stage in stages:
        base = stage.split()[0]
        ours = base.replace("${FLAVOUR}", "cpu") in names
        assert ours or re.search(r":(\d|\$\{PYTHON\})", base), f"{base} has no version"
    assert re.search(r"^ARG PYTHON=3\.\d+\.\d+$", DOCKERFILE.read_text(), re.MULTILINE)
    for name in ("night", "textsweep"):
        (stage,) = [stage for stage in stages if stage.split()[2] == name]
        user = re.findall(r"^USER (\S+)$", stage, re.MULTILINE)
        assert user
        assert int(user[-1]) > 0  # Kubernetes' runAsNonRoot wants a number
        assert not re.search(r"^RUN ", stage.split("USER")[-1], re.MULTILINE)


def test_what_a_base_is_named_by_is_known_before_the_first_one() -> None:
    """An ARG behind a FROM belongs to that stage alone: in the next FROM it is empty."""
    before = re.split(r"^FROM ", DOCKERFILE.read_text(), flags=re.MULTILINE)[0]
    declared = set(re.findall(r"^ARG (\w+)=\S", before, re.MULTILINE))
    used = {name for base in instructions("FROM") for name in re.findall(r"\$\{(\w+)\}", base)}
    assert used == {"PYTHON", "FLAVOUR"} <= declared


def test_every_image_of_the_manifests_is_one_that_is_built() -> None:
    said = set(re.findall(r"--tag (\S+)", DOCKERFILE.read_text()))
    assert {container["image"] for folder in BUILDS for container in containers(folder)} == said


def test_a_container_starts_from_what_is_copied_alone(tmp_path: Path) -> None:
    """The image's command, its environment and its files, without anything else of the repository."""
    for path in copied():
        for name in tracked(path):
            target = tmp_path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, target)
    assert instructions("WORKDIR") == [ROOT_IN_IMAGE]
    settings = dict(re.findall(r"(\w+)=(\S+)", " ".join(instructions("ENV"))))
    assert settings["HF_HUB_OFFLINE"] == "1"
    assert settings["PYTHONPATH"] == ROOT_IN_IMAGE
    assert settings["RAY_JOB_STOP_WAIT_TIME_S"] == str(STOP_WAIT_SECONDS)
    command = re.findall(r'"([^"]+)"', instructions("CMD")[-1])
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment = inherited | settings | {"PYTHONPATH": str(tmp_path)}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run([sys.executable, *command[1:]], cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "jobs.score" in done.stdout
    assert not list(elsewhere.iterdir())
    assert not list(tmp_path.rglob("__pycache__")), "a container's root is read-only"
