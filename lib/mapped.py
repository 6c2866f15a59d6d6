"""A tokenized set, memory-mapped: what a training worker reads its rows from. Knows no Ray and no torch.

Letters: B rows of a forward pass, L padded length, C classes, N rows of a set.
"""

import contextlib
import fcntl
import hashlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lib.batching import IntArray
from lib.schema import Targets, Task
from lib.storage import Store, cache_folder, explained
from lib.windows import Windows, split

SHARD_KEY = "shard"
"""Of a record batch's metadata: the file that its rows come from."""


@dataclass(frozen=True)
class Part:
    """One record batch of a tokenized file, memory-mapped."""

    ids: npt.NDArray[np.integer]
    offsets: npt.NDArray[np.int32]
    type_ids: npt.NDArray[np.uint8] | None
    shard: str | None
    """path of the rows' file, below the root of the labelled set; None, and no rows, if that was not kept"""
    rows: npt.NDArray[np.int64] | None
    """their numbers in that file"""


class TokenSet:
    """The rows of one or more tokenized files: token ids stay in the files, lengths are in memory."""

    def __init__(
        self, paths: Sequence[str], pad_token_id: int, max_length: int, windows: Windows | None = None
    ) -> None:
        """`windows`: those in which rows of more than `max_length` tokens are laid out, if they are."""
        self.pad_token_id = pad_token_id
        self.max_length = max_length
        self.windows = windows
        self.parts: list[Part] = []
        for shard, batch in record_batches(paths):
            lists = batch.column("ids")
            segments = batch.column("type_ids").values.to_numpy() if "type_ids" in batch.schema.names else None
            rows = batch.column("row").to_numpy() if "row" in batch.schema.names else None
            self.parts.append(Part(lists.values.to_numpy(), lists.offsets.to_numpy(), segments, shard, rows))
        self.lengths: npt.NDArray[np.int32] = np.concatenate([np.diff(part.offsets) for part in self.parts])
        self.starts = np.cumsum([0, *(len(part.offsets) - 1 for part in self.parts)])
        self.read_seconds = np.zeros(1)
        """(1,) what gathering rows has taken so far; views of a set share it"""

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, rows: IntArray) -> tuple[IntArray, npt.NDArray[np.bool_], IntArray | None]:
        """`gather`, and count what it takes."""
        begun = time.perf_counter()
        found = self.gather(rows)
        self.read_seconds += time.perf_counter() - begun
        return found

    def gather(self, rows: IntArray) -> tuple[IntArray, npt.NDArray[np.bool_], IntArray | None]:
        """Pad rows, or with windows all windows of the rows, into `(B, L)` ids, mask and, for pairs, segment ids."""
        lengths = self.lengths[rows] if self.windows is None else split(self.lengths[rows], self.max_length)[1]
        mask = np.arange(int(lengths.max())) < lengths[:, None]
        ids = np.full(mask.shape, self.pad_token_id, dtype=np.int64)
        type_ids = None if all(part.type_ids is None for part in self.parts) else np.zeros(mask.shape, dtype=np.int64)
        owners = np.searchsorted(self.starts, rows, side="right") - 1
        place = 0
        for row, owner in zip(rows, owners, strict=True):
            part = self.parts[owner]
            first, end = part.offsets[row - self.starts[owner]], part.offsets[row - self.starts[owner] + 1]
            for start in range(first, max(end, first + 1), self.max_length):
                last = min(end, start + mask.shape[1])
                ids[place, : last - start] = part.ids[start:last]
                if type_ids is not None and part.type_ids is not None:
                    type_ids[place, : last - start] = part.type_ids[start:last]
                place += 1
        return ids, mask, type_ids

    def ids_of(self, row: int) -> IntArray:
        """The token ids of a row (L,), with windows those of all of them."""
        ids, mask, _ = self.gather(np.array([row]))
        return ids[mask]

    def place_of(self, row: int) -> dict[str, Any]:
        """Where a person finds a row: `shard`, the path of its file below the labelled set's root, and `row`, counted from 0 in it."""
        owner = int(np.searchsorted(self.starts, row, side="right")) - 1
        part = self.parts[owner]
        return {"shard": part.shard, "row": row if part.rows is None else int(part.rows[row - self.starts[owner]])}


