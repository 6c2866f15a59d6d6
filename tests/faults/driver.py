"""`jobs.score` on the cluster that RAY_ADDRESS names, with workers that `tests.faults.injection` may break."""

import logging
import os
import sys

from jobs import score
from lib.errors import run_job

import ray  # isort: skip  # after lib, which sets how Ray authenticates

if __name__ == "__main__":
    ray.init(
        address=os.environ["RAY_ADDRESS"],
        logging_level=logging.WARNING,
        runtime_env={
            "worker_process_setup_hook": "tests.faults.injection.install",
            "env_vars": {"AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"]},
        },
    )
    sys.exit(run_job(score.main))
