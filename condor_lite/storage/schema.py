"""The tables, and the migrations that lead to them. Units are in the names; times are UTC.

`round_no` and `model_no` stand for `round_id` and `model_id` in the narrow tables: they keep a prediction at
well under 250 bytes once its payload is pruned.
"""

from __future__ import annotations

# One script a schema version; `PRAGMA user_version` counts those applied. Never edit one that was released.
MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE meta (
        key   TEXT PRIMARY KEY,
        value TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE price (
        asset          TEXT NOT NULL,
        ts_s           INTEGER NOT NULL,
        price          REAL NOT NULL CHECK (price > 0 AND price < 9e999),
        source         TEXT NOT NULL,
        ingested_at_ms INTEGER NOT NULL,
        PRIMARY KEY (asset, ts_s)
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE model (
        model_no         INTEGER PRIMARY KEY,
        model_id         TEXT NOT NULL UNIQUE,
        model_name       TEXT NOT NULL,
        cruncher_id      TEXT NOT NULL,
        cruncher_name    TEXT NOT NULL,
        deployment_id    TEXT NOT NULL,
        code_hash        TEXT,
        benchmark        INTEGER NOT NULL CHECK (benchmark IN (0, 1)),
        joined_at_s      INTEGER NOT NULL,
        last_seen_at_s   INTEGER NOT NULL,
        first_round_at_s INTEGER
    ) STRICT;

    CREATE TABLE deployment (
        model_no      INTEGER NOT NULL REFERENCES model,
        deployment_id TEXT NOT NULL,
        code_hash     TEXT,
        first_seen_at_s INTEGER NOT NULL,
        PRIMARY KEY (model_no, deployment_id)
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE round (
        round_no        INTEGER PRIMARY KEY,
        asset           TEXT NOT NULL,
        horizon_s       INTEGER NOT NULL CHECK (horizon_s > 0),
        step_s          INTEGER NOT NULL CHECK (step_s > 0),
        scheduled_at_s  INTEGER NOT NULL,
        resolvable_at_s INTEGER NOT NULL,
        performed_at_ms INTEGER,
        status          TEXT NOT NULL
                        CHECK (status IN ('open', 'closed', 'scored', 'void', 'missed', 'skipped')),
        reason          TEXT,
        validated       INTEGER NOT NULL DEFAULT 0 CHECK (validated IN (0, 1)),
        answered        INTEGER NOT NULL DEFAULT 0,
        failed          INTEGER NOT NULL DEFAULT 0,
        timed_out       INTEGER NOT NULL DEFAULT 0,
        absent          INTEGER NOT NULL DEFAULT 0,
        absent_models   TEXT NOT NULL DEFAULT '[]',
        has_payloads    INTEGER NOT NULL DEFAULT 0 CHECK (has_payloads IN (0, 1)),
        UNIQUE (asset, horizon_s, step_s, scheduled_at_s)
    ) STRICT;
    CREATE INDEX round_by_time ON round (scheduled_at_s);
    CREATE INDEX round_by_status ON round (status, resolvable_at_s);
    CREATE INDEX round_with_payloads ON round (resolvable_at_s) WHERE has_payloads = 1;

    CREATE TABLE prediction (
        round_no       INTEGER NOT NULL REFERENCES round,
        model_no       INTEGER NOT NULL REFERENCES model,
        status         TEXT NOT NULL CHECK (status IN ('SUCCESS', 'FAILED', 'TIMEOUT')),
        detail         TEXT,
        received_at_ms INTEGER NOT NULL,
        exec_time_us   INTEGER NOT NULL,
        PRIMARY KEY (round_no, model_no)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX prediction_by_model ON prediction (model_no, round_no);

    CREATE TABLE payload (
        payload_no INTEGER PRIMARY KEY,
        round_no   INTEGER NOT NULL REFERENCES round,
        model_no   INTEGER NOT NULL REFERENCES model,
        body       BLOB NOT NULL,
        UNIQUE (round_no, model_no)
    ) STRICT;

    CREATE TABLE scorer (
        scorer_version INTEGER PRIMARY KEY,
        rule           TEXT NOT NULL,
        target         TEXT NOT NULL,
        fingerprint    TEXT NOT NULL,
        created_at_s   INTEGER NOT NULL
    ) STRICT;

    CREATE TABLE round_score (
        round_no       INTEGER NOT NULL REFERENCES round,
        scorer_version INTEGER NOT NULL REFERENCES scorer,
        median         REAL NOT NULL,
        no_move        REAL NOT NULL,
        resolved       INTEGER NOT NULL,
        scored_at_ms   INTEGER NOT NULL,
        PRIMARY KEY (round_no, scorer_version)
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE score (
        round_no       INTEGER NOT NULL,
        scorer_version INTEGER NOT NULL,
        model_no       INTEGER NOT NULL REFERENCES model,
        raw            REAL CHECK (raw > -9e999 AND raw < 9e999),
        counted        REAL NOT NULL CHECK (counted > -9e999 AND counted < 9e999),
        score          REAL NOT NULL CHECK (score > -9e999 AND score < 9e999),
        PRIMARY KEY (round_no, scorer_version, model_no),
        FOREIGN KEY (round_no, scorer_version) REFERENCES round_score
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE leaderboard (
        created_at_s   INTEGER NOT NULL,
        model_no       INTEGER NOT NULL REFERENCES model,
        scorer_version INTEGER NOT NULL REFERENCES scorer,
        rank           INTEGER,
        score_recent   REAL,
        score_steady   REAL,
        score_anchor   REAL,
        PRIMARY KEY (model_no, created_at_s)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX leaderboard_by_time ON leaderboard (created_at_s);

    CREATE TABLE snapshot (
        created_at_s   INTEGER NOT NULL,
        model_no       INTEGER NOT NULL REFERENCES model,
        scorer_version INTEGER NOT NULL REFERENCES scorer,
        asset          TEXT NOT NULL,
        horizon_s      INTEGER NOT NULL,
        step_s         INTEGER NOT NULL,
        score_recent   REAL,
        score_steady   REAL,
        score_anchor   REAL,
        PRIMARY KEY (model_no, created_at_s, asset, horizon_s, step_s)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX snapshot_by_time ON snapshot (created_at_s);
    """,
    # By id, not number: a local model can be paused before it has ever run.
    """
    CREATE TABLE pause (
        model_id TEXT PRIMARY KEY,
        since_s  INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    """,
    # Scoring again: a scorer counts once it is published. `rules` has all that its scores depend on, in JSON
    # (null: from before that was kept); `carried_from` the scorer whose scores a round was given unchanged;
    # `score.detail` why an answer is none under this scorer. `rescore` has the one that is under way.
    """
    ALTER TABLE scorer ADD COLUMN rules TEXT;
    ALTER TABLE scorer ADD COLUMN published INTEGER NOT NULL DEFAULT 1 CHECK (published IN (0, 1));
    ALTER TABLE round_score ADD COLUMN carried_from INTEGER;
    ALTER TABLE score ADD COLUMN detail TEXT;
    CREATE INDEX round_score_carried ON round_score (scorer_version) WHERE carried_from IS NOT NULL;

    CREATE TABLE rescore (
        scorer_version INTEGER PRIMARY KEY REFERENCES scorer,
        since_s        INTEGER NOT NULL,
        from_s         INTEGER NOT NULL,
        started_at_s   INTEGER NOT NULL
    ) STRICT;

    CREATE TABLE left_out (
        round_no       INTEGER NOT NULL REFERENCES round,
        scorer_version INTEGER NOT NULL REFERENCES scorer,
        reason         TEXT NOT NULL,
        PRIMARY KEY (round_no, scorer_version)
    ) STRICT, WITHOUT ROWID;
    """,
    # `hour_s`: the full hour of the rounds' `resolvable_at`. `times`: distinct segment times, counted up to
    # `until_s`. `spread`: the sum of E|X - X'| in bp, NULL where infinite. `bins`: 20 doubles, the histogram.
    """
    CREATE TABLE calibration (
        scorer_version INTEGER NOT NULL REFERENCES scorer,
        asset          TEXT NOT NULL,
        horizon_s      INTEGER NOT NULL,
        step_s         INTEGER NOT NULL,
        model_no       INTEGER NOT NULL REFERENCES model,
        hour_s         INTEGER NOT NULL,
        times          INTEGER NOT NULL,
        until_s        INTEGER NOT NULL,
        segments       INTEGER NOT NULL,
        pit            REAL NOT NULL CHECK (pit >= 0 AND pit < 9e999),
        spread         REAL CHECK (spread >= 0 AND spread < 9e999),
        bins           BLOB NOT NULL CHECK (length(bins) = 160),
        PRIMARY KEY (scorer_version, asset, horizon_s, step_s, model_no, hour_s)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX calibration_by_time ON calibration (hour_s);
    """,
    # No table changes: payloads are compressed against a dictionary, which older code can't read.
    """
    """,
    # Nor here: the digits of a payload are compressed apart from the rest.
    """
    """,
    # The leaderboard's sums of past hours: made from the scores, and made again where they differ from them.
    # `benchmark`: the model that skill is measured against. `sums`: `models` numbers, then columns of doubles
    # and floats (`hours.py`).
    """
    CREATE TABLE hour_sum (
        hour_s         INTEGER NOT NULL,
        scorer_version INTEGER NOT NULL REFERENCES scorer,
        asset          TEXT NOT NULL,
        horizon_s      INTEGER NOT NULL,
        step_s         INTEGER NOT NULL,
        rounds         INTEGER NOT NULL,
        benchmark      INTEGER,
        models         INTEGER NOT NULL,
        sums           BLOB NOT NULL,
        UNIQUE (hour_s, scorer_version, asset, horizon_s, step_s)
    ) STRICT;
    """,
)
