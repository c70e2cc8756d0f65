"""Scoring again: what is to be scored, what is set aside, the switch, and forgetting.

One rescore at a time. Its scorer is not published until the switch, so nothing of it shows before that. Plain
functions that run inside `Database.write` or `Database.read`; the first argument is the connection.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace

from condor_lite.game.entities import Leaderboard, Round
from condor_lite.game.scoring import Rules
from condor_lite.storage import calibration, scores
from condor_lite.storage.repositories import select_rounds

FORGOTTEN = "forgotten"  # the fingerprint of a scorer whose scores are being deleted, or are gone

_CHOICE = "rule_by_rescore"  # the key in `meta`

# Rounds of a rescore (:version, :from) that nothing has been decided about.
_LEFT = """
    status = 'scored' AND resolvable_at_s >= :from
    AND NOT EXISTS (SELECT 1 FROM round_score q
                    WHERE q.round_no = round.round_no AND q.scorer_version = :version)
    AND NOT EXISTS (SELECT 1 FROM left_out o
                    WHERE o.round_no = round.round_no AND o.scorer_version = :version)
"""
BEFORE_ALL = (-(2**62), 0)


@dataclass(frozen=True, slots=True)
class Pending:
    """A rescore that is under way, or was interrupted.

    Rounds with `resolvable_at >= since_s` are scored again. Those from `from_s` on lie in the longest window
    and must be decided about, too.
    """

    scorer_version: int
    rules: Rules
    fingerprint: str
    since_s: int
    from_s: int
    started_at_s: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """A scored round, and the scorer whose scores it has now; `rules` is None where they were not kept, or
    are those of an earlier version. `resolved`: how many segments that one found prices of.
    """

    round: Round
    has_payloads: bool
    resolved: int
    scorer_version: int
    rule: str
    target: str
    fingerprint: str
    rules: Rules | None


@dataclass(frozen=True, slots=True)
class Counts:
    """How a rescore stands, in rounds. `left_out`: by reason."""

    left: int
    scored: int
    carried: int
    left_out: dict[str, int]

    @property
    def done(self) -> int:
        return self.scored + self.carried + sum(self.left_out.values())


def dump_rules(rules: Rules) -> str:
    return json.dumps(asdict(rules), sort_keys=True)


def load_rules(text: str | None) -> Rules | None:
    """Rules as stored; None where they are not, or are a later version's."""
    if text is None:
        return None
    stored = json.loads(text)
    return Rules(**stored) if set(stored) == {field.name for field in fields(Rules)} else None


# Which rules are in force


def in_force(conn: sqlite3.Connection, configured: Rules) -> Rules:
    """The rules to score by: the config's, unless a rescore chose another rule after their last change.

    So what was said last counts: a rule chosen by a rescore outlives a restart, and ends when the host
    changes the config's rules.
    """
    row = conn.execute("SELECT value FROM meta WHERE key = ?", (_CHOICE,)).fetchone()
    if row is None:
        return configured
    choice = json.loads(row[0])
    return replace(configured, rule=choice["rule"]) if choice["config"] == asdict(configured) else configured


def _choose(conn: sqlite3.Connection, rules: Rules, configured: Rules) -> None:
    conn.execute("DELETE FROM meta WHERE key = ?", (_CHOICE,))
    if rules.rule != configured.rule:
        choice = json.dumps({"rule": rules.rule, "config": asdict(configured)})
        conn.execute("INSERT INTO meta (key, value) VALUES (?, ?)", (_CHOICE, choice))


# Beginning and going on


def begin(
    conn: sqlite3.Connection, rules: Rules, fingerprint: str, since_s: int, from_s: int, at_s: float
) -> Pending:
    """A new scorer, not published. The caller has made sure that no rescore is pending."""
    version = scores.add_scorer(
        conn, rules.rule, rules.target, fingerprint, at_s, dump_rules(rules), published=False
    )
    conn.execute(
        "INSERT INTO rescore (scorer_version, since_s, from_s, started_at_s) VALUES (?, ?, ?, ?)",
        (version, since_s, from_s, int(at_s)),
    )
    return Pending(version, rules, fingerprint, since_s, from_s, int(at_s))


def pending(conn: sqlite3.Connection) -> Pending | None:
    """The rescore that was begun and neither finished nor forgotten."""
    row = conn.execute(
        "SELECT scorer_version, rules, fingerprint, since_s, from_s, started_at_s, rule, target "
        "FROM rescore JOIN scorer USING (scorer_version)"
    ).fetchone()
    if row is None:
        return None
    version, rules, *rest, rule, target = row
    return Pending(version, load_rules(rules) or Rules(rule, target), *rest)


def newest_version(conn: sqlite3.Connection) -> int:
    """The scorer whose scores count; 0 where there is none yet."""
    (version,) = conn.execute(
        "SELECT coalesce(max(scorer_version), 0) FROM scorer WHERE published"
    ).fetchone()
    return int(version)


