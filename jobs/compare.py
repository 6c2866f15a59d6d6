"""Decide whether a newly fine-tuned checkpoint may take the place of the one in use: the gate behind a weekly refit.

Reads   two checkpoints (or Hugging Face folders) with the same labels, and test.path: labelled Parquet that neither has learned from,
        the same every week.
Writes  both metrics, their difference with its interval, and the verdict to standard output; the same as JSON to --json FILE,
        with digests of both models and of the test rows. --test-digest with that of the first week refuses any other rows.

    python -m jobs.compare --champion s3://bucket/models/topics/7 --challenger s3://bucket/models/topics/8 \\
                           --set test.path=s3://bucket/labelled/frozen --test-digest 3f9a61c2d07b --json verdict.json

Accepted is a challenger of which a loss of gate.margin or more is ruled out (paired bootstrap over the rows), and that does not have
significantly more rows wrong (McNemar's exact test). No evidence is no acceptance: a test set that is too small to tell refuses, and
says about how many rows would do.

Exit codes: 0 accepted; 3 not accepted; 2 the command, the configuration or the data is wrong; 4 storage failed, run it again; 1 a bug.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict

from lib import checkpoint, gate
from lib.answers import answers_of, find_test_set
from lib.checkpoint import Checkpoint
from lib.config import parse_command, write_json
from lib.errors import OverLimitError, UsageError, run_job
from lib.schema import Task
from lib.score_config import CompareConfig


def main(argv: Sequence[str]) -> None:
    """Score the test set with both, test the difference, say what follows."""
    extra = argparse.ArgumentParser(add_help=False)
    extra.add_argument("--champion", metavar="URL", required=True, help="the checkpoint in use")
    extra.add_argument("--challenger", metavar="URL", required=True, help="the one that may take its place")
    extra.add_argument("--json", metavar="FILE", help="write the verdict here, for an orchestrator")
    extra.add_argument(
        "--test-digest",
        metavar="HEX",
        type=digest_of,
        help="of the rows at test.path, or its beginning: others are refused",
    )
    command = parse_command(CompareConfig, argv, prog="jobs.compare", description=__doc__ or "", extra=extra)
    arguments, config = command.arguments, command.config

    models = [load(name, getattr(arguments, name)) for name in ("champion", "challenger")]
    if set(models[0].card.labels) != set(models[1].card.labels):
        other = sorted(set(models[0].card.labels) ^ set(models[1].card.labels))
        raise UsageError(
            f"--challenger {arguments.challenger}: only one of the two knows the labels {', '.join(other[:5])}"
        )
    test = config.test
    source = find_test_set(test.path, test.text_column, test.label_column)
    found = answers_of(models, source, test.path, f"the labels of {arguments.champion}")
    if arguments.test_digest is not None:
        refuse_other_rows(test.path, found.digest, arguments.test_digest)
    champion, challenger = (one.argmax(axis=1) for one in found.probabilities)
    verdict = gate.judge(found.truth, champion, challenger, len(found.labels), **config.gate.model_dump())

    name = verdict.metric.replace("_", "-")
    rows = f"{verdict.rows:,} rows (digest {found.digest[:12]})"
    print(f"{name} on {rows}: champion {verdict.champion:.4f}, challenger {verdict.challenger:.4f}")
    print(
        f"difference: {100 * verdict.difference:+.2f} points, {100 * verdict.confidence:g}% sure to be above"
        f" {100 * verdict.low:+.2f} and as sure to be below {100 * verdict.high:+.2f}"
    )
    print(
        f"right alone: champion {verdict.champion_alone_right:,}, challenger {verdict.challenger_alone_right:,} rows;"
        f" McNemar p {verdict.mcnemar_p:.3g}"
    )
    if arguments.json:
        digests = {"champion_digest": models[0].digest, "challenger_digest": models[1].digest}
        digests["test_digest"] = found.digest
        urls = {"champion_url": arguments.champion, "challenger_url": arguments.challenger, "test": test.path}
        record = {"accepted": verdict.accepted, "reason": verdict.reason(), **asdict(verdict), **urls, **digests}
        write_json(arguments.json, {**record, "run_id": command.run_id})
    if not verdict.accepted:
        raise OverLimitError(f"not accepted: {verdict.reason()}")
    print(f"accepted: {verdict.reason()}")


def digest_of(text: str) -> str:
    """Check the form of --test-digest."""
    if not re.fullmatch(r"[0-9a-f]{12,64}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected 12 to 64 hex digits, as an earlier verdict shows them")
    return text


def refuse_other_rows(path: str, digest: str, expected: str) -> None:
    """Raise `UsageError` if the test rows are not those that were asked for: verdicts on other rows say nothing beside each other."""
    if not digest.startswith(expected):
        raise UsageError(
            f"test.path {path}: the digest of its rows is {digest}, expected {expected} (--test-digest): rows were added, changed or"
            " left out since; bring the old ones back, or give the new digest and compare with earlier weeks no more"
        )


def load(name: str, url: str) -> Checkpoint:
    """One of the two models. Raises `UsageError` unless it gives one label a row."""
    model = checkpoint.load(url)
    if model.card.task is not Task.MULTI_CLASS:
        kind = model.card.task.value.replace("_", "-")
        raise UsageError(f"--{name} {url}: a {kind} model; expected one that gives one label a row")
    return model


if __name__ == "__main__":
    sys.exit(run_job(main))
