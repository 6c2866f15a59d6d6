"""Further pre-training on the cluster (Sun et al. 2019, arXiv 1905.05583; Gururangan et al. 2020, arXiv 2004.10964).

A pretrained encoder learns the language of the task's or the field's texts before it is fine-tuned: masked tokens are told from those
around them. Run it again with the same run id and configuration and it goes on from the last evaluation.
"""

import time
from typing import Any

from lib.checkpoint import fetch
from lib.corpus import CorpusIndex, find_corpus, prepare_corpus
from lib.errors import UsageError
from lib.language_model import check_family
from lib.masked_fitting import PretrainJob, work
from lib.masking import new_masking
from lib.metrics import check_stopping
from lib.pretrain_config import PretrainConfig
from lib.runtime import Cluster
from lib.sources import Source
from lib.storage import open_store
from lib.tokenization import load_tokenizer
from lib.tracking import find_places
from lib.training import absolute, check_base
from lib.workers import check_folder, claimed, committed_before, place_workers, run_folder, run_to_commit


def pretrain(config: PretrainConfig, run_id: str, cluster: Cluster) -> dict[str, Any]:
    """Train a masked-language model, commit the best one to `output.path`, and return what its `metrics.json` holds.

    Raises `UsageError` before any weights are loaded, `IncompleteError` if the same command can finish the run later.
    """
    output = open_store(config.output.path)
    found = committed_before(output, config, run_id)
    if found is not None:
        print(f"{output.url}: run {run_id} committed this encoder already", flush=True)
        return found
    check_optim(config)
    check_stopping(config.stopping)
    check_folder(output, cluster)
    use_gpu, cpus_per_worker = place_workers(config, cluster)
    base = absolute(config.model.base)
    max_length, pad_token_id = check_base(base, config.model)
    check_masking(config, base, max_length)
    sets = find_corpus(config)
    folder = run_folder(output, run_id)
    tracking = find_places(config, output, is_fresh=folder.info("run.json") is None)
    begun = time.monotonic()
    with claimed(folder, config, run_id):
        index = prepare_corpus(config, sets, base, max_length, folder.at("data"))
    print_corpus(index, sets, max_length, time.monotonic() - begun)
    job = PretrainJob(
        config=config,
        run_id=run_id,
        base=base,
        max_length=max_length,
        pad_token_id=pad_token_id,
        metric="loss",
        output=output,
        folder=folder,
        cpus_per_worker=cpus_per_worker,
        tracking=tracking,
        index=index,
        data=folder.at("data"),
    )
    return run_to_commit(lambda: work(job), job, use_gpu)


def check_optim(config: PretrainConfig) -> None:
    """Raise `UsageError` for settings of fine-tuning that a masked-language model does not have."""
    refused = {
        "optim.rdrop": (
            config.optim.rdrop > 0,
            "its two passes are of the same input, and here each pass hides other tokens",
        ),
        "optim.unfreeze_layers": (
            config.optim.unfreeze_layers is not None,
            "the head's decoder are the embeddings, the lowest layer of all",
        ),
    }
    for key, (is_set, why) in refused.items():
        if is_set:
            raise UsageError(f"{key} in further pre-training: {why}; leave it out")


def check_masking(config: PretrainConfig, base: str, max_length: int) -> None:
    """Raise `UsageError` unless tokens of the base can be hidden, and texts laid one behind the other if that is asked for."""
    trust = config.model.trust
    folder = fetch(base, trust)
    check_family(folder, "model.base", trust)
    tokenizer = load_tokenizer(folder, max_length, trust.code)
    new_masking(tokenizer, config.mlm.probability, config.mlm.whole_words)
    if config.mlm.packing and not tokenizer.find_around()[1]:
        raise UsageError(
            "mlm.packing: the tokenizer of model.base puts nothing behind a text that could separate it from the next one; set"
            " mlm.packing = false"
        )


def print_corpus(index: CorpusIndex, sets: list[Source], max_length: int, seconds: float) -> None:
    """Say what is learned from, and what was left out."""
    for source in sets:
        dropped = index.dropped[source.name]
        if dropped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
            print(f"{source.name}: left out {sum(dropped.values())} ({reasons}) of {source.store.url}", flush=True)
    for name, rows in index.rows.items():
        print(f"{name}: {index.texts[name]:,} texts, {index.tokens[name]:,} tokens in {rows:,} rows", flush=True)
    print(f"at most {max_length} tokens a row; ready in {seconds:.1f} s", flush=True)
