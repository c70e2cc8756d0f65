"""Scores of decoded answers against what happened: the rules of the game, in batches.

Bad answers never get this far (`density.decode`); all that can fail here is a host's own rule.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from condor_lite.errors import CondorError
from condor_lite.game import calibration
from condor_lite.game.crps import crps_and_spread
from condor_lite.game.density import Densities, Limits, decode
from condor_lite.game.entities import RuleInfo
from condor_lite.game.families import Floats
from condor_lite.game.mixture import concatenate
from condor_lite.game.outcome import SCORE, WAIT, Realised, Series, realise, verdict

__all__ = [
    "SCORE",
    "WAIT",
    "Densities",
    "Limits",
    "Realised",
    "RuleError",
    "Rules",
    "SegmentScores",
    "Series",
    "decode",
    "load_rule",
    "realise",
    "score",
    "verdict",
]

# Raise it whenever a change makes any score come out different: scores are stored under the rules'
# fingerprint.
SCORER_REVISION = 3

LOWEST_PROBABILITY = 1e-9
HIGHEST_DENSITY = 1e12

# (densities, x) -> a score for every segment; x is NaN where a segment is unresolved.
OwnRule = Callable[[Densities, Floats], Any]

BUILT_IN = {
    "crps": RuleInfo("crps", lower_is_better=True, capped=True),
    "log": RuleInfo("log", lower_is_better=True, capped=False),
    "likelihood": RuleInfo("likelihood", lower_is_better=False, capped=False),
}


class RuleError(CondorError):
    """A host's own rule can't be loaded, or returned what is no score."""


@dataclass(frozen=True, slots=True)
class Rules:
    """All that a score depends on besides the answer and the prices. Picklable.

    `log_halfwidth_bp`: half the width of the interval of the `log` rule, in basis points. A price is fresh
    for less than `tick_s`; the one that price changes are put in relation to may be `max_staleness_s` old.
    """

    rule: str = "crps"
    target: str = "log_return"
    log_halfwidth_bp: float = 0.5
    max_components: int = 16
    max_segment_bytes: int = 2048
    tick_s: int = 60
    max_staleness_s: int = 180

    @property
    def limits(self) -> Limits:
        return Limits(self.max_components, self.max_segment_bytes)

    def fingerprint(self) -> str:
        """The same for the same scores: 16 hex digits over the rules, the scorer's revision and an own rule's
        source.
        """
        parts: dict[str, Any] = {"revision": SCORER_REVISION, **asdict(self)}
        if self.rule not in BUILT_IN:
            try:
                parts["source"] = inspect.getsource(_own_rule(self.rule))
            except (OSError, TypeError):
                parts["source"] = None
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, eq=False)
class SegmentScores:
    """One answer's scores: `values` float64[n], NaN where unresolved, in bp for `crps`; `raw` is their mean.

    `calibration`: the sums of `calibration.sums`, of the resolved segments. `error`: what a host's own rule
    did wrong with this answer; `raw` and `values` are NaN then.
    """

    values: Floats
    raw: float
    calibration: Floats
    error: str | None = None


def load_rule(name: str) -> RuleInfo:
    """What is known of a rule, built in or "package.module:function" (whose attribute `lower_is_better`, a
    bool, says which way is up). Raises `RuleError`.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    lower_is_better = getattr(_own_rule(name), "lower_is_better", None)
    if not isinstance(lower_is_better, bool):
        raise RuleError(
            f"scoring.rule {name!r}: set {name.partition(':')[2]}.lower_is_better to True or False"
        )
    return RuleInfo(name, lower_is_better, capped=False)


def _own_rule(name: str) -> OwnRule:
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise RuleError(
            f'scoring.rule {name!r}: known are {", ".join(BUILT_IN)}, or "package.module:function"'
        )
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:
        raise RuleError(
            f"scoring.rule {name!r} can't be imported: {type(error).__name__}: {error}"
        ) from error
    if not callable(function):
        raise RuleError(f"scoring.rule {name!r} is not a function")
    return function  # type: ignore[no-any-return]


def score(items: Sequence[tuple[Densities, Realised]], rules: Rules) -> list[SegmentScores]:
    """The scores of many answers, evaluated together; an answer's scores do not depend on the others.

    Raises `RuleError` if a host's own rule can't be imported; one that fails on an answer marks only that
    answer.
    """
    if not items:
        return []
    counts = [densities.n for densities, _ in items]
    owner = np.repeat(np.arange(len(items)), counts)
    densities = concatenate([densities for densities, _ in items])
    x = np.concatenate([realised.increments for _, realised in items])
    unit = np.repeat([realised.unit for _, realised in items], counts)
    resolved = np.flatnonzero(np.isfinite(x) & np.isfinite(unit))
    values = np.full(len(x), np.nan)
    sums = np.zeros((len(items), calibration.WIDTH))
    if len(resolved):
        if len(resolved) < len(x):
            densities, x, unit, owner = densities.take(resolved), x[resolved], unit[resolved], owner[resolved]
        crps, spread = crps_and_spread(densities, x)
        sums = calibration.sums(densities, x, spread * unit, owner, len(items))
        if rules.rule in BUILT_IN:
            values[resolved] = crps * unit if rules.rule == "crps" else _evaluate(densities, x, unit, rules)
    if rules.rule not in BUILT_IN:
        function = _own_rule(rules.rule)
        return [_apply(function, *item, own) for item, own in zip(items, sums, strict=True)]
    parts = np.split(values, np.cumsum(counts)[:-1])
    outcomes = [realised.increments for _, realised in items]
    return [_mean(*part) for part in zip(parts, outcomes, sums, strict=True)]


def _evaluate(densities: Densities, x: Floats, unit: Floats, rules: Rules) -> Floats:
    if rules.rule == "log":
        half = rules.log_halfwidth_bp / unit
        return -np.log(np.maximum(densities.interval(x - half, x + half), LOWEST_PROBABILITY))
    # A density may have a pole (gamma with a < 1 at its edge, say), where one zero increment would be worth
    # infinity.
    return np.minimum(densities.pdf(x), HIGHEST_DENSITY)


def _mean(values: Floats, increments: Floats, sums: Floats) -> SegmentScores:
    """NaN if a resolved segment's score is no number: what can't be scored must not count as left out."""
    resolved = values[np.isfinite(increments)]
    return SegmentScores(values, float(resolved.mean()) if len(resolved) else float("nan"), sums)


def _apply(function: OwnRule, densities: Densities, realised: Realised, sums: Floats) -> SegmentScores:
    n, x = densities.n, realised.increments

    def failed(error: str) -> SegmentScores:
        return SegmentScores(np.full(n, np.nan), float("nan"), sums, error)

    try:
        values = np.array(function(densities, x.copy()), dtype=np.float64)
    except Exception as error:
        return failed(f"the scoring rule raised {type(error).__name__}: {error}")
    if values.shape != (n,):
        return failed(f"the scoring rule returned shape {values.shape}, not ({n},)")
    resolved = np.isfinite(x)
    if not np.isfinite(values[resolved]).all():
        k = int(np.flatnonzero(resolved & ~np.isfinite(values))[0])
        return failed(f"the scoring rule returned {values[k]} for segment {k + 1}")
    return _mean(np.where(resolved, values, np.nan), x, sums)
