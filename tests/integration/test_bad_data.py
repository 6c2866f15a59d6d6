"""`jobs.score` on the worst that an archive can hold: a bad row costs a row, a bad shard a shard, and nothing escapes."""

import contextlib
import http.client
import io
import pickle
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data._internal.tensor_extensions.arrow import ArrowVariableShapedTensorType

from jobs.demo_store import LoopbackS3
from lib.schema import DEAD_LETTER_SCHEMA, DEAD_LETTER_TEXT
from lib.storage import Store, open_store
from tests import fakes
from tests.integration.test_scoring import read_json, read_predictions, run_score
from tests.unit.test_archive import damaged, encrypted, read_all

pytestmark = pytest.mark.usefixtures("ray_session")

TOLERANT = ("limits.max_bad_rows=1.0", "limits.max_bad_shards=1.0")


def report(output: str) -> Any:
    store = open_store(output)
    return read_json(store, f"{read_json(store, '_published.json')['version']}/_runs/run/run.json")


def objects(store: Store) -> list[str]:
    """Names of all objects with predictions."""
    return [path for path in store.list()["path"].to_pylist() if "-of-" in path and "/_dead_letter/" not in path]


class Exploit:
    """What unpickling makes of it is a call."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


def extension(name: str, storage: pa.Array, metadata: bytes) -> pa.Table:
    """Texts beside a column that claims to be of an extension type, as another program's Parquet file would."""
    marks = {b"ARROW:extension:name": name.encode(), b"ARROW:extension:metadata": metadata}
    fields = [pa.field("text", pa.string()), pa.field("data", storage.type, metadata=marks)]
    return pa.Table.from_arrays([pa.array(["good"] * len(storage)), storage], schema=pa.schema(fields))


