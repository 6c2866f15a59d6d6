"""The layers of `lib`, read from its imports: a module knows only what stands before it."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

ORDER = (
    # what everything speaks of
    *("errors", "schema", "windows"),
    # the world outside
    *(
        "config",
        "score_config",
        "train_config",
        "pretrain_config",
        "toml",
        "space",
        "listing",
        "s3",
        "storage",
        "atomicity",
        "tracking",
    ),
    # one thing each
    *(
        "planning",
        "estimate",
        "archive",
        "selection",
        "template",
        "facts",
        "reading",
        "cutting",
        "wordwise",
        "tokenization",
        "words",
        "batching",
        "pieces",
        "masking",
        "label_noise",
        "calibration",
        "metrics",
        "heads",
        "prompts",
        "model",
        "language_model",
        "loss",
        "tuning",
        "sharding",
        "runtime",
        "cost",
        "throughput",
        "forecast",
        "telemetry",
        "progress",
        "mapped",
        "publishing",
    ),
    *("versions", "verification"),
    *("checkpoint", "attribution", "plots", "highlight", "model_card", "training_report"),
    *("packing", "quantization", "engine", "budget"),
    # the work of one process
    *(
        "gate",
        "sources",
        "corpus",
        "labelled",
        "blocks",
        "sampling",
        "predictor",
        "answers",
        "learning",
        "masked_learning",
        "augmentation",
        "contrastive",
        "committing",
        "states",
        "fitting",
        "masked_fitting",
        "classifying",
        "trial",
        "search_report",
        "finetuning",
        "zero_shot",
    ),
    # the work of a cluster
    *(
        "failures",
        "rendezvous",
        "workers",
        "training",
        "halving",
        "search",
        "pretraining",
        "course",
        "outcome",
        "history",
        "drift",
    ),
    *("watch", "tasks", "actors", "suspects", "pipeline", "run_page", "report", "scoring", "conclusion", "survey"),
    # jobs on another machine's cluster
    *("packaging", "submission", "job_log", "job_server"),
)
"""From the lowest to the highest; each may import those before it."""

MAY_IMPORT_RAY = {
    "runtime",
    "telemetry",
    "progress",
    "sources",
    "states",
    "fitting",
    "masked_fitting",
    "finetuning",
    "trial",
    "failures",
    "rendezvous",
    "workers",
    "halving",
    "watch",
    "tasks",
    "actors",
    "suspects",
    "pipeline",
    "job_log",
    "job_server",
    "survey",
}
MAY_IMPORT_TORCH = {
    "tracking",
    "heads",
    "prompts",
    "model",
    "loss",
    "tuning",
    "sharding",
    "attribution",
    "packing",
    "engine",
    "quantization",
    "budget",
    "predictor",
    "learning",
    "contrastive",
    "language_model",
    "masked_learning",
    "augmentation",
    "states",
    "fitting",
    "masked_fitting",
    "finetuning",
    "trial",
    "zero_shot",
    "rendezvous",
    "workers",
}

MODULES = sorted(path.stem for path in (REPOSITORY / "lib").glob("*.py") if path.stem != "__init__")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; `from lib import x` counts as `lib.x`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = node.module in ("lib", "jobs")
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if whole else {node.module}
    return found


def importers(package: str) -> set[str]:
    """The modules of `lib` that import a package or anything in it."""
    return {
        name
        for name in MODULES
        if any(f"{found}.".startswith(f"{package}.") for found in imports(REPOSITORY / "lib" / f"{name}.py"))
    }


def test_every_module_has_its_place() -> None:
    assert sorted(ORDER) == MODULES


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_lower_ones_only(name: str) -> None:
    found = {module.split(".")[1] for module in imports(REPOSITORY / "lib" / f"{name}.py") if module.startswith("lib.")}
    assert found <= set(ORDER[: ORDER.index(name)])


def test_only_what_runs_on_a_cluster_imports_ray() -> None:
    assert importers("ray") <= MAY_IMPORT_RAY


def test_only_what_computes_imports_torch() -> None:
    assert importers("torch") <= MAY_IMPORT_TORCH


def test_only_storage_and_what_it_hides_know_s3() -> None:
    assert importers("s3fs") | importers("botocore") | importers("boto3") | importers("fsspec") <= {"s3", "storage"}


@pytest.mark.parametrize("outside", ["jobs", "tests", "cluster"])
def test_the_library_does_not_know_who_uses_it(outside: str) -> None:
    assert not importers(outside)


def test_jobs_do_not_import_one_another_apart_from_the_demo() -> None:
    for path in (REPOSITORY / "jobs").glob("*.py"):
        found = {module for module in imports(path) if module.startswith("jobs")}
        assert not found or path.stem.startswith("demo"), f"{path.name} imports {found}"


def test_the_cluster_folder_imports_nothing_of_the_project() -> None:
    for path in (REPOSITORY / "cluster").rglob("*.py"):
        assert not {module for module in imports(path) if module.split(".")[0] in ("lib", "jobs", "tests")}, path
