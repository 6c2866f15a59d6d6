"""What all tests share: a real S3 server, a real Ray, and tiny real models, each started or built once a session."""

import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent

# Before the imports, because Ray, MLflow and huggingface_hub read them when they are imported: nothing is downloaded, no profile
# and no cluster of this machine is used, and Ray's processes find `lib` and `tests`.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "PYTHONPATH": str(REPOSITORY),
}
for variable in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH"):
    os.environ.pop(variable, None)

import fsspec
import hypothesis
import pytest
import ray
import torch

from jobs.demo_store import LoopbackS3
from tests import fakes
from tests.preloaded import Preloaded, preloaded_workers
from tests.proxy import FaultyProxy

hypothesis.settings.register_profile("textsweep", deadline=None, max_examples=60)
hypothesis.settings.load_profile("textsweep")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models on many threads only wait for one another: 200 times slower beside another busy process (measured)."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """The session's environment variables, put back at its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEXTSWEEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield patch


@pytest.fixture(scope="session")
def s3(environment: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackS3]:
    """An S3 server on loopback; the environment names it, for this process and for all that it starts."""
    with LoopbackS3(tmp_path_factory.mktemp("s3") / "server.log") as server:
        for name, value in server.environment.items():
            environment.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def forked_workers(s3: LoopbackS3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Preloaded]:
    """Workers of every Ray that a test starts in this process are forked, not started."""
    with preloaded_workers(tmp_path_factory.mktemp("workers")) as process:
        yield process


@pytest.fixture(scope="session")
def ray_session(forked_workers: Preloaded) -> Iterator[None]:
    """A local Ray with four CPUs, whatever the machine has, which the jobs' own `lib.runtime.ray_session` finds and uses.

    After the S3 server: workers inherit the environment from Ray's processes, not from the driver. Idle workers stay for the next test: Ray
    ends more than one a CPU after a second, and four small trainings in a row then took 106 s of processor time, not 85.
    """
    keep = {"num_workers_soft_limit": 8, "idle_worker_killing_time_threshold_ms": 60_000}
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level=logging.WARNING, _system_config=keep)
    yield
    ray.shutdown()


@pytest.fixture
def proxy(s3: LoopbackS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy before the S3 server; stores opened in this test go through it."""
    with FaultyProxy(s3.url) as faulty:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faulty.url)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield faulty
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(params=["local", "s3"])
def any_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder on each kind of storage: the test runs once on a local disk and once on S3."""
    if request.param == "local":
        return str(tmp_path / "store")
    server: LoopbackS3 = request.getfixturevalue("s3")
    return f"{server.bucket()}/store"


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny BERT classifier with three labels."""
    folder = tmp_path_factory.mktemp("classifier")
    fakes.make_classifier(folder, "bert", ("down", "same", "up"))
    return str(folder)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny pretrained BERT without a head."""
    folder = tmp_path_factory.mktemp("base")
    fakes.make_encoder(folder, "bert")
    return str(folder)