def record_batches(paths: Sequence[str]) -> Iterator[tuple[str | None, pa.RecordBatch]]:
    """The record batches of tokenized files, memory-mapped, and the file that each one's rows come from, if that was kept."""
    for path in paths:
        table = pa.ipc.open_file(pa.memory_map(path))
        for number in range(table.num_record_batches):
            batch, said = table.get_batch_with_custom_metadata(number)
            yield said[SHARD_KEY].decode() if said is not None and SHARD_KEY in said else None, batch


def places_text(places: list[dict[str, Any]]) -> str:
    """Rows by the files that they are in; those of packed texts have none, and are numbers among all."""
    order = sorted(places, key=lambda one: (one["shard"] or "", one["row"]))
    shards = itertools.groupby(order, key=lambda one: one["shard"])
    return "; ".join(
        f"{f'{shard}: ' if shard else ''}{', '.join(str(one['row']) for one in ones)}" for shard, ones in shards
    )


class LabelledSet(TokenSet):
    """Rows with what is to be learned of them, which is in memory."""

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[str],
        task: Task,
        pad_token_id: int,
        max_length: int,
        windows: Windows | None = None,
    ) -> None:
        """`windows`: those in which rows of more than `max_length` tokens are laid out, if they are."""
        super().__init__(paths, pad_token_id, max_length, windows)
        targets, weights, hashes = [], [], []
        for _, batch in record_batches(paths):
            targets.append(encode_labels(batch.column("label"), labels, task))
            if "weight" in batch.schema.names:
                weights.append(batch.column("weight").to_numpy())
            if "hash" in batch.schema.names:
                hashes.append(batch.column("hash").to_numpy())
        self.targets: Targets = np.concatenate(targets)
        """(N,) class numbers as int64, (N, C) zeros and ones as uint8, (N,) numbers as float32, or what `mix` makes of several"""
        self.weights: npt.NDArray[np.float32] | None = np.concatenate(weights) if weights else None
        """(N,) how much each row counts, if the rows say so"""
        self.hashes: npt.NDArray[np.uint64] = np.concatenate([np.zeros(0, np.uint64), *hashes])
        """(N,) equal for equal texts"""

    @classmethod
    def mix(cls, sets: Sequence["LabelledSet"]) -> "LabelledSet":
        """Put the rows of several tasks' sets one after the other. Targets (N, 1 + C): a row's task, and what that task teaches.

        C is the most that a task needs for it.
        """
        found = cls.__new__(cls)
        first = sets[0]
        found.pad_token_id, found.max_length, found.windows = first.pad_token_id, first.max_length, first.windows
        found.parts = [part for one in sets for part in one.parts]
        found.lengths = np.concatenate([one.lengths for one in sets])
        found.starts = np.cumsum([0, *(len(part.offsets) - 1 for part in found.parts)])
        found.targets = np.zeros((len(found.lengths), 1 + max(one.targets[0].size for one in sets)), np.float32)
        found.weights = None
        if any(one.weights is not None for one in sets):
            weights = [np.ones(len(one), np.float32) if one.weights is None else one.weights for one in sets]
            found.weights = np.concatenate(weights)
        found.hashes = np.concatenate([one.hashes for one in sets])
        found.read_seconds = np.zeros(1)
        start = 0
        for number, one in enumerate(sets):
            rows = found.targets[start : start + len(one)]
            rows[:, 0] = number
            rows[:, 1 : 1 + one.targets[0].size] = one.targets.reshape(len(one), -1)
            start += len(one)
        return found


@dataclass(frozen=True)
class Selection:
    """Some rows of a set, in order."""

    data: TokenSet
    chosen: IntArray

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """(N,) tokens of each row."""
        return self.data.lengths[self.chosen]


