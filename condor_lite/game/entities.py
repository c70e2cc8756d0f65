"""The game's records: what was asked, who answered, what came of it. Names as in DESIGN.md's "Words"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class RoundStatus(StrEnum):
    OPEN = "open"
    CLOSED = "closed"
    SCORED = "scored"
    VOID = "void"
    MISSED = "missed"
    SKIPPED = "skipped"


class AnswerStatus(StrEnum):
    SUCCESS = "SUCCESS"
    FAILED = "FAILED"
    TIMEOUT = "TIMEOUT"
    ABSENT = "ABSENT"


class Window(StrEnum):
    """The rolling windows of the leaderboard, by a round's `resolvable_at`."""

    RECENT = "recent"
    STEADY = "steady"
    ANCHOR = "anchor"

    @property
    def hours(self) -> int:
        return {"recent": 24, "steady": 72, "anchor": 168}[self.value]


@dataclass(frozen=True, slots=True)
class Setting:
    """What is asked, and how often. All durations are whole seconds.

    `offset_s` shifts the grid of rounds; `interval_s` is 0 for a setting that is no longer asked.
    """

    asset: str
    horizon_s: int
    step_s: int
    interval_s: int = 0
    offset_s: int = 0
    weight: float = 1.0

    @property
    def key(self) -> str:
        return f"{self.asset}-{self.horizon_s}-{self.step_s}"

    @property
    def segments(self) -> int:
        return self.horizon_s // self.step_s


@dataclass(frozen=True, slots=True)
class Round:
    """One question to all models at one time. `round_no` is the database's number, None before storing."""

    asset: str
    horizon_s: int
    step_s: int
    scheduled_at_s: int
    status: RoundStatus = RoundStatus.OPEN
    reason: str | None = None
    performed_at_ms: int | None = None
    answered: int = 0
    failed: int = 0
    timed_out: int = 0
    absent: int = 0
    round_no: int | None = None

    @property
    def round_id(self) -> str:
        return f"{self.asset}-{self.horizon_s}-{self.step_s}-{self.scheduled_at_s}"

    @property
    def setting(self) -> Setting:
        return Setting(self.asset, self.horizon_s, self.step_s)

    @property
    def resolvable_at_s(self) -> int:
        return self.scheduled_at_s + self.horizon_s


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the orchestrator says of a model."""

    model_id: str
    model_name: str
    cruncher_id: str
    cruncher_name: str
    deployment_id: str
    code_hash: str | None = None
    benchmark: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """A model as the game knows it. Times are the game's clock, epoch seconds.

    `first_round_at_s` is the `scheduled_at` of the first round that it was asked in, None before that. Rounds
    of that time or later that were closed before that, as their deadline was earlier, it has not missed.
    """

    model_no: int
    info: ModelInfo
    joined_at_s: int
    last_seen_at_s: int
    first_round_at_s: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """One model's answer in one round, before it is stored. `payload` is the answer's JSON as received."""

    round_no: int
    model_no: int
    status: AnswerStatus
    received_at_ms: int
    exec_time_us: int
    detail: str | None = None
    payload: bytes | None = None


@dataclass(frozen=True, slots=True)
class RuleInfo:
    """What rounds and windows must know of a scoring rule.

    `capped`: hopeless answers are capped and sums are divided by the "no move" score (`crps` only).
    """

    name: str
    lower_is_better: bool
    capped: bool


@dataclass(frozen=True, slots=True)
class ModelScore:
    """One model's result in one round, in the rule's own unit and direction.

    `raw` is None where the model gave no valid answer, `counted` is what the round counts as, `score` is for
    display: 0 is the median model, higher is better.
    """

    raw: float | None
    counted: float
    score: float


@dataclass(frozen=True, slots=True)
class RoundScores:
    """A round's scores by `model_no`. `median` is SCORING.md's m, `no_move` its a (bp)."""

    median: float
    no_move: float
    models: dict[int, ModelScore]


@dataclass(frozen=True, slots=True)
class VoidRound:
    """A round that counts for nobody, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class WindowScores:
    """One number a window; None where the window holds nothing to compute it from."""

    recent: float | None = None
    steady: float | None = None
    anchor: float | None = None

    def of(self, window: Window) -> float | None:
        if window is Window.RECENT:
            return self.recent
        return self.steady if window is Window.STEADY else self.anchor


@dataclass(frozen=True, slots=True)
class Brief:
    """What the leaderboard shows of a model's calibration, over all settings of the anchor window: the share
    of outcomes inside its central 90 % intervals, and its mean PIT - 0.5.
    """

    coverage_90: float
    bias: float


@dataclass(frozen=True, slots=True)
class Standing:
    """A model's line in the leaderboard. Numbers are unrounded.

    `rank` is by anchor, then steady, then recent; `ranks` by each window alone; None: takes no rank.
    `by_setting` has the settings (by key) with a scored round of the model in the anchor window.
    `rounds` counts the scored rounds of the anchor window that count for the model, `answered` those with a
    raw score. `skill` is against the benchmark (0.12: 12 % better). `standard_error` is that of `overall`.
    `p_better_than_next` is the probability that the model is better than the next one that has a rank.
    `calibration` is None until there is enough to compute it from.
    """

    model: Model
    rank: int | None
    ranks: dict[Window, int | None]
    overall: WindowScores
    by_setting: Mapping[str, WindowScores]
    rounds: int
    answered: int
    skill: WindowScores
    standard_error: WindowScores
    p_better_than_next: float | None
    calibration: Brief | None = None


@dataclass(frozen=True, slots=True)
class Leaderboard:
    """All models in rank order, as of `created_at_s` on the game's clock.

    `mixed_versions`: other scorers whose scores are counted along with those of `scorer_version`.
    `uncounted`: scored rounds of the anchor window that only other scorers have scored, and that don't count.
    """

    created_at_s: int
    scorer_version: int
    standings: tuple[Standing, ...]
    mixed_versions: tuple[int, ...] = ()
    uncounted: int = 0
