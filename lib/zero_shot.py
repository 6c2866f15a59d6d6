"""A checkpoint without training: labels are told by their descriptions, or by words at the mask of a template.

With descriptions a text's label is the one whose description is most similar to it: the head's rows are the descriptions'
embeddings. What comes out is an ordinary checkpoint. Letters: T tokens of all texts, D descriptions, H hidden size, C classes.
"""

import json
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lib.answers import answers_of, find_test_set
from lib.batching import cut_by_tokens, pad
from lib.calibration import Decision
from lib.checkpoint import COMMIT_NAME, Card, Checkpoint, commit, deciding_files, digest_of, fetch
from lib.committing import METRICS_NAME, provenance
from lib.errors import UsageError
from lib.facts import check_weights, max_positions, read_config, read_facts
from lib.heads import PooledClassifier
from lib.metrics import brief, describe, shown
from lib.model import TOLD, new_classifier, pretrained
from lib.prompts import find_verbalizers, save_prompted
from lib.schema import Task
from lib.score_config import ZeroShotConfig
from lib.storage import open_store
from lib.tokenization import Tokenizer, load_tokenizer
from lib.train_config import HeadSection

DESCRIPTION_TOKENS = 4_096
"""Of one forward pass over descriptions, padding included."""

Labels = dict[str, tuple[str, ...]]
"""Descriptions, or words, of each label."""


def make_zero_shot(config: ZeroShotConfig, run_id: str) -> dict[str, Any]:
    """Make a checkpoint of an encoder and labels, try it on labelled rows if there are any, commit it; what `metrics.json` holds.

    Raises `UsageError` if anything that is named does not fit.
    """
    output = open_store(config.output.path)
    if output.info(COMMIT_NAME) is not None:
        raise UsageError(
            f"output.path {output.url}: holds a checkpoint, and what is committed is never changed; give another output.path"
        )
    check_prompt(config)
    begun, trust = time.monotonic(), config.model.trust
    labels = read_labels(config.labels.file)
    base = fetch(config.model.base, trust)
    check_weights(base, "model.base", config.model.base, trust)
    length = min(config.model.max_length, max_positions(read_config(base, trust)))
    tokenizer = load_tokenizer(base, length, trust.code, config.model.truncation)
    output.check_writable()
    with tempfile.TemporaryDirectory() as folder:
        if config.prompt.template is None:
            similar_to_descriptions(config, base, tokenizer, labels).save_pretrained(folder)
        else:
            save_masked_prompt(config, base, tokenizer, labels, folder)
        tokenizer.reference.save_pretrained(folder)
        facts = read_facts(folder, config.model.base, trust)
        made = made_from(config, run_id, labels)
        card = Card(
            labels=facts.labels,
            task=facts.task,
            max_length=length,
            truncation=config.model.truncation,
            trained=made,
        )
        digest = "".join(digest_of(Path(folder) / name) for name in deciding_files(folder, trust))
        model = Checkpoint(url=output.url, folder=folder, facts=facts, card=card, digest=digest, trust=trust)
        tested = None if config.test.path is None else try_on(config, config.test.path, model)
        metrics = {
            "run_id": run_id,
            "seconds": round(time.monotonic() - begun, 3),
            "rows": {"test": tested["rows"]} if tested else {},
            "labels": list(facts.labels),
            "test": tested,
        }
        (Path(folder) / METRICS_NAME).write_text(json.dumps(metrics, indent=1), encoding="utf-8")
        (Path(folder) / "README.md").write_text(readme(made, tested), encoding="utf-8")
        commit(output, folder, card.model_copy(update={"metrics": {"test": brief(tested)}}))
    return metrics


def check_prompt(config: ZeroShotConfig) -> None:
    """Raise `UsageError` for settings that do not go with a template."""
    given = sorted({"pooling", "temperature"} & config.model.model_fields_set)
    if config.prompt.template is not None and given:
        raise UsageError(
            f"model.{given[0]} with prompt.template: a text is read at the template's mask, not compared; leave one of the two out"
        )


