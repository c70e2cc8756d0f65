"""Files of every earlier schema, as `sqlite3 FILE .dump` shows them, are opened with all that is in them."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from condor_lite.errors import StorageError
from condor_lite.storage import compression, connection, repositories, scores
from condor_lite.storage.connection import connect_writer, migrate
from condor_lite.storage.database import Database
from condor_lite.storage.schema import MIGRATIONS

DATA = Path(__file__).with_name("data")
EARLIER = range(1, len(MIGRATIONS))
Rows = dict[str, list[tuple[Any, ...]]]


def earlier(path: Path, version: int) -> Rows:
    """Make the file; all that is in it, by table and columns."""
    with closing(sqlite3.connect(path)) as conn:
        conn.executescript((DATA / f"schema_{version}.sql").read_text())
        conn.execute("PRAGMA journal_mode = WAL")
        tables = [name for (name,) in conn.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        found = {}
        for table in tables:
            columns = ", ".join(row[1] for row in conn.execute(f"PRAGMA table_info({table})"))
            select = f"SELECT {columns} FROM {table} ORDER BY {columns}"
            found[select] = conn.execute(select).fetchall()
    assert all(found.values())
    return found


def schema(conn: sqlite3.Connection) -> list[tuple[str, str]]:
    rows = conn.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name")
    return [(name, re.sub(r'[\s"]+', "", sql)) for name, sql in rows]


def test_there_is_a_file_of_every_earlier_schema() -> None:
    assert {path.name for path in DATA.glob("schema_*.sql")} == {f"schema_{n}.sql" for n in EARLIER}


@pytest.mark.anyio
@pytest.mark.parametrize("version", EARLIER)
async def test_an_earlier_file_is_upgraded_with_its_content(tmp_path: Path, version: int) -> None:
    path = tmp_path / "condor.db"
    before = earlier(path, version)
    async with Database(path) as db:
        assert await db.read(repositories.load_clock) == 1_700_003_000.5
        models = await db.read(repositories.load_models)
        assert [model.info.model_name for model in models] == ["Modèle 1", "Modèle 2"]
        payloads = await db.read(repositories.payloads, 1)
        (waiting,) = await db.read(scores.rounds_to_settle, 2.0**40, 10)
        rows = await db.read(scores.load_window_rows, 1, 1_700_000_000, 1_800_000_000)
    assert {no: compression.decompress(body)[:10] for no, body in payloads.items()} == {
        1: b'[{"step": ',
        2: b'[{"step": ',
    }
    assert waiting.round_no == 5
    assert list(rows.counted) == [0.5, 1.0, 0.5, 1.25]
    with closing(sqlite3.connect(path)) as upgraded, closing(sqlite3.connect(":memory:")) as new:
        assert {select: upgraded.execute(select).fetchall() for select in before} == before
        assert upgraded.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert not upgraded.execute("PRAGMA foreign_key_check").fetchall()
        migrate(new, Path(":memory:"))
        assert schema(upgraded) == schema(new)


@pytest.mark.parametrize("version", EARLIER)
def test_an_upgrade_that_fails_half_way_leaves_the_file_as_it_was(
    tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "condor.db"
    before = earlier(path, version)
    content = path.read_bytes()
    half = (
        "CREATE TABLE more (a INTEGER) STRICT; DELETE FROM score; INSERT INTO more VALUES ('not a number');"
    )
    broken = (*MIGRATIONS, half)
    monkeypatch.setattr(connection.migrate, "__defaults__", (broken,))
    with pytest.raises(StorageError, match=f"from schema {version} to {len(broken)} .* it is unchanged"):
        connect_writer(path, 1.0)
    assert path.read_bytes() == content
    assert not [file for file in tmp_path.iterdir() if file != path and file.stat().st_size]
    monkeypatch.undo()
    with closing(connect_writer(path, 1.0)) as conn:
        assert {select: conn.execute(select).fetchall() for select in before} == before


def test_the_dictionaries_of_stored_payloads_never_change() -> None:
    hashes = [hashlib.sha256(one).hexdigest()[:32] for one in (compression._DICTIONARY, compression._FRAME)]
    assert hashes == ["599a5589007c590171f986c03a4d23c8", "cffe940aed223a4d08df9059d188b54d"]


@pytest.mark.parametrize("size", [0, 1, 500, 20_000, 2_000_000])
def test_payloads_are_read_as_they_were_sent(size: int) -> None:
    payload = (b'{"step": 60, "type": "builtin", "name": "norm", "params": ' * (1 + size // 50))[:size]
    for body in (compression.compress(payload), zstandard.ZstdCompressor(level=3).compress(payload)):
        assert compression.decompress(body) == payload
        assert compression.whole_bytes(body) == size


@given(
    parts=st.lists(
        st.one_of(
            st.binary(max_size=20),
            st.integers().map(lambda number: str(number).encode()),
            st.floats().map(lambda number: json.dumps(number).encode()),
            st.text("0123456789", max_size=600).map(str.encode),
        )
    ),
    times=st.sampled_from([1, 300]),
)
def test_whatever_is_sent_is_read_as_it_was(parts: list[bytes], times: int) -> None:
    payload = b" ".join(parts) * times
    body = compression.compress(payload)
    assert compression.decompress(body) == payload
    assert compression.whole_bytes(body) == len(payload)