def oldest_payload_s(conn: sqlite3.Connection) -> int | None:
    """The `resolvable_at` of the oldest round whose answers are still stored."""
    (oldest_s,) = conn.execute("SELECT min(resolvable_at_s) FROM round WHERE has_payloads = 1").fetchone()
    return None if oldest_s is None else int(oldest_s)


def candidates(
    conn: sqlite3.Connection, version: int, from_s: int, after: tuple[int, int], limit: int
) -> list[Candidate]:
    """Scored rounds that nothing is decided about, the oldest first, behind `after` (resolvable_at, no)."""
    rounds = select_rounds(
        conn,
        f"{_LEFT} AND resolvable_at_s >= :at AND (resolvable_at_s, round_no) > (:at, :no) "
        "ORDER BY resolvable_at_s, round_no LIMIT :limit",
        {"version": version, "from": from_s, "at": after[0], "no": after[1], "limit": limit},
    )
    found = []
    for round_ in rounds:
        has_payloads, resolved, source, rule, target, fingerprint, rules = conn.execute(
            "SELECT has_payloads, resolved, s.scorer_version, s.rule, s.target, s.fingerprint, s.rules "
            "FROM round JOIN round_score q USING (round_no) "
            "JOIN scorer shown ON shown.scorer_version = q.scorer_version "
            "JOIN scorer s ON s.scorer_version = coalesce(q.carried_from, q.scorer_version) "
            "WHERE round_no = ? AND shown.published ORDER BY q.scorer_version DESC LIMIT 1",
            (round_.round_no,),
        ).fetchone()
        found.append(
            Candidate(
                round_, bool(has_payloads), resolved, source, rule, target, fingerprint, load_rules(rules)
            )
        )
    return found


def worthwhile(conn: sqlite3.Connection, target: str, since_s: int) -> tuple[int, int]:
    """Of the rounds scored since then: how many can be scored again, and how many were asked otherwise."""
    can, cannot = conn.execute(
        "SELECT count(*) FILTER (WHERE has_payloads AND target = ?), count(*) FILTER (WHERE target <> ?) "
        "FROM round CROSS JOIN round_score q USING (round_no) CROSS JOIN scorer USING (scorer_version) "
        "WHERE round.status = 'scored' AND resolvable_at_s >= ? AND scorer_version = ("
        "SELECT max(n.scorer_version) FROM round_score n JOIN scorer p USING (scorer_version) "
        "WHERE n.round_no = round.round_no AND p.published)",
        (target, target, since_s),
    ).fetchone()
    return int(can), int(cannot)


def counts(conn: sqlite3.Connection, version: int, from_s: int) -> Counts:
    (left,) = conn.execute(
        f"SELECT count(*) FROM round WHERE {_LEFT}",  # noqa: S608 - only constants
        {"version": version, "from": from_s},
    ).fetchone()
    done, carried = conn.execute(
        "SELECT count(*), count(carried_from) FROM round_score WHERE scorer_version = ?", (version,)
    ).fetchone()
    reasons = conn.execute(
        "SELECT reason, count(*) FROM left_out WHERE scorer_version = ? GROUP BY reason", (version,)
    )
    return Counts(int(left), int(done) - int(carried), int(carried), dict(reasons.fetchall()))


def payloads(conn: sqlite3.Connection, round_no: int) -> dict[int, bytes]:
    """By `model_no`, what was answered in time, compressed; also what was rejected then: other rules may
    accept it.
    """
    rows = conn.execute(
        "SELECT model_no, body FROM payload JOIN prediction USING (round_no, model_no) "
        "WHERE round_no = ? AND (status = 'SUCCESS' OR detail LIKE 'invalid: %') ORDER BY model_no",
        (round_no,),
    )
    return dict(rows.fetchall())


# Rounds that can't be scored again


def carry_over(conn: sqlite3.Connection, round_no: int, version: int) -> None:
    """Give a round the scores that it has, under this version too, marked with where they are from."""
    (newest,) = conn.execute(
        "SELECT max(scorer_version) FROM round_score JOIN scorer USING (scorer_version) "
        "WHERE round_no = ? AND published",
        (round_no,),
    ).fetchone()
    conn.execute(
        "INSERT INTO round_score (round_no, scorer_version, median, no_move, resolved, scored_at_ms, "
        "carried_from) SELECT round_no, ?, median, no_move, resolved, scored_at_ms, "
        "coalesce(carried_from, scorer_version) FROM round_score WHERE round_no = ? AND scorer_version = ? "
        "ON CONFLICT (round_no, scorer_version) DO NOTHING",
        (version, round_no, newest),
    )
    conn.execute(
        "INSERT INTO score (round_no, scorer_version, model_no, raw, counted, score, detail) "
        "SELECT round_no, ?, model_no, raw, counted, score, detail FROM score "
        "WHERE round_no = ? AND scorer_version = ? "
        "ON CONFLICT (round_no, scorer_version, model_no) DO NOTHING",
        (version, round_no, newest),
    )

    calibration.carry_over(conn, round_no, newest, version)


