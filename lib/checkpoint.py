"""Checkpoints: a trained model as a folder, committed to storage whole, read back with every file checked.

`config.json` is written last: a folder without it is loadable by nobody, so a half-written checkpoint is none.
"""

import hashlib
import importlib.util
import json
import secrets
import shutil
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from lib.config import TRUST_NOTHING, Truncation, Trust
from lib.errors import IncompleteError, UsageError
from lib.facts import PICKLED_WEIGHTS, ModelFacts, check_readable, has_safetensors, read_facts
from lib.schema import Head, Task
from lib.score_config import ScoreConfig
from lib.storage import Store, cache_folder, explained, open_store
from lib.tokenization import Tokenizer, load_tokenizer
from lib.windows import Windows

CARD_NAME = "textsweep.json"
COMMIT_NAME = "config.json"

SCORING_REVISION = 2
"""Raised by hand when the code scores differently; part of every version. `test_equality` pins scores to it."""

DECIDING_ENDINGS = (
    *(".safetensors", ".json", ".model", ".spm", ".tokenizer"),
    *("vocab.txt", "merges.txt", "bpe.codes", "dict.txt"),
)
"""Files of a Hugging Face folder that can decide a score: weights, config, and whatever a tokenizer of transformers reads."""

NEVER_DECIDING = {CARD_NAME, "metrics.json", "trainer_state.json", "training_args.json", "generation_config.json"}


class Card(BaseModel):
    """Our own part of a checkpoint, `textsweep.json`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    labels: tuple[str, ...]
    task: Task
    max_length: int
    truncation: Truncation = "head"
    windows: Windows | None = None
    """of texts that are longer than max_length"""
    temperature: float = 1.0
    thresholds: tuple[float, ...] | None = None
    """(C,), from which probability on each label is given; without, for multi-label 0.5, for one label a row 0"""
    several: tuple[Head, ...] = ()
    """the heads of a model with several; `labels` are then those of all, and the head's name stands before each"""
    files: dict[str, str] = {}
    """SHA-256 of every other file of the checkpoint"""
    metrics: dict[str, Any] = {}
    trained: dict[str, Any] = {}
    """what it was made from: configuration, seed, rows, versions of packages"""

    @property
    def heads(self) -> tuple[Head, ...]:
        """What the model's outputs answer, in their order; nothing if it is a plain encoder."""
        if self.several or self.task is Task.EMBEDDING:
            return self.several
        return (Head(task=self.task, labels=self.labels, temperature=self.temperature, thresholds=self.thresholds),)

    def alone(self, name: str) -> "Card":
        """The card of one of several heads, as that of a model that has no other."""
        head = next(one for one in self.several if one.name == name)
        return self.model_copy(
            update={
                "labels": head.labels,
                "task": head.task,
                "temperature": head.temperature,
                "thresholds": head.thresholds,
                "several": (),
            }
        )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model folder on this machine, and what decides its scores."""

    url: str
    """where it came from, as the user named it"""
    folder: str
    facts: ModelFacts
    card: Card
    digest: str
    """SHA-256 over the deciding files"""
    trust: Trust = TRUST_NOTHING


def load(url: str, max_length: int | None = None, trust: Trust = TRUST_NOTHING, encoder: bool = False) -> Checkpoint:
    """Bring a model folder to this machine, once per machine, and describe it. Loads no weights.

    Raises `UsageError` if it is no classifier (unless a plain encoder is as welcome), if a file is not the one that was committed, or
    if weights cannot be read.
    """
    folder = fetch(url, trust)
    facts = read_facts(folder, url, trust, encoder)
    card = read_card(folder, url)
    used = used_trust(folder, trust)
    digests = {name: digest_of(Path(folder) / name) for name in deciding_files(folder, used)}
    if card:
        check_files(url, digests, {name: one for name, one in card.files.items() if is_deciding(name, used)})
    else:
        card = Card(labels=facts.labels, task=facts.task, max_length=default_max_length(folder, facts))
    check_readable(folder, f"model.path {url}")
    length = min(max_length or card.max_length, facts.max_positions)
    digest = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    card = card.model_copy(update={"max_length": length})
    return Checkpoint(url=url, folder=folder, facts=facts, card=card, digest=digest, trust=trust)


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's tokenizer, loaded once per process."""
    card, trust, prompt = checkpoint.card, checkpoint.trust, checkpoint.facts.prompt
    return load_tokenizer(checkpoint.folder, card.max_length, trust.code, card.truncation, card.windows, prompt)


