"""Trials of size: more than 2 GiB of text in one row group, read in bounded memory. `make trials` runs them."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.reading import READ_BATCH_BYTES
from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.trial, pytest.mark.timeout(3_600)]


MEASURED_READING = """
import sys
import pyarrow as pa
from tests.unit.test_archive import GOOD, MB, TEXT, open_store, plan, read_rows
store = open_store(sys.argv[1])
chunks = plan(store, "x.parquet", TEXT, 64 * MB)
good, sizes = 0, []
for _, rows in read_rows(store, chunks, TEXT, 64 * MB):
    good += int((rows.errors == GOOD).sum())
    sizes.append(rows.size)
print(good, sum(sizes), max(sizes), pa.default_memory_pool().max_memory())
"""


@pytest.mark.parametrize("dictionary", [False, True])
def test_a_row_group_with_more_than_two_gib_of_text_is_read_in_bounded_memory(dictionary: bool, tmp_path: Path) -> None:
    schema = pa.schema([("text", pa.large_string())])
    # A page is decompressed whole: with PyArrow's batches of 1,024 rows these texts make pages of 1 GB, and 2 GB of memory.
    rows = 2_500
    unit = "y" * 999_990
    texts = [unit if dictionary else f"{unit}{number:010d}" for number in range(rows)]
    with pq.ParquetWriter(
        tmp_path / "x.parquet", schema, compression="zstd", use_dictionary=dictionary, write_batch_size=1
    ) as writer:
        writer.write_table(pa.table({"text": texts}, schema=schema), row_group_size=rows)
    assert pq.read_metadata(tmp_path / "x.parquet").num_row_groups == 1
    done = subprocess.run(
        [sys.executable, "-c", MEASURED_READING, str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    good, text_bytes, largest_batch, most_memory = map(int, done.stdout.split())
    print(f"\n{most_memory / 2**20:.0f} MB of Arrow memory at most")
    assert good == rows, "a row that cannot be decoded keeps its place, with an error"
    assert text_bytes == sum(map(len, texts)) > 2**31
    assert largest_batch <= READ_BATCH_BYTES
    assert most_memory < 2**30