def leave_out(conn: sqlite3.Connection, round_no: int, version: int, reason: str) -> None:
    """Note that a round has no scores under this version; those it has stay."""
    conn.execute(
        "INSERT INTO left_out (round_no, scorer_version, reason) VALUES (?, ?, ?) "
        "ON CONFLICT (round_no, scorer_version) DO NOTHING",
        (round_no, version, reason),
    )


def set_aside(
    conn: sqlite3.Connection, version: int, carried: Iterable[int], left_out: Iterable[tuple[int, str]]
) -> None:
    """`carry_over` and `leave_out` some rounds (`round_no`)."""
    for round_no in carried:
        carry_over(conn, round_no, version)
    for round_no, reason in left_out:
        leave_out(conn, round_no, version, reason)


# Ends


def switch(conn: sqlite3.Connection, job: Pending, configured: Rules, leaderboard: Leaderboard) -> bool:
    """Publish the new scores and their leaderboard. False, and nothing written, if a round is still left."""
    left = conn.execute(
        f"SELECT 1 FROM round WHERE {_LEFT} LIMIT 1",  # noqa: S608 - only constants
        {"version": job.scorer_version, "from": job.from_s},
    ).fetchone()
    if left is not None:
        return False
    conn.execute("UPDATE scorer SET published = 1 WHERE scorer_version = ?", (job.scorer_version,))
    conn.execute("DELETE FROM rescore WHERE scorer_version = ?", (job.scorer_version,))
    _choose(conn, job.rules, configured)
    scores.save_leaderboard(conn, leaderboard, True)
    return True


def begin_to_forget(conn: sqlite3.Connection, version: int) -> None:
    """From here on it can't be resumed: what is left of it is no whole."""
    conn.execute(
        "UPDATE scorer SET fingerprint = ? WHERE scorer_version = ? AND NOT published", (FORGOTTEN, version)
    )


def forget_some(conn: sqlite3.Connection, version: int, after_no: int, rounds: int) -> int | None:
    """Delete the unpublished scores of some rounds above `after_no`; the last one's number.

    None when all are gone; the rescore itself is gone then, too. Its version is not given out again.
    """
    found = conn.execute(
        "SELECT round_no FROM round_score WHERE round_no > ? AND scorer_version = ? "
        "AND scorer_version IN (SELECT scorer_version FROM scorer WHERE NOT published) "
        "ORDER BY round_no LIMIT ?",
        (after_no, version, rounds),
    ).fetchall()
    for (round_no,) in found:
        conn.execute("DELETE FROM score WHERE round_no = ? AND scorer_version = ?", (round_no, version))
        conn.execute("DELETE FROM round_score WHERE round_no = ? AND scorer_version = ?", (round_no, version))
    if found:
        return int(found[-1][0])
    sums = conn.execute(
        "SELECT DISTINCT asset, horizon_s, step_s, model_no FROM calibration WHERE scorer_version = ? "
        "AND scorer_version IN (SELECT scorer_version FROM scorer WHERE NOT published) LIMIT ?",
        (version, rounds),
    ).fetchall()
    conn.executemany(
        "DELETE FROM calibration "
        "WHERE scorer_version = ? AND asset = ? AND horizon_s = ? AND step_s = ? AND model_no = ?",
        ((version, *key) for key in sums),
    )
    if sums:
        return after_no
    conn.execute("DELETE FROM left_out WHERE scorer_version = ?", (version,))
    conn.execute("DELETE FROM rescore WHERE scorer_version = ?", (version,))
    return None


# What the windows are made of


def mixture(conn: sqlite3.Connection, version: int, since_s: float) -> tuple[tuple[int, ...], int]:
    """Of the rounds scored since then: whose scores are carried over into `version`, and how many have none.

    The first are other scorers' versions; the second are rounds that only other scorers have scored.
    """
    carried = conn.execute(
        "SELECT DISTINCT carried_from FROM round_score JOIN round USING (round_no) "
        "WHERE scorer_version = ? AND carried_from IS NOT NULL AND resolvable_at_s >= ? ORDER BY 1",
        (version, since_s),
    ).fetchall()
    (without,) = conn.execute(
        "SELECT count(*) FROM round WHERE status = 'scored' AND resolvable_at_s >= ? "
        "AND NOT EXISTS (SELECT 1 FROM round_score q "
        "WHERE q.round_no = round.round_no AND q.scorer_version = ?)",
        (since_s, version),
    ).fetchone()
    return tuple(int(row[0]) for row in carried), int(without)
