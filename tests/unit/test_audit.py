"""`make check` looks for known vulnerabilities where advisories are served, and says so where they are not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY


def audit(folder: Path, answer: Any, found: int) -> tuple[int, str]:
    """The last step of `make check`, with an index that answers so, and a pip-audit that ends with `found`; exit code and output."""
    advisories, environment = folder / "advisories.json", folder / "venv"
    if answer is not None:
        advisories.write_text(json.dumps(answer))
    (environment / "bin").mkdir(parents=True)
    (environment / "bin/python").symlink_to(sys.executable)
    (environment / "audit/bin").mkdir(parents=True)
    program = environment / "audit/bin/pip-audit"
    program.write_text(f"#!/bin/sh\necho audited; exit {found}\n")
    program.chmod(0o755)
    (environment / ".installed").touch()
    variables = [f"VENV={environment}", f"ADVISORIES={advisories.as_uri()}"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", *variables, "audit-if-served"],
        cwd=REPOSITORY,
        env=inherited,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("answer", [None, "no JSON object", {"vulnerabilities": []}], ids=["none", "other", "empty"])
def test_without_advisories_nothing_is_audited_and_nothing_fails(answer: Any, tmp_path: Path) -> None:
    code, said = audit(tmp_path, answer, found=1)
    assert code == 0
    assert said.startswith("not audited: no advisories at file:///")


@pytest.mark.parametrize("found", [0, 1])
def test_a_vulnerability_that_is_found_fails_the_check(found: int, tmp_path: Path) -> None:
    code, said = audit(tmp_path, {"vulnerabilities": [{"id": "PYSEC-2020-31"}]}, found)
    assert said == "audited\n"
    assert (code != 0) == bool(found)