def check_files(url: str, found: dict[str, str], committed: dict[str, str]) -> None:
    """Raise `UsageError` unless the deciding files are exactly those that were committed."""
    for name in sorted(found.keys() | committed.keys()):
        if name not in found:
            raise UsageError(f"model.path {url}: {name} is missing, {CARD_NAME} names it: the checkpoint is damaged")
        if name not in committed:
            raise UsageError(
                f"model.path {url}: {name} is not one of the files that {CARD_NAME} names, and could change scores; remove it"
            )
        if found[name] != committed[name]:
            raise UsageError(
                f"model.path {url}: {name} has SHA-256 {found[name]}, {CARD_NAME} says {committed[name]}: the checkpoint is"
                " damaged or mixed"
            )


def read_card(folder: str, url: str) -> Card | None:
    """Read `textsweep.json`, if the folder has one."""
    path = Path(folder) / CARD_NAME
    try:
        return Card.model_validate_json(path.read_bytes()) if path.is_file() else None
    except ValidationError as error:
        raise UsageError(
            f"model.path {url}: {CARD_NAME} is not valid: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}"
        ) from None


def default_max_length(folder: str, facts: ModelFacts) -> int:
    """The tokenizer's own limit, where it has one that the model can take."""
    path = Path(folder) / "tokenizer_config.json"
    limit = json.loads(path.read_text()).get("model_max_length") if path.is_file() else None
    return min(int(limit or facts.max_positions), facts.max_positions)


def deciding_files(folder: str, trust: Trust = TRUST_NOTHING) -> list[str]:
    """Names of the files in a folder that can decide a score, sorted."""
    return sorted(path.name for path in Path(folder).iterdir() if path.is_file() and is_deciding(path.name, trust))


def used_trust(folder: str, trust: Trust) -> Trust:
    """What loading the folder makes use of: pickled weights are left alone where there are safetensors ones."""
    return Trust(pickle=trust.pickle and not has_safetensors(folder), code=trust.code)


def is_deciding(name: str, trust: Trust = TRUST_NOTHING) -> bool:
    """Whether a file of this name can decide a score, given what may be unpickled or run."""
    if (trust.code and name.endswith(".py")) or (trust.pickle and fnmatchcase(name, PICKLED_WEIGHTS)):
        return True
    return name.endswith(DECIDING_ENDINGS) and not name.startswith(".") and name not in NEVER_DECIDING


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def vector_type(config: ScoreConfig, model: Checkpoint) -> pa.DataType | None:
    """The type of the column with each text's vector, if it is asked for. Raises `UsageError` for a pooling of nothing."""
    output = config.output
    if output.embedding is None:
        if output.embedding_pooling is not None:
            raise UsageError(
                "output.embedding_pooling is set, but no vector is asked for; set output.embedding, float16 for example"
            )
        return None
    if model.facts.prompt is not None:
        raise UsageError(
            f"output.embedding: model.path {model.url} has a template around each text, which would be part of its vector; take the"
            " encoder that it was made from"
        )
    return pa.list_({"float16": pa.float16(), "float32": pa.float32()}[output.embedding], model.facts.hidden_size)


