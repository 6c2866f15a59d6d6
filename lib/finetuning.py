"""Fine-tuning: what every worker of `jobs.train` does, up to the committed checkpoint with all that is known of it."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib.attribution import check_captum, explain_rows, new_explainer
from lib.calibration import Decision, FloatArray, decide
from lib.checkpoint import Card, commit, fetch
from lib.classifying import ClassifierFit, ClassifierJob, add_texts, name_rows
from lib.committing import METRICS_NAME
from lib.errors import UsageError, say
from lib.fitting import run_worker
from lib.mapped import Subset
from lib.metrics import brief, describe, worst_errors
from lib.model import load_classifier
from lib.model_card import model_card
from lib.schema import slices_of, task_of
from lib.tokenization import load_tokenizer
from lib.training_report import training_report
from lib.tuning import merge_adapters

EXPLAINED_STEPS = 64
"""At most, for each of the worst errors."""

EXPLAINED_SECONDS = 60.0
"""For all of the worst errors together."""


def work(job: ClassifierJob) -> str | None:
    """What each worker runs. Returns why the run is hopeless, if it is."""
    return run_worker(job, ClassifierFit, conclude, [task.data for task in job.tasks])


def conclude(fit: ClassifierFit) -> None:
    """Evaluate on the validation and test rows, on all workers, and commit, on the first."""
    valid, test = fit.learner.evaluate(fit.sets["valid"]), fit.sets.get("test")
    found = None if test is None else fit.learner.evaluate(test)
    if valid is not None:
        publish(fit, valid, found)


def publish(fit: ClassifierFit, valid: FloatArray, test: FloatArray | None) -> None:
    """Write the model's folder with its metrics, given the logits of validation and test rows, and commit it."""
    job, best = fit.job, fit.validation(valid)
    heads, found = [], {}
    tests = {} if test is None else dict(fit.parts_of("test", test))
    for number, logits in fit.parts_of("valid", valid):
        head, sets = job.heads[number], fit.sets_of[number]
        decision = decide(job.config.decision, logits, sets["valid"].targets, head.task)
        heads.append(replace(head, temperature=decision.temperature, thresholds=decision.thresholds))
        found[head.name] = task_metrics(fit, number, decision, logits, tests.get(number))
    counts = {task.name: task.index.label_counts for task in job.tasks}
    trained = {
        **fit.provenance("|".join(task.index.fingerprint for task in job.tasks)),
        "label_counts": counts if len(found) > 1 else job.tasks[0].index.label_counts,
    }
    briefly = {name: brief(one["test"]) for name, one in found.items()}
    card = Card(
        labels=job.labels,
        task=task_of(heads),
        max_length=job.max_length,
        truncation=job.config.model.truncation,
        windows=job.config.model.windows,
        temperature=heads[0].temperature if len(heads) == 1 else 1.0,
        thresholds=heads[0].thresholds if len(heads) == 1 else None,
        several=tuple(heads) if len(heads) > 1 else (),
        metrics={"valid": best, "test": briefly[""] if len(found) == 1 else briefly},
        trained=trained,
    )
    with tempfile.TemporaryDirectory() as folder:
        model = fit.trained_model()
        merge_adapters(model)
        model.save_pretrained(folder)
        for number, head in enumerate(heads):
            found[head.name]["unexplained"] = explain_errors(fit, number, found[head.name], card, folder)
            name_rows(found[head.name]["errors"], evaluated(fit, number, found[head.name]).data)
        metrics: dict[str, Any] = {
            **fit.run_record(best),
            "rows": trained["rows"],
            "label_noise": fit.suspects,
            **(found[""] if len(found) == 1 else {"tasks": found}),
        }
        trust = job.config.model.trust
        tokenizer = load_tokenizer(fetch(job.base, trust), job.max_length, trust.code, job.config.model.truncation)
        tokenizer.reference.save_pretrained(folder)
        (Path(folder) / METRICS_NAME).write_text(json.dumps(metrics, indent=1), encoding="utf-8")
        (Path(folder) / "report.html").write_text(training_report(card, metrics), encoding="utf-8")
        (Path(folder) / "README.md").write_text(model_card(card, metrics), encoding="utf-8")
        commit(job.output, folder, card)
    fit.end(best, **{f"{name}_test" if name else "test": one["test"] for name, one in found.items()})


