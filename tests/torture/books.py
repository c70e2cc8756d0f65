"""What must hold after each fault, checked on the file of a running game and on what it publishes.

Everything here is computed anew from rows, by README's paragraph "What is on disk when" and by SCORING.md's
formulas; nothing is taken from condor_lite.
"""

from __future__ import annotations

import itertools
import shutil
import sqlite3
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from copy import copy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from tests.program import LIMIT_S

WINDOWS_H = {"score_recent": 24, "score_steady": 72, "score_anchor": 168}
FINAL = ("scored", "void", "missed", "skipped")
_TOLERANCE = 1e-7

Row = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """A setting as it was configured."""

    asset: str
    horizon_s: int
    step_s: int
    interval_s: int
    offset_s: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Scored:
    """A scored round, by SCORING.md's Round: what each model gained over the median, and the unit of that."""

    scored_at_ms: int
    resolvable_at_s: int
    setting: Row
    gains: dict[str, float]
    no_move: float


@dataclass
class Books:
    """What the game has on disk: `note()` before a fault, `check()` after it returns what is wrong."""

    path: Path
    settings: tuple[Asked, ...]
    patience_s: float = LIMIT_S
    """How long the leaderboard may take to follow the rows."""
    answers: set[Row] = field(default_factory=set)
    rounds: dict[Row, str] = field(default_factory=dict)
    scores: dict[Row, Row] = field(default_factory=dict)
    prices: dict[Row, float] = field(default_factory=dict)
    interrupted: set[Row] = field(default_factory=set)
    """The rounds that were open when the game was killed."""

    def open(self) -> sqlite3.Connection:
        return sqlite3.connect(f"file:{self.path}?mode=ro", uri=True, timeout=LIMIT_S)

    def note(self) -> None:
        """Remember all that is on disk: from now on it may not go."""
        with closing(self.open()) as db:
            db.execute("BEGIN")
            key = "asset, horizon_s, step_s, scheduled_at_s"
            self.answers = set(
                db.execute(
                    f"SELECT {key}, model_id FROM prediction JOIN round USING (round_no)"
                    " JOIN model USING (model_no)"
                )
            )
            self.rounds = {row[:-1]: row[-1] for row in db.execute(f"SELECT {key}, status FROM round")}
            self.scores = {
                row[:-3]: row[-3:]
                for row in db.execute(
                    f"SELECT {key}, scorer_version, model_id, raw, counted, score.score FROM score"
                    " JOIN round USING (round_no) JOIN model USING (model_no)"
                )
            }
            self.prices = {row[:2]: row[2] for row in db.execute("SELECT asset, ts_s, price FROM price")}

    def note_killed(self) -> None:
        """The same after a kill, on a copy: opening the file itself would tidy it up before the game does."""
        with tempfile.TemporaryDirectory() as folder:
            for file in self.path.parent.glob(f"{self.path.name}*"):
                if file.is_file() and not file.name.endswith(("-shm", ".lock")):
                    shutil.copy(file, folder)
            copied = copy(self)
            copied.path = Path(folder) / self.path.name
            copied.note()
        self.answers, self.rounds = copied.answers, copied.rounds
        self.scores, self.prices = copied.scores, copied.prices
        self.interrupted = {key for key, status in self.rounds.items() if status == "open"}

    def check(self, published: Callable[[], list[dict[str, Any]]]) -> list[str]:
        """What is lost, counted twice, damaged, off the schedule or wrongly summed; all noted anew."""
        before = copy(self)
        self.note()
        found = list(self._lost(before))
        self.interrupted = set()
        with closing(self.open()) as db:
            db.execute("BEGIN")
            found += self._damage(db)
            found += self._twice(db)
            found += self._schedule(db)
        return [*found, *self._sums(published)]

    def _lost(self, before: Books) -> Iterator[str]:
        if gone := before.answers - self.answers:
            yield f"{len(gone)} answers that were on disk are gone, such as {min(gone)}"
        if lost := before.rounds.keys() - self.rounds.keys():
            yield f"{len(lost)} rounds are gone, such as {min(lost)}"
        for key, status in before.rounds.items():
            now = self.rounds.get(key, status)
            if status in FINAL and now != status:
                yield f"round {key} was {status} and is {now}"
            if status == "closed" and now == "open":
                yield f"round {key} was closed and is open"
        if played_on := {key for key in before.interrupted if self.rounds.get(key) != "void"}:
            yield f"{len(played_on)} rounds that a kill interrupted are not void, such as {min(played_on)}"
        for name in ("scores", "prices"):
            was, now = getattr(before, name), getattr(self, name)
            changed = [key for key, value in was.items() if now.get(key) != value]
            if name == "prices":  # the newest may be corrected as long as they don't count yet
                changed = [key for key in changed if key not in now]
            if changed:
                yield f"{len(changed)} {name} are gone or others, such as {changed[0]}"

    def _damage(self, db: sqlite3.Connection) -> Iterator[str]:
        (said,) = db.execute("PRAGMA integrity_check(1)").fetchone()
        if said != "ok":
            yield f"integrity_check: {said}"
        if broken := db.execute("PRAGMA foreign_key_check").fetchall():
            yield f"foreign_key_check: {broken[:3]}"

    def _twice(self, db: sqlite3.Connection) -> Iterator[str]:
        queries = {
            "models that are there twice": "SELECT model_id FROM model GROUP BY 1 HAVING count(*) > 1",
            "rounds that are there twice": "SELECT asset, horizon_s, step_s, scheduled_at_s FROM round"
            " GROUP BY 1, 2, 3, 4 HAVING count(*) > 1",
            "scored rounds without their scores": "SELECT round_no FROM round WHERE status = 'scored'"
            " AND (SELECT count(*) FROM round_score WHERE round_score.round_no = round.round_no) <> 1",
            "scores of rounds that are not scored": "SELECT round_no FROM round_score"
            " JOIN round USING (round_no) WHERE status <> 'scored'",
            "closed rounds that count other answers than there are": "SELECT round_no, answered, failed,"
            " timed_out, (SELECT count(*) FROM prediction WHERE prediction.round_no = round.round_no) AS n"
            " FROM round WHERE status IN ('closed', 'scored') AND answered + failed + timed_out <> n",
            # By when it first answered: who joins late in a long round was not there for the short ones that
            # were closed since that one began.
            "models that took part and lack a score": "SELECT round_no, model_id FROM round JOIN model m"
            " ON (SELECT min(received_at_ms) FROM prediction p WHERE p.model_no = m.model_no)"
            " < 1000 * scheduled_at_s WHERE status = 'scored' AND NOT EXISTS"
            " (SELECT 1 FROM score s WHERE s.round_no = round.round_no AND s.model_no = m.model_no)",
            "valid answers without a raw score, or the other way round": "SELECT s.round_no, s.model_no"
            " FROM score s LEFT JOIN prediction p ON p.round_no = s.round_no AND p.model_no = s.model_no"
            " WHERE (s.raw IS NOT NULL) <> (coalesce(p.status, '') = 'SUCCESS')",
            "rounds that were open when the game ended, and still are": "SELECT round_no FROM round"
            " WHERE status = 'open' AND scheduled_at_s < (SELECT max(scheduled_at_s) FROM round r"
            " WHERE r.asset = round.asset AND r.horizon_s = round.horizon_s) - 600",
        }
        for what, query in queries.items():
            if rows := db.execute(query).fetchall():
                yield f"{len(rows)} {what}: {rows[:3]}"

    def _schedule(self, db: sqlite3.Connection) -> Iterator[str]:
        for asked in self.settings:
            times = [
                at_s
                for (at_s,) in db.execute(
                    "SELECT scheduled_at_s FROM round WHERE asset = ? AND horizon_s = ? AND step_s = ?"
                    " ORDER BY 1",
                    (asked.asset, asked.horizon_s, asked.step_s),
                )
            ]
            if off := [at_s for at_s in times if at_s % asked.interval_s != asked.offset_s]:
                yield f"{asked.asset}: {len(off)} rounds are off the grid, such as {off[0]}"
            holes = [
                (one, other) for one, other in itertools.pairwise(times) if other - one != asked.interval_s
            ]
            if holes:
                yield f"{asked.asset}: {len(holes)} holes in the schedule, such as {holes[0]}"
        if unexplained := db.execute(
            "SELECT round_no, status FROM round WHERE status IN ('void', 'missed', 'skipped')"
            " AND coalesce(reason, '') = ''"
        ).fetchall():
            yield f"{len(unexplained)} rounds were not held, and nothing says why"

    def _sums(self, published: Callable[[], list[dict[str, Any]]]) -> Iterator[str]:
        """Whether the leaderboard is that of the rows. Rounds are scored meanwhile: it is tried again."""
        until_s = time.monotonic() + self.patience_s
        while True:
            shown = published()
            with closing(self.open()) as db:
                wrong = self._differences(db, shown)
            if not wrong:
                return
            if time.monotonic() > until_s:
                yield f"the leaderboard is not what the rows sum up to: {wrong[0]}"
                return
            time.sleep(0.1)

    def _differences(self, db: sqlite3.Connection, shown: list[dict[str, Any]]) -> list[str]:
        """How the leaderboard and the rows differ, of rounds that had been scored when it was made.

        It tells that by the second. Of the rounds that were scored in that one, the first few may be in it.
        """
        rounds = self.scored(db)
        if not shown:
            return [f"nothing is published of {len(rounds)} scored rounds"] if rounds else []
        made_s = int(datetime.fromisoformat(shown[0]["created_at"]).timestamp())
        until_ms = {1000 * made_s - 1}
        until_ms |= {one.scored_at_ms for one in rounds if 0 <= one.scored_at_ms - 1000 * made_s < 1000}
        wrong: list[str] = []
        for limit_ms in sorted(until_ms):
            then = [one for one in rounds if one.scored_at_ms <= limit_ms]
            own = {name: self.recomputed(then, made_s, hours) for name, hours in WINDOWS_H.items()}
            if not (wrong := list(_unlike(own, shown))):
                break
        return wrong

    def leaderboard(self, db: sqlite3.Connection) -> list[dict[str, Any]]:
        """What should be published once the newest round is scored."""
        rounds = self.scored(db)
        now_s = max(one.scored_at_ms for one in rounds) // 1000
        own = {name: self.recomputed(rounds, now_s, hours) for name, hours in WINDOWS_H.items()}
        return [
            {
                "created_at": datetime.fromtimestamp(now_s, UTC).isoformat(),
                "model_id": model_id,
                **{name: by_model.get(model_id) for name, by_model in own.items()},
            }
            for (model_id,) in db.execute("SELECT model_id FROM model").fetchall()
        ]

    def scored(self, db: sqlite3.Connection) -> list[Scored]:
        """Every scored round, from raw scores alone."""
        rows = db.execute(
            "SELECT round_no, asset, horizon_s, step_s, model_id, benchmark, raw, no_move, scored_at_ms,"
            " resolvable_at_s FROM score JOIN round_score USING (round_no, scorer_version)"
            " JOIN round USING (round_no) JOIN model USING (model_no) ORDER BY round_no"
        )
        found = []
        for _, group in itertools.groupby(rows, key=lambda row: row[0]):
            entries = list(group)
            valid = [entry[6] for entry in entries if entry[6] is not None]
            median = statistics.median(
                [entry[6] for entry in entries if entry[6] is not None and not entry[5]] or valid
            )
            missing = min(float(np.quantile(valid, 0.9)), 1.25 * median)
            gains = {
                entry[4]: median - (missing if entry[6] is None else min(entry[6], 3 * median))
                for entry in entries
            }
            _, *setting, _, _, _, no_move, scored_at_ms, resolvable_at_s = entries[0]
            found.append(Scored(scored_at_ms, resolvable_at_s, tuple(setting), gains, no_move))
        return found

    def recomputed(self, rounds: list[Scored], now_s: float, hours: int) -> dict[str, float]:
        """Each model's overall score in one window (SCORING.md, Windows)."""
        start_s = (int(now_s) // 3600 - hours) * 3600
        gains: dict[tuple[Row, str], list[float]] = defaultdict(list)
        units: dict[tuple[Row, str], list[float]] = defaultdict(list)
        count: dict[Row, int] = defaultdict(int)
        for one in rounds:
            if one.resolvable_at_s < start_s:
                continue
            count[one.setting] += 1
            for model_id, gain in one.gains.items():
                gains[one.setting, model_id].append(gain)
                units[one.setting, model_id].append(one.no_move)
        weights = {(a.asset, a.horizon_s, a.step_s): a.weight for a in self.settings}
        total = sum(weights[setting] for setting in count)
        overall: dict[str, float] = defaultdict(float)
        for (setting, model_id), terms in gains.items():
            n = len(terms)
            score = 100 * 8 * n / (7 * n + count[setting]) * sum(terms) / sum(units[setting, model_id])
            overall[model_id] += weights[setting] / total * score
        return dict(overall)


def _unlike(own: dict[str, dict[str, float]], shown: list[dict[str, Any]]) -> Iterator[str]:
    for row in shown:
        for name, by_model in own.items():
            mine, said = by_model.get(row["model_id"]), row[name]
            if (mine is None) != (said is None) or (
                mine is not None and abs(mine - said) > _TOLERANCE * max(1.0, abs(mine))
            ):
                yield f"{row['model_id']} {name}: {said} published, {mine} recomputed"
