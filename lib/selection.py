"""Which rows to score again: what the dead letters in a folder name."""

import hashlib
import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lib.errors import UsageError
from lib.planning import STALE_NAME
from lib.storage import open_store


@dataclass(frozen=True)
class Selection:
    """Rows of an archive."""

    rows: dict[str, npt.NDArray[np.int64]]
    """row numbers, sorted, by shard"""
    outdated: int
    """dead letters left out because their shard is another one by now, or gone; the next usual run scores it whole"""

    @property
    def digest(self) -> str:
        """SHA-256 over all of it, in hex."""
        found = hashlib.sha256()
        for shard, rows in sorted(self.rows.items()):
            found.update(f"{len(shard)}:{shard}:{len(rows)}:".encode() + rows.tobytes())
        return found.hexdigest()

    @property
    def num_rows(self) -> int:
        """Rows of all shards."""
        return sum(len(rows) for rows in self.rows.values())


def read_selection(url: str, shards: pa.Table) -> Selection:
    """Read a folder of dead letters (columns shard and row) against the archive as listed (columns path, identity).

    Lines without a row stand for whole bad shards, which every usual run tries again: they are left out. Raises
    `UsageError` if the folder holds no dead letters, or none that still fits.
    """
    store = open_store(url)
    paths = [path for path in store.list()["path"].to_pylist() if path.endswith(".parquet")]
    if not paths:
        raise UsageError(
            f"input.rows {url}: no dead letters in it; expected <output.path>/<version>/_dead_letter of an earlier run"
        )
    identities = dict(zip(shards["path"].to_pylist(), shards["identity"].to_pylist(), strict=True))
    parts: dict[str, list[pa.ChunkedArray]] = {}
    outdated = 0
    for path in paths:
        table = pq.read_table(io.BytesIO(store.read(path) or b""))
        if not {"shard", "row"} <= set(table.column_names):
            raise UsageError(
                f"input.rows {url}/{path}: has the columns {table.column_names}, expected the dead letters' shard and row"
            )
        table = table.select(["shard", "row"]).filter(pc.is_valid(table["row"]))
        if not table.num_rows:
            continue
        written_for = pc.struct_field(pc.extract_regex(pa.array([path]), STALE_NAME), "identity")[0].as_py()
        for shard in table["shard"].unique().to_pylist():
            if shard not in identities or written_for not in (None, identities[shard]):
                outdated += pc.sum(pc.equal(table["shard"], shard)).as_py()
                continue
            parts.setdefault(shard, []).append(table.filter(pc.equal(table["shard"], shard))["row"])
    rows = {shard: np.unique(np.concatenate([part.to_numpy() for part in columns])) for shard, columns in parts.items()}
    if not rows:
        raise UsageError(
            f"input.rows {url}: none of its dead letters fits the archive as it is now ({outdated:,} are of shards that have"
            " changed since or are gone): the usual run scores those"
        )
    return Selection(rows, outdated)