def task_metrics(
    fit: ClassifierFit, number: int, decision: Decision, valid: FloatArray, test: FloatArray | None
) -> dict[str, Any]:
    """What is known of one task at the end, given the logits of its validation and test rows."""
    index, sets = fit.job.tasks[number].index, fit.sets_of[number]
    described = {
        name: describe(sets[name].targets, logits, decision, index.labels)
        for name, logits in (("valid", valid), ("test", test))
        if logits is not None
    }
    return {
        "rows": {name: len(one) for name, one in sets.items()},
        "dropped": index.dropped,
        "known_from_training": fit.known[number]["train"],
        "known_from_validation": fit.known[number]["valid"],
        "known_from_tasks": fit.known_from_tasks[fit.job.tasks[number].name],
        "labels": list(index.labels),
        "temperature": decision.temperature,
        "thresholds": decision.thresholds,
        "valid": described["valid"],
        "test": described.get("test"),
        "errors": find_errors(
            fit, number, decision, "valid" if test is None else "test", valid if test is None else test
        ),
        "label_counts": index.label_counts,
        "lengths": {"rows": index.sampled["train"], "longer_than": index.longer["train"]},
    }


def find_errors(
    fit: ClassifierFit, number: int, decision: Decision, name: str, logits: FloatArray
) -> list[dict[str, Any]]:
    """The worst errors on the rows of a task's set, with their texts, as the model reads them, if the configuration allows it."""
    job, rows = fit.job, fit.sets_of[number][name]
    errors = worst_errors(rows.targets, logits, decision, job.tasks[number].index.labels)
    for one in errors:
        one["row"] = int(rows.chosen[one["row"]])
    if job.config.output.report_text:
        add_texts(job, errors, rows.data)
    return errors


def evaluated(fit: ClassifierFit, number: int, metrics: dict[str, Any]) -> Subset:
    """The rows that a task's errors are of: those of its test set, or without one of its validation set."""
    return fit.sets_of[number]["valid" if metrics["test"] is None else "test"]


def explain_errors(fit: ClassifierFit, number: int, metrics: dict[str, Any], card: Card, folder: str) -> str | None:
    """Add to a task's worst errors whose texts are shown where their answers come from, by the model in `folder`.

    Returns why that was not done for all of them, if so, and warns: nothing of it ends a run that has been trained.
    """
    job, model, errors = fit.job, fit.job.config.model, metrics["errors"]
    rows = evaluated(fit, number, metrics)
    head, place = slices_of(job.heads)[number]
    if not job.config.output.report_text or not errors:
        return None
    try:
        check_captum("marking the words that the worst errors come from")
        base, trust = fetch(job.base, model.trust), model.trust
        tokenizer = load_tokenizer(base, job.max_length, trust.code, model.truncation, model.windows)
        own, classifier = card.alone(head.name) if card.several else card, load_classifier(folder, trust)
        explainer = new_explainer(classifier, tokenizer, own, job.pad_token_id, fit.team.device, place)
        done = explain_rows(explainer, rows.data, errors, EXPLAINED_STEPS, EXPLAINED_SECONDS)
    except UsageError as error:
        failure = str(error)
    except Exception as error:  # noqa: BLE001 - a report is no reason to lose what was learned
        failure = f"{type(error).__name__}: {error}"
    else:
        if done == len(errors):
            return None
        failure = f"{done} of {len(errors)} were explained in {EXPLAINED_SECONDS:.0f} s"
    say(f"WARNING: the words that the worst errors come from are not all marked in the report: {failure}")
    return failure
