"""The demo's corpus: docstrings of the packages that Textsweep is installed with, labelled by package.

Real text that needs no download. Files are read with `ast` and never imported. Splits share no module, so a test docstring
never has a neighbour of its own file in training; exact duplicates are removed over all packages and splits.

    python -m jobs.demo_corpus s3://bucket/folder    # write train, valid and test.parquet, and an archive of several shards
"""

import ast
import hashlib
import importlib.util
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lib.errors import UsageError, run_job
from lib.storage import Store, open_store

PACKAGES = ("matplotlib", "networkx", "pandas", "ray", "scipy", "sklearn", "sympy", "transformers")
"""The classes. All of them are dependencies, direct or not."""

SPLITS = {"train": 600, "valid": 50, "test": 100, "archive": 450}
"""Docstrings of each package, at most; each split takes a share of the modules as large as its share of these."""

MAX_PER_MODULE = 20
"""So that no file of hundreds of look-alikes rules its class."""

NUM_SHARDS = 6
"""of the archive"""

MIN_CHARACTERS = 40
"""Shorter ones (`Return the name.`) could stand anywhere."""
MAX_CHARACTERS = 300
"""Of a docstring before names are taken out."""

# Nearly every docstring with an example names its package, and a classifier would read nothing else. All names are taken
# out of all texts: with only its own taken out, the gap would be the giveaway.
NAMES = re.compile(
    r"(?<![a-z])(matplotlib|pyplot|mpl|plt|networkx|nx|pandas|pd|ray|scipy|sp|scikit-?learn|sklearn|sympy|transformers|"
    r"hugging ?face)(?![a-z])",
    re.IGNORECASE,
)
MASK = "package"

# What a test checks is told in a few words that fit every package.
TESTS = re.compile(r"(^|/)(tests?|testing|conftest|test_\w+)(/|\.py$)")


def main(argv: Sequence[str]) -> None:
    """Write the corpus."""
    if len(argv) != 1:
        raise UsageError(
            f"expected one URL of a folder, found {list(argv)}: python -m jobs.demo_corpus s3://bucket/folder"
        )
    store = open_store(argv[0])
    write_corpus(store, corpus())
    print(f"{store.url}: train.parquet, valid.parquet, test.parquet, and {NUM_SHARDS} shards in archive/")


@dataclass(frozen=True)
class Docstring:
    """One text of the corpus."""

    text: str
    package: str
    module: str
    """the file below site-packages"""
    split: str


def corpus() -> list[Docstring]:
    """All docstrings, every package the same number of times in each split, in an order decided by hashes alone."""
    seen: set[str] = set()
    found = [docstring for package in PACKAGES for docstring in collect(package, seen)]
    kept = []
    for split in SPLITS:
        parts = [[one for one in found if (one.package, one.split) == (package, split)] for package in PACKAGES]
        fewest = min(map(len, parts))
        kept += [one for part in parts for one in part[:fewest]]
    return sorted(kept, key=lambda one: fraction(one.text))


def collect(package: str, seen: set[str]) -> Iterator[Docstring]:
    """Docstrings of one package that are not in `seen` yet, until every split has enough; files are parsed only as needed."""
    left = dict(SPLITS)
    for path, module in modules_of(package):
        split = split_of(module)
        if not left[split]:
            continue
        fresh = [text for text in dict.fromkeys(docstrings_in(path)) if text not in seen]
        for text in islice(fresh, min(MAX_PER_MODULE, left[split])):
            seen.add(text)
            left[split] -= 1
            yield Docstring(text, package, module, split)
        if not any(left.values()):
            return


def modules_of(package: str) -> list[tuple[Path, str]]:
    """The package's source files and their names, in an order decided by the hashes of the names."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"the demo's corpus needs {package}, which is not installed; make install", name=package
        )
    root = Path(spec.origin).parent
    named = [(path, path.relative_to(root.parent).as_posix()) for path in root.rglob("*.py")]
    return sorted((one for one in named if not TESTS.search(one[1])), key=lambda item: fraction(item[1]))


def docstrings_in(path: Path) -> Iterator[str]:
    """The docstrings of a file's module, classes and functions: cut, masked, and not too short."""
    try:
        with warnings.catch_warnings(action="ignore"):  # invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except SyntaxError:  # templates, and files for other versions of Python
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = NAMES.sub(MASK, (ast.get_docstring(node) or "")[:MAX_CHARACTERS]).strip()
            if len(text) >= MIN_CHARACTERS:
                yield text


def split_of(module: str) -> str:
    """The split that a module belongs to, decided by its name alone."""
    place = fraction(f"split {module}") * sum(SPLITS.values())
    for split, size in SPLITS.items():
        place -= size
        if place < 0:
            return split
    raise AssertionError(f"{module} is beyond all splits")


def fraction(text: str) -> float:
    """A number from 0 to 1 that is the same for the same text everywhere."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:6]) / 2**48


def write_corpus(store: Store, docstrings: list[Docstring]) -> None:
    """Write labelled sets as one file each, and an archive of several shards with rows that cannot be scored."""
    for split in ("train", "valid", "test"):
        labelled = [{"text": one.text, "label": one.package} for one in docstrings if one.split == split]
        write(store, f"{split}.parquet", pa.Table.from_pylist(labelled))
    archive = [one for one in docstrings if one.split == "archive"]
    for number in range(NUM_SHARDS):
        rows: list[dict[str, str | None]] = [
            {"module": one.module, "text": one.text} for one in archive[number::NUM_SHARDS]
        ]
        # As in every real archive: a text that is null, and one that is empty.
        rows[7:7] = [{"module": "nowhere", "text": None}, {"module": "nowhere", "text": "  "}]
        write(store, f"archive/part-{number:05d}.parquet", pa.Table.from_pylist(rows))


def write(store: Store, name: str, table: pa.Table) -> None:
    """Write one Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    store.replace(name, sink.getvalue().to_pybytes())


if __name__ == "__main__":
    sys.exit(run_job(main))