def version_of(checkpoint: Checkpoint, config: ScoreConfig, selection: str = "") -> str:
    """The version: SHA-256 over all that decides a score or an output column, in 16 hex digits, the folder's name.

    `selection` is the digest of the rows that are scored, if not all are: objects with other rows need other names.
    """
    card = checkpoint.card
    decides = {
        "files": checkpoint.digest,
        "labels": card.labels,
        "task": card.task,
        "max_length": card.max_length,
        "truncation": card.truncation,
        "temperature": card.temperature,
        "thresholds": card.thresholds,
        "precision": config.model.precision,
        "engine": config.model.engine,
        "text_column": config.input.text_column,
        "key_columns": config.input.key_columns,
        "prefix": config.output.prefix,
        "probabilities": config.output.probabilities,
        "scoring_revision": SCORING_REVISION,
    } | ({"selection": selection} if selection else {})
    if card.windows is not None:
        decides["windows"] = asdict(card.windows)
    if config.output.embedding is not None:
        decides["embedding"] = [config.output.embedding, config.output.embedding_pooling]
    if card.several:
        decides["heads"] = [asdict(head) for head in card.several]
    elif any(head.abstains for head in card.heads):
        decides["abstained"] = True  # the column came later than the thresholds
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def fetch(url: str, trust: Trust = TRUST_NOTHING) -> str:
    """Make a model folder available on this machine and return its path: a local one as it is, others from a cache by content.

    `package:NAME` is the folder `model` inside an installed Python package that carries one.
    """
    if url.startswith("package:"):
        return packaged(url.removeprefix("package:"))
    store = open_store(url)
    if store.is_local:
        if not Path(store.root).is_dir():
            raise UsageError(f"{url}: there is no such model folder")
        return store.root
    try:
        listing = store.list()
    except FileNotFoundError:
        raise UsageError(f"{url}: there is no such model folder") from None
    names = [
        name
        for name in listing["path"].to_pylist()
        if "/" not in name and (name.endswith(DECIDING_ENDINGS) or name == CARD_NAME or is_deciding(name, trust))
    ]
    if COMMIT_NAME not in names:
        raise UsageError(f"{url}: no {COMMIT_NAME} in it, so it is no model folder, or its training did not finish")
    key = hashlib.sha256(f"{url}|{names}|{listing.to_pylist()}".encode()).hexdigest()[:24]
    cache = cache_folder("models")
    final = cache / key
    if final.is_dir():
        return str(final)
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = cache / f"{key}.{secrets.token_hex(4)}.tmp"
    temporary.mkdir()
    for name in names:
        with explained(f"{url}/{name}", "read"):
            store.fs.get_file(store.full(name), str(temporary / name))
    try:
        temporary.rename(final)
    except OSError:
        shutil.rmtree(temporary)
        if not final.is_dir():
            raise
    return str(final)


def packaged(name: str) -> str:
    """The model folder that an installed Python package carries. The package's code is not run."""
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or spec.origin is None:
        raise UsageError(f"package:{name}: no such Python package is installed here; install it on every node")
    folder = Path(spec.origin).parent / "model"
    if not (folder / COMMIT_NAME).is_file():
        raise UsageError(f"package:{name}: {folder} holds no {COMMIT_NAME}; the package carries no model there")
    return str(folder)


def commit(store: Store, folder: str, card: Card) -> None:
    """Publish a finished model folder: every file with its digest in the card, `config.json` last and created once.

    Raises `IncompleteError` if another checkpoint is there already: nothing that is committed is ever changed. Of two that
    commit in the same moment one is told so, and a mixture is found by its digests when it is loaded.
    """
    taken = IncompleteError(
        f"{store.url}: another training run committed a checkpoint here in the meantime; give this one another output.path"
    )
    if store.info(COMMIT_NAME):
        raise taken
    files = sorted(path for path in Path(folder).iterdir() if path.is_file())
    card = card.model_copy(update={"files": {path.name: digest_of(path) for path in files if path.name != CARD_NAME}})
    for path in files:
        if path.name not in (COMMIT_NAME, CARD_NAME):
            store.replace(path.name, path.read_bytes())
    store.replace(CARD_NAME, card.model_dump_json(indent=2).encode())
    if not store.create(COMMIT_NAME, (Path(folder) / COMMIT_NAME).read_bytes()):
        raise taken