@dataclass(frozen=True)
class Subset(Selection):
    """Some rows of a labelled set, in order: the whole set, or one side of a split."""

    data: LabelledSet

    @property
    def hashes(self) -> npt.NDArray[np.uint64]:
        """(N,) equal for equal texts."""
        return self.data.hashes[self.chosen]

    @property
    def targets(self) -> Targets:
        """(N,) class numbers, (N, C) zeros and ones, or (N,) numbers."""
        return self.data.targets[self.chosen]


def known_rows(learned: Subset, others: Mapping[str, Subset]) -> dict[str, int]:
    """How many rows of each other set have a text of the one that is learned from."""
    return {name: int(np.isin(one.hashes, learned.hashes).sum()) for name, one in others.items()}


def without_known(learned: Subset, others: Mapping[str, Subset]) -> Subset:
    """The rows of a set whose text is in none of the others."""
    hashes = np.concatenate([one.hashes for one in others.values()])
    return Subset(learned.data, learned.chosen[~np.isin(learned.hashes, hashes)])


def encode_labels(column: pa.Array, labels: Sequence[str], task: Task) -> Targets:
    """Turn label names into class numbers (N,), or for multi-label into zeros and ones (N, C); numbers stay what they are."""
    if task is Task.REGRESSION:
        numbers: npt.NDArray[np.float32] = column.to_numpy()
        return numbers
    known = pa.array(labels, pa.string())
    if task is not Task.MULTI_LABEL:
        return pc.index_in(column, known).to_numpy().astype(np.int64)
    hot = np.zeros((len(column), len(labels)), dtype=np.uint8)
    hot[pc.list_parent_indices(column).to_numpy(), pc.index_in(column.flatten(), known).to_numpy()] = 1
    return hot


def split_rows(targets: Targets, fraction: float, seed: int) -> tuple[IntArray, IntArray]:
    """Split rows into training and validation rows, the same for the same seed: by class, at random for multi-label and regression.

    Every class keeps at least one training row. Where all classes are too small for their share of a row, as many of them as there
    should be validation rows in all, one at least, give one. Both are sorted.
    """
    chance = np.random.default_rng([seed, len(targets)])
    groups = (
        [np.flatnonzero(targets == index) for index in np.unique(targets)]
        if targets.ndim == 1 and np.issubdtype(targets.dtype, np.integer)
        else [np.arange(len(targets))]
    )
    taken = [chance.permutation(group)[: min(round(len(group) * fraction), len(group) - 1)] for group in groups]
    if not any(map(len, taken)):
        groups = [group for group in groups if len(group) > 1]
        chosen = chance.permutation(len(groups))[: max(1, round(len(targets) * fraction))]
        taken = [chance.permutation(groups[index])[:1] for index in chosen] or taken
    valid = np.sort(np.concatenate(taken))
    return np.setdiff1d(np.arange(len(targets)), valid), valid


def map_set(
    folder: Store,
    files: Sequence[str],
    labels: Sequence[str],
    task: Task,
    pad_token_id: int,
    max_length: int,
    windows: Windows | None,
) -> LabelledSet:
    """Memory-map the files of one labelled set, brought to this machine first if they are not here."""
    return LabelledSet(local_paths(folder, files), labels, task, pad_token_id, max_length, windows)


def local_paths(folder: Store, files: Sequence[str]) -> list[str]:
    """Where the files of one set are on this machine, brought there first if they are not."""
    if folder.is_local:
        return [folder.full(name) for name in files]
    local = local_copy(folder)
    local.mkdir(parents=True, exist_ok=True, mode=0o700)
    with node_lock(local):
        for name in files:
            if not (local / name).is_file():
                temporary = local / f".{name}.tmp"
                with explained(f"{folder.url}/{name}", "read"):
                    folder.fs.get_file(folder.full(name), str(temporary))
                temporary.replace(local / name)
    return [str(local / name) for name in files]


def local_copy(folder: Store) -> Path:
    """Where this machine keeps its copy of a run's data."""
    return cache_folder("labelled") / hashlib.sha256(folder.url.encode()).hexdigest()[:24]


@contextlib.contextmanager
def node_lock(folder: Path) -> Iterator[None]:
    """One process of this machine at a time."""
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