def test_every_bad_shard_costs_itself_and_every_object_has_one_schema(classifier: str, tmp_path: Path) -> None:
    archive, output = str(tmp_path / "archive"), str(tmp_path / "scores")
    content, _ = damaged()
    empty = pa.table({"text": pa.array([], pa.string()), "id": pa.array([], pa.int64())})
    bad: dict[str, pa.Table | bytes] = {
        "z-bad/nothing.parquet": b"",
        "z-bad/cut.parquet": content[:-20],
        "z-bad/half.parquet": content[: len(content) // 2],
        "z-bad/other.parquet": b"id,text\n1,not Parquet\n" * 100,
        "z-bad/schema.parquet": pa.table({"txt": ["a"], "id": [1]}),
        "z-bad/numbers.parquet": pa.table({"text": [1], "id": [1]}),
        "z-bad/lists.parquet": pa.table({"text": [["a"]], "id": [1]}),
        "z-bad/encrypted.parquet": encrypted(plaintext_footer=False),
        "z-bad/signed.parquet": encrypted(plaintext_footer=True),
        "z-bad/twice.parquet": pa.table({"text": ["a"], "id": [1]}).append_column("text", pa.array(["b"])),
        "z-bad/key.parquet": pa.table({"text": ["a"], "id": ["one"]}),
    }
    good: dict[str, pa.Table | bytes] = {
        "plain.parquet": pa.table({"text": ["a", None, " "], "id": [0, 1, 2]}),
        "large.parquet": pa.table({"text": pa.array(["b"], pa.large_string()), "id": pa.array([3], pa.int32())}),
        "view.parquet": pa.table({"text": pa.array(["b"], pa.string_view()), "id": [3]}),
        "codes.parquet": pa.table({"text": pa.array(["c", "c"]).dictionary_encode(), "id": [4, 5]}),
        "nulls.parquet": pa.table({"text": pa.nulls(2), "id": pa.nulls(2)}),
        "empty.parquet": empty,
        "groupless.parquet": fakes.to_parquet(empty),
        "nested.parquet": pa.table({"text": ["d"], "id": [6], "deep": [{"text": [{"x": "y"}]}]}),
        "damaged.parquet": content,
    }
    fakes.write_archive(archive, good | bad)
    run_score(archive, classifier, output, 'input.key_columns=["id"]', "planning.chunk_mb=0.002", *TOLERANT)

    record = report(output)
    assert set(record["bad_shards"]) == set(bad)
    assert (record["exit_code"], record["missing_objects"], record["changed_shards"]) == (0, [], [])
    assert record["this_run"]["rows"] == record["this_run"]["rows_planned"] == 410
    assert record["this_run"]["errors"] == {"unreadable": 100, "null": 3, "empty": 1}
    store = open_store(output)
    found = {name: pq.read_table(io.BytesIO(store.read(name) or b"")) for name in objects(store)}
    assert {name.partition("/")[2].partition("-")[0] for name in found} == set(good)
    schemas = {str(table.schema.remove_metadata()) for table in found.values()}
    assert len(schemas) == 1, schemas
    version = read_json(store, "_published.json")["version"]
    letters = store.list(f"{version}/_dead_letter")["path"].to_pylist()
    assert {str(pq.read_schema(io.BytesIO(store.read(path) or b"")).remove_metadata()) for path in letters} == {
        str(DEAD_LETTER_SCHEMA)
    }
    rows = read_predictions(output).to_pylist()
    assert all((row["label"] is None) == (row["error"] is not None) for row in rows)
    unreadable = [row for row in rows if row["error"] == "unreadable"]
    assert [row["id"] for row in unreadable] == [None] * 100


def test_a_shard_that_carries_a_pickle_is_refused_or_scored_and_never_run(classifier: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    attack = pickle.dumps(Exploit(canary))
    blobs = pa.array([attack, attack], pa.large_binary())
    object_name = "ray.data.arrow_pickled_object"
    attacks: dict[str, pa.Table | bytes] = {
        "object.parquet": extension(object_name, blobs, b""),
        "metadata.parquet": extension(object_name, blobs, attack),
        "tensor.parquet": extension("ray.data.arrow_tensor", pa.array([[1.0], [2.0]]), attack),
        "shaped.parquet": extension("ray.data.arrow_variable_shaped_tensor", pa.array([[1.0], [2.0]]), attack),
        "nested.parquet": extension(object_name, pa.array([[attack], [attack]], pa.list_(pa.large_binary())), attack),
        "python.parquet": extension("arrow.py_extension_type", blobs, attack),
    }
    good: dict[str, pa.Table | bytes] = {"a-good.parquet": pa.table({"text": ["fine"], "data": [b"k"]})}
    archive, output = str(tmp_path / "archive"), str(tmp_path / "scores")
    fakes.write_archive(archive, good | attacks)
    for keys in ([], ['input.key_columns=["data"]']):
        run_score(archive, classifier, output, *keys, *TOLERANT)
        rows = read_predictions(output)
        refused = set(report(output)["bad_shards"])
        assert rows.num_rows == 1 + 2 * len(attacks.keys() - refused)
        assert keys or not refused, "a column that is not read costs nothing"
        assert not canary.exists()
    pickle.loads(attack)
    assert canary.exists(), "the attack must work where nothing stops it"


def test_a_column_of_one_of_rays_types_is_not_shown_to_ray(tmp_path: Path) -> None:
    with contextlib.suppress(pa.ArrowKeyError):  # registered already: whether it is depends on what ran before
        pa.register_extension_type(ArrowVariableShapedTensorType(pa.int64(), 0))
    table = extension("ray.data.arrow_variable_shaped_tensor", pa.array([[1.0], [2.0]]), b"no JSON")
    fakes.write_archive(str(tmp_path), {"x.parquet": table})
    with pytest.raises(TypeError):
        pq.read_schema(tmp_path / "x.parquet")
    assert read_all(open_store(str(tmp_path)), "x.parquet").texts == (["good", "good"],)


def test_texts_stand_in_dead_letters_if_they_are_asked_for(classifier: str, tmp_path: Path) -> None:
    archive, output = str(tmp_path / "archive"), str(tmp_path / "scores")
    texts = pa.array([b"good", None, b" \t", b"caf\xc3\xa9 \xff\xfe", b"\xed\xa0\x80x"], pa.binary())
    content, _ = damaged()
    shards: dict[str, pa.Table | bytes] = {
        "one.parquet": pa.table({"text": texts}),
        "two.parquet": pa.table({"text": pa.array(["", "b"]).dictionary_encode()}),
        "three.parquet": content,
    }
    fakes.write_archive(archive, shards)
    run_score(archive, classifier, output, "output.dead_letter_text=true", *TOLERANT)
    store = open_store(output)
    version = read_json(store, "_published.json")["version"]
    paths = store.list(f"{version}/_dead_letter")["path"].to_pylist()
    letters = pa.concat_tables(pq.read_table(io.BytesIO(store.read(path) or b"")) for path in paths)
    assert letters.schema.remove_metadata() == DEAD_LETTER_SCHEMA.append(DEAD_LETTER_TEXT)
    expected = {
        ("one.parquet", 1, "null", None),
        ("one.parquet", 2, "empty", " \t"),
        ("one.parquet", 3, "undecodable", "café \\xff\\xfe"),
        ("one.parquet", 4, "undecodable", "\\xed\\xa0\\x80x"),
        ("two.parquet", 0, "empty", ""),
        *(("three.parquet", row, "unreadable", None) for row in range(200, 300)),
    }
    assert {tuple(row.values()) for row in letters.to_pylist()} == expected
    assert "text" not in read_predictions(output).column_names


REFUSED, LEFT_OUT, SCORED = "refused", "left out", "scored"

NAMES = {
    "../x.parquet": LEFT_OUT,
    "../../x.parquet": LEFT_OUT,
    "sub/../../x.parquet": LEFT_OUT,
    "./c.parquet": LEFT_OUT,
    "a//b.parquet": REFUSED,
    "/absolute.parquet": REFUSED,
    "nul\0byte.parquet": REFUSED,
    "a/b.parquet": SCORED,
    "tab\tbed.parquet": SCORED,
    "back\\slash\\..\\x.parquet": SCORED,
    "C:\\x.parquet": SCORED,
    "%2e%2e%2fx.parquet": SCORED,
    "ünï ☃ +&?#=.parquet": SCORED,
}


def put_raw(s3: LoopbackS3, bucket: str, key: str, content: bytes) -> None:
    """Create an object as a hostile client would: every other one removes dots from the address."""
    connection = http.client.HTTPConnection(urlsplit(s3.url).netloc, timeout=30)
    scope = "Credential=loopback/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
    connection.request("PUT", quote(f"/{bucket}/{key}"), content, {"Authorization": f"AWS4-HMAC-SHA256 {scope}"})
    assert connection.getresponse().status == 200, key
    connection.close()


def test_no_name_in_an_archive_leads_out_of_the_output(s3: LoopbackS3, classifier: str, tmp_path: Path) -> None:
    bucket = s3.bucket()
    content = fakes.to_parquet(pa.table({"text": ["a", "b"]}))
    for name in NAMES:
        put_raw(s3, bucket.removeprefix("s3://"), f"archive/{name}", content)
    assert set(open_store(f"{bucket}/archive").list()["path"].to_pylist()) == set(NAMES), "the store must hold them"
    output = tmp_path / "deep" / "er" / "scores"
    before = files_below(tmp_path)
    run_score(f"{bucket}/archive", classifier, str(output), *TOLERANT)

    assert [path for path in files_below(tmp_path) - before if not path.is_relative_to(output)] == []
    record = report(str(output))
    assert set(record["bad_shards"]) == {name for name, fate in NAMES.items() if fate == REFUSED}
    assert all("cannot be the name of a file" in why for why in record["bad_shards"].values())
    expected = {name for name, fate in NAMES.items() if fate == SCORED}
    rows = read_predictions(str(output)).to_pylist()
    assert sorted((row["shard"], row["row"]) for row in rows) == sorted(
        (name, row) for name in expected for row in (0, 1)
    )


def test_line_breaks_in_names_stay_in_names(s3: LoopbackS3, classifier: str, tmp_path: Path) -> None:
    # From a local archive: moto, unlike S3, takes no line break in a key.
    names = ["two\nlines.parquet", "re\rturn.parquet", "fold\ner/x.parquet"]
    archive, output = str(tmp_path / "archive"), str(tmp_path / "scores")
    fakes.write_archive(archive, dict.fromkeys(names, pa.table({"text": ["a"]})))
    run_score(archive, classifier, output)
    assert sorted(read_predictions(output)["shard"].to_pylist()) == sorted(names)


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}
