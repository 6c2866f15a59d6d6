"""`jobs.score` on the cluster that RAY_ADDRESS names, with workers that `tests.faults.injection` may break."""

import logging
import os
import sys
import threading
import time
from datetime import UTC, datetime, timedelta

import time_machine

from jobs import score
from lib import s3
from lib.errors import run_job, stop_on_signals
from tests.faults import injection

import ray  # isort: skip  # after lib, which sets how Ray authenticates


def set_clock() -> None:
    """Set this process's clock, and no other's, by as many seconds as the test asks for; the monotonic one goes on as it went."""
    while not (seconds := injection.spec().get("clock")):
        time.sleep(0.05)
    time_machine.travel(datetime.now(UTC) + timedelta(seconds=seconds), tick=True).start()
    injection.happened(f"clock set by {seconds} s")


if __name__ == "__main__":
    injection.shorten_timeouts(s3)
    threading.Thread(target=set_clock, daemon=True).start()
    ray.init(
        address=os.environ["RAY_ADDRESS"],
        logging_level=logging.WARNING,
        runtime_env={
            "worker_process_setup_hook": "tests.faults.injection.install",
            "env_vars": {"AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"]},
        },
    )
    stop_on_signals()  # as `lib.runtime.ray_session` does when it is the one that connects
    sys.exit(run_job(score.main))
