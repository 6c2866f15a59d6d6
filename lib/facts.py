"""What a Hugging Face folder holds, said without loading it: its configuration, its labels, its kind of weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lib.config import TRUST_NOTHING, Trust, raise_if_code_was_refused
from lib.errors import UsageError
from lib.schema import Task
from lib.template import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

OFFSET_POSITIONS = {
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "mpnet",
    "longformer",
    "roberta-prelayernorm",
    "data2vec-text",
    "ibert",
}
"""Families whose position numbers start behind the padding id: they take that many tokens less than they have positions."""

PROMPT = "textsweep_prompt"
"""The key of `config.json` under which a template and the words of its labels are described."""

PICKLED_WEIGHTS = "pytorch_model*.bin"


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a classifier's `config.json` says."""

    labels: tuple[str, ...]
    task: Task
    max_positions: int
    """the most tokens of one text, special ones included"""
    pad_token_id: int
    hidden_size: int
    """of the vector that stands for a text, if it is asked for"""
    prompt: Prompt | None = None
    """a template around each text"""


def import_transformers() -> Any:
    """Transformers, without its warnings and progress bars.

    Imported where it is needed: it brings torch, together 2.5 s that a job spends while the archive is listed.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def read_config(folder: str, trust: Trust = TRUST_NOTHING) -> "PreTrainedConfig":
    """Read `config.json`. Raises `UsageError` if the folder holds none that transformers knows, or code that is not to be run."""
    if not (Path(folder) / "config.json").is_file():
        raise UsageError(f"{folder}: no config.json in it; expected a Hugging Face model folder")
    if trust.code:
        check_code(folder)
    transformers = import_transformers()
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust.code)
    except (ValueError, KeyError, OSError) as error:
        raise_if_code_was_refused(folder, error)
        raise UsageError(f"{folder}: config.json is not one that transformers can load: {error}") from error


def check_code(folder: str) -> None:
    """Raise `UsageError` if the folder names code of its own that lies elsewhere: the version would not hold it."""
    for name in ("config.json", "tokenizer_config.json"):
        for part in code_of(Path(folder) / name):
            if "--" in part:
                raise UsageError(
                    f"{folder}: {name} takes code from another place ({part}); put the Python files into the folder, and name them"
                    " without the part before --"
                )


def code_of(path: Path) -> list[str]:
    """The classes of its own code that a JSON file of a model's folder names."""
    try:
        named = json.loads(path.read_bytes()).get("auto_map") if path.is_file() else None
    except (ValueError, AttributeError):
        return []  # not JSON, or no object: whoever reads it says so
    values = named.values() if isinstance(named, dict) else [named]
    return [str(part) for value in values for part in (value if isinstance(value, list) else [value]) if part]


def has_safetensors(folder: str) -> bool:
    """Whether the weights are there in the format that holds nothing but numbers."""
    return any(Path(folder).glob("*.safetensors"))


def check_weights(folder: str, key: str, shown: str, trust: Trust) -> None:
    """Raise `UsageError` unless there are weights that may be loaded; `key` is model.path or model.base."""
    if has_safetensors(folder) or (trust.pickle and any(Path(folder).glob(PICKLED_WEIGHTS))):
        return
    names = ", ".join(sorted(path.name for path in Path(folder).iterdir())[:5])
    raise UsageError(
        f"{key} {shown}: no *.safetensors weights in it (there are: {names}); pickled weights can run code when they are loaded."
        " Convert them once with transformers' save_pretrained, or, if you trust their source: --set model.allow_pickle=true"
    )


def check_readable(folder: str, shown: str) -> None:
    """Raise `UsageError` if weights are cut off or no safetensors at all: their headers say how long they must be. Loads none.

    The same if the list of which file holds which weight is none, where transformers reads it: beside one file it does not.
    """
    index = Path(folder, "model.safetensors.index.json")
    if index.exists() and not index.with_suffix("").with_suffix("").exists():
        try:
            read = json.loads(index.read_bytes())
            listed = isinstance(read["metadata"], dict) and all(
                isinstance(one, str) for one in read["weight_map"].values()
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            listed = False
        if not listed:
            raise UsageError(
                f"{shown}: {index.name} ({index.stat().st_size:,} bytes) is not what it should be, JSON with metadata and a weight_map: it is damaged,"
                " or was not copied whole; get it again from where it came"
            )
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(path, "numpy"):
                pass
        except SafetensorError as error:
            raise UsageError(
                f"{shown}: {path.name} ({path.stat().st_size:,} bytes) cannot be read as safetensors ({error}): it is damaged, or was not"
                " copied whole; get it again from where it came"
            ) from None


def read_facts(folder: str, shown: str, trust: Trust = TRUST_NOTHING, encoder: bool = False) -> ModelFacts:
    """Say what the classifier in a folder predicts; loads no weights.

    Raises `UsageError` if it is no classifier, unless a plain encoder is as welcome. `shown` is the model's name in messages: the
    URL that the user gave.
    """
    config = read_config(folder, trust)
    architectures = config.architectures or []
    is_classifier = any(name.endswith("ForSequenceClassification") for name in architectures)
    if not is_classifier and not encoder:
        raise UsageError(
            f"model.path {shown}: holds {', '.join(architectures) or 'no architecture'}, expected one that ends in"
            " ForSequenceClassification; fine-tune it first: python -m jobs.train --set model.base=..., or ask for its vectors:"
            " --set output.embedding=float16 (jobs.score)"
        )
    check_weights(folder, "model.path", shown, trust)
    names: dict[Any, str] = dict(config.id2label or {}) if is_classifier else {}
    labels = tuple(str(name) for _, name in sorted(names.items()))
    if not is_classifier:
        task = Task.EMBEDDING
    elif config.problem_type == "multi_label_classification":
        task = Task.MULTI_LABEL
    elif config.problem_type == "regression" or len(labels) == 1:
        task = Task.REGRESSION
    else:
        task = Task.MULTI_CLASS
    spec = getattr(config, PROMPT, None)
    return ModelFacts(
        labels=labels,
        task=task,
        max_positions=max_positions(config),
        pad_token_id=config.pad_token_id or 0,
        hidden_size=config.hidden_size,
        prompt=Prompt(tuple(spec["before"]), tuple(spec["behind"])) if spec else None,
    )


def max_positions(config: "PreTrainedConfig") -> int:
    """The most tokens that the model can take."""
    positions = int(getattr(config, "max_position_embeddings", None) or 512)
    return positions - (int(config.pad_token_id or 0) + 1) if config.model_type in OFFSET_POSITIONS else positions