def read_labels(path: str) -> Labels:
    """Read a TOML file of labels with one or several descriptions each. Raises `UsageError` if it is none."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"labels.file {path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"labels.file {path}: not valid TOML: {error}") from None
    found: Labels = {}
    for label, value in values.items():
        several = [value] if isinstance(value, str) else value
        if (
            not isinstance(several, list)
            or not several
            or not all(isinstance(one, str) and one.strip() for one in several)
        ):
            raise UsageError(
                f"labels.file {path}: label {label!r} has {value!r}, expected a description in quotes, or a list of them"
            )
        found[label] = tuple(several)
    if len(found) < 2:
        raise UsageError(f"labels.file {path}: {len(found)} labels, expected at least 2")
    return found


def similar_to_descriptions(
    config: ZeroShotConfig, base: str, tokenizer: Tokenizer, labels: Labels
) -> PooledClassifier:
    """A classifier whose logits are a text's cosine similarities to the labels, divided by the temperature.

    Of several descriptions a label is the mean of their directions.
    """
    head = HeadSection(pooling=config.model.pooling, normalize=True, dropout=0.0)
    model: Any = new_classifier(base, tuple(labels), Task.MULTI_CLASS, None, 0, config.model.trust, head).eval()
    tokens = tokenizer.encode([one for several in labels.values() for one in several])
    embeddings = torch.empty(len(tokens.lengths), model.config.hidden_size)
    with torch.no_grad():
        for rows in cut_by_tokens(tokens.lengths, DESCRIPTION_TOKENS):
            ids, mask = pad(tokens.ids, tokens.offsets, rows, model.config.pad_token_id or 0)
            embeddings[rows] = model.embed(torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64)))
        means = [part.mean(dim=0) for part in embeddings.split([len(several) for several in labels.values()])]
        linear = next(one for one in model.head if isinstance(one, nn.Linear))
        linear.weight.copy_(nn.functional.normalize(torch.stack(means), dim=-1) / config.model.temperature)
        linear.bias.zero_()
    found: PooledClassifier = model
    return found


def save_masked_prompt(config: ZeroShotConfig, base: str, tokenizer: Tokenizer, labels: Labels, folder: str) -> None:
    """Write a masked language model that answers with the labels' words. Raises `UsageError` if the base is none."""
    trust, template = config.model.trust, config.prompt.template
    assert template is not None
    around = tokenizer.find_around()
    verbalizers = find_verbalizers(tokenizer.reference, around, template, labels)
    try:
        model, info = pretrained(base, trust, "AutoModelForMaskedLM", **TOLD)
        missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    except ValueError as error:
        missing = [str(error).splitlines()[0]]
    if missing:
        raise UsageError(
            f"model.base {config.model.base}: has no masked-language head ({', '.join(missing[:3])}), which prompt.template reads;"
            " take a base that has one, as most encoders have before they are fine-tuned"
        )
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: index for index, label in enumerate(labels)}
    model.config.problem_type = "single_label_classification"
    save_prompted(model, verbalizers, folder)
    load_tokenizer(base, tokenizer.max_length, trust.code, config.model.truncation, None, verbalizers.prompt)


def try_on(config: ZeroShotConfig, path: str, model: Checkpoint) -> dict[str, Any]:
    """All metrics on the labelled rows of `test.path`. Raises `UsageError` if these do not fit the labels."""
    source = find_test_set(path, config.test.text_column, config.test.label_column)
    found = answers_of([model], source, path, "labels.file")
    logits = np.log(found.probabilities[0].clip(min=np.finfo(np.float32).tiny))
    return describe(found.truth, logits, Decision(task=Task.MULTI_CLASS), found.labels)


def made_from(config: ZeroShotConfig, run_id: str, labels: Labels) -> dict[str, Any]:
    """What the checkpoint was made from, for its card."""
    return provenance(config, run_id) | {"descriptions": labels}


def readme(made: dict[str, Any], tested: dict[str, Any] | None) -> str:
    """The checkpoint's model card."""
    config, template = made["config"], made["config"]["prompt"]["template"]
    by = f"the words of a label in `{template}`" if template else "the description of a label that is most similar"
    lines = [
        f"- {' '.join(label.split())}: {'; '.join(map(repr, several))}"
        for label, several in made["descriptions"].items()
    ]
    good = f"{shown(tested)}, on {tested['rows']:,} labelled rows" if tested else "not tried on labelled rows"
    return f"""---
library_name: transformers
pipeline_tag: text-classification
---

# {len(lines)} labels, without training

Made from `{config["model"]["base"]}`, run `{made["run_id"]}`: a text gets {by}. {good[0].upper()}{good[1:]}.

{chr(10).join(lines)}

    python -m jobs.predict --set model.path=THIS_FOLDER "a text"
"""
