"""Score a Parquet archive with a fine-tuned classifier, or finish what an earlier run of the same command left.

Reads   the shards below input.path that have no predictions yet, and a model folder.
Writes  <output.path>/<version>/<shard>-<identity>-<chunk>-of-<chunks>.parquet   predictions, one object a chunk
        <output.path>/<version>/_dead_letter/...                                 rows with an error: shard, row, reason (and text, if asked for)
        <output.path>/<version>/_runs/<run-id>/                                  run.json, report.html, manifest.parquet, _SUCCESS
        <output.path>/_published.json                                            the pointer to the manifest that readers use

On this machine or inside a Ray job:
    python -m jobs.score --config jobs/configs/score.toml --set input.path=s3://bucket/archive --set output.path=s3://bucket/scores
On a Ray cluster:
    python -m jobs.submit score --address https://head.example.com --config jobs/configs/score.toml --run-id 2026-11-20

Exit codes: 0 done; 2 the command or configuration is wrong; 3 done, but over a limit of bad rows, shards or drift, not published;
4 incomplete, run the same command again; 5 stopped on request; 6 limits.budget is spent, the same command goes on with a new one;
1 a bug.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from lib import conclusion, pipeline, scoring
from lib.config import parse_command
from lib.cost import Meter
from lib.course import FINISHING
from lib.errors import at_work, run_job
from lib.outcome import Outcome
from lib.report import ProgressLine
from lib.runtime import plan_layout, ray_session
from lib.score_config import ScoreConfig


def main(argv: Sequence[str]) -> None:
    """Plan, score, account for every row, publish."""
    command = parse_command(ScoreConfig, argv, prog="jobs.score", description=__doc__ or "")
    with pipeline.readers_started() if os.environ.get("RAY_ADDRESS") else nullcontext():
        score(command.config, command.run_id)


def score(config: ScoreConfig, run_id: str) -> None:
    """Bring the predictions up to date with the archive."""
    # Everything that can be refused is refused here, before a local Ray starts and before a model is loaded.
    run = scoring.prepare(config, run_id)
    print(run.plan(), flush=True)
    if run.is_published:
        print(run.nothing_to_do())
        return

    outcome, where, meter = Outcome(), "not needed", None
    if run.unfinished.num_rows:
        with ray_session(config.resources) as cluster:
            layout, where = plan_layout(cluster, config.resources), str(cluster)
            print(f"cluster: {cluster}; {layout.num_actors} predictor actors", flush=True)
            meter = Meter(config.forecast, config.limits.budget, run.begun, cluster)
            run.start()
            selected = run.selection.rows if run.selection else None
            line = ProgressLine(meter=meter)
            outcome = Outcome()
            outcome.course.waited = cluster.waited
            with conclusion.reported(run, outcome, where, meter), at_work():
                pipeline.score(run.job, run.unfinished, layout, config.limits, line, selected, meter, run_id, outcome)
    else:
        outcome.course.begin(FINISHING)
        run.start()

    # Every planned row is accounted for, or the run is no success.
    with conclusion.reported(run, outcome, where, meter), at_work():
        manifest = conclusion.reconcile(run, outcome)
    with at_work():
        conclusion.conclude(run, outcome, manifest, where, meter)


if __name__ == "__main__":
    sys.exit(run_job(main))
