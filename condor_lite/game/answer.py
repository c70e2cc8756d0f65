"""The careful reading of an answer: plain JSON in, checked densities or the first fault out."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, NoReturn

import msgspec
import numpy as np

from condor_lite.errors import InvalidAnswer
from condor_lite.game.entities import Setting
from condor_lite.game.families import BY_NAME, NORM, POINT, Floats
from condor_lite.game.mixture import Densities, Ints

ENVELOPE_BYTES = 16 * 1024
LOWEST_SCALE, HIGHEST_SCALE = 1e-9, 1e9
FURTHEST = 1e9
MAX_DEPTH = 3


@dataclass(frozen=True, slots=True)
class Limits:
    """`max_components`: leaves a density; `max_segment_bytes`: bytes of JSON a segment, on average."""

    max_components: int
    max_segment_bytes: int

    def payload_bytes(self, segments: int) -> int:
        return self.max_segment_bytes * segments + ENVELOPE_BYTES

    @property
    def max_points(self) -> int:
        """No density's own share of the bytes holds more points ("0," and up), whatever the others leave to
        it.
        """
        return max(self.max_segment_bytes // 2, 2)


# Python's own floats would also read "nan", "1_0", " 1" and digits of other scripts.
_NUMERAL = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_NUMBERS = msgspec.json.Decoder(list[float])
_ONE_NUMERAL = re.compile(_NUMERAL)
_NUMERALS = re.compile(f"{_NUMERAL}(?:,{_NUMERAL})*")

_PARAMETERS = {
    name: frozenset({"loc", "scale", *(shape.name for shape in family.shapes)})
    for name, (_, family) in BY_NAME.items()
}


_NO_MASS = "{} must sum to more than 0"


class _FaultError(Exception):
    """What is wrong inside a segment."""


def _fail(reason: str) -> NoReturn:
    raise _FaultError(reason)


def _quoted(value: object) -> str:
    """A participant's own text, short and harmless."""
    text = value if isinstance(value, str) else str(type(value).__name__)
    return ascii(text if len(text) <= 40 else text[:37] + "...")


def _number(value: Any, field: str) -> float:
    kind = type(value)
    if kind is float:
        return float(value)
    if kind is not int:
        _fail(f"{field} must be a number")
    try:
        return float(value)
    except OverflowError:
        _fail(f"{field} is too large")


def _field(record: Mapping[str, Any], name: str, kind: type, called: str) -> Any:
    if name not in record:
        _fail(f"{name} is missing")
    if type(record[name]) is not kind:
        _fail(f"{name} must be {called}")
    return record[name]


def _shares(weights: list[float], field: str) -> list[float]:
    """Normalised to 1, dividing by the largest first so that the sum can't overflow.

    The sum goes from left to right, as `decode` sums the weights of normals: the same answer, the same bits.
    """
    largest = max(weights)
    if largest <= 0.0:
        _fail(_NO_MASS.format(field))
    ratios = [weight / largest for weight in weights]
    *_, total = accumulate(ratios)
    return [ratio / total for ratio in ratios]


def _all_shares(weights: Sequence[list[float]], owner: Ints) -> Floats:
    """Each list's `_shares`, to the last bit, one after another; `owner`: the place of an element's list."""
    ratios = np.array(list(chain.from_iterable(weights)))
    ratios /= np.array(list(map(max, weights)))[owner]
    ratios /= np.bincount(owner, ratios)[owner]
    return ratios


class Reader:
    """Walks one answer's plain JSON and gathers its leaves; the first fault ends it."""

    def __init__(self, setting: Setting, limits: Limits, rule: str, scale_unit: float) -> None:
        self.setting = setting
        self.limits = limits
        self.rule = rule
        self.unit = scale_unit
        self.rows: list[tuple[int, int, float, float, float, float, float]] = []
        self.points: list[tuple[int, float, list[float], list[float]]] = []
        self.components = 0

    def read(self, answer: Any) -> Densities:
        if type(answer) is not list:
            raise InvalidAnswer("the answer must be a list of densities")
        if len(answer) != self.setting.segments:
            raise InvalidAnswer(
                f"the answer has {len(answer)} densities; {self.setting.segments} are expected"
            )
        for k, item in enumerate(answer):
            try:
                self._segment(k, item)
            except _FaultError as fault:
                raise InvalidAnswer(f"segment {k + 1}: {fault}") from None
        return self._gathered(len(answer))

    def _gathered(self, n: int) -> Densities:
        table = np.array(self.rows, np.float64).reshape(-1, 7)
        if self.points:
            counts = [len(places) for *_, places in self.points]
            owner = np.repeat(np.arange(len(counts)), counts)
            points = np.zeros((len(owner), 7))
            points[:, 0] = np.array([k for k, *_ in self.points])[owner]
            points[:, 1] = POINT
            points[:, 2] = _all_shares([masses for _, _, masses, _ in self.points], owner)
            points[:, 2] *= np.array([share for _, share, *_ in self.points])[owner]
            points[:, 3] = list(chain.from_iterable(places for *_, places in self.points))
            points[:, 4] = 1.0
            table = np.concatenate([table, points])
        # By segment, without the weights of 0.
        table = table[np.argsort(table[:, 0], kind="stable")]
        table = table[table[:, 2] > 0.0]
        segment, family = table[:, 0].astype(np.intp), table[:, 1].astype(np.uint8)
        return Densities(n, segment, family, *(np.ascontiguousarray(table[:, i]) for i in range(2, 7)))

    def _segment(self, k: int, item: Any) -> None:
        if type(item) is not dict:
            _fail("a density must be an object")
        density = item
        if "step" in item:
            step = self.setting.step_s * (k + 1)
            if _number(item["step"], "step") != step:
                _fail(f"step must be {step}")
        if "prediction" in item:
            if "type" in item:
                _fail("has both prediction and type; give one")
            density = item["prediction"]
            if type(density) is not dict:
                _fail("prediction must be an object")
        elif "step" in item and "type" not in item:
            density = {key: value for key, value in item.items() if key != "step"}
        self.components = 0
        self._density(k, density, 1.0, 0)

    def _density(self, k: int, density: dict[str, Any], share: float, depth: int) -> None:
        if "type" not in density:
            if not density:
                _fail("type is missing")
            self._discrete(k, self._numerals(density, bare=True), list(density.values()), share)
            return
        kind = density["type"]
        if kind == "mixture":
            self._mixture(k, _field(density, "components", list, "a list"), share, depth)
        elif kind in ("builtin", "scipy"):
            self._leaf(k, density, share)
        elif kind == "statistics":
            self._statistics(k, density, share)
        elif kind == "discrete":
            self._points(k, density, share)
        elif type(kind) is str:
            _fail(f"unknown type {_quoted(kind)}; known are builtin, scipy, statistics, mixture, discrete")
        else:
            _fail("type must be a string")

    def _mixture(self, k: int, components: list[Any], share: float, depth: int) -> None:
        if depth >= MAX_DEPTH:
            _fail(f"mixtures may be nested at most {MAX_DEPTH} deep")
        if not components:
            _fail("components must not be empty")
        if len(components) > self.limits.max_components:
            _fail(f"{len(components)} components; at most {self.limits.max_components} are allowed")
        weights = []
        for i, component in enumerate(components):
            if type(component) is not dict:
                _fail(f"component {i + 1}: must be an object with density and weight")
            if "weight" not in component:
                _fail(f"component {i + 1}: weight is missing")
            weight = _number(component["weight"], f"component {i + 1}: weight")
            if weight < 0.0:
                _fail(f"component {i + 1}: weight must be >= 0")
            weights.append(weight)
        shares = _shares(weights, "the weights of components")
        for i, component in enumerate(components):
            try:
                inner = _field(component, "density", dict, "an object")
                self._density(k, inner, share * shares[i], depth + 1)
            except _FaultError as fault:
                raise _FaultError(f"component {i + 1}: {fault}") from None

    def _leaf(self, k: int, density: dict[str, Any], share: float) -> None:
        name = _field(density, "name", str, "a string")
        if name not in BY_NAME:
            _fail(f"unknown name {_quoted(name)}; known are {', '.join(BY_NAME)}")
        code, family = BY_NAME[name]
        params = _field(density, "params", dict, "an object")
        a_and_b = [0.0, 0.0]
        for i, shape in enumerate(family.shapes):
            if shape.name not in params:
                _fail(f"{shape.name} is missing")
            value = a_and_b[i] = _number(params[shape.name], shape.name)
            if value <= shape.above:
                _fail(f"{shape.name} must be > {shape.above:g}" + (f": {shape.why}" if shape.why else ""))
            if not shape.lowest <= value <= shape.highest:
                _fail(f"{shape.name} must be between {shape.lowest:g} and {shape.highest:g}")
        if not params.keys() <= _PARAMETERS[name]:
            extra = next(key for key in params if key not in _PARAMETERS[name])
            _fail(f"unknown parameter {_quoted(extra)}; {name} has {', '.join(sorted(_PARAMETERS[name]))}")
        self._add(k, code, share, params, ("loc", "scale"), (a_and_b[0], a_and_b[1]))

    def _statistics(self, k: int, density: dict[str, Any], share: float) -> None:
        name = _field(density, "name", str, "a string")
        if name != "normal":
            _fail(f"unknown name {_quoted(name)}; statistics has normal")
        params = _field(density, "params", dict, "an object")
        for key in params:
            if key not in ("mu", "loc", "sigma", "scale"):
                _fail(f"unknown parameter {_quoted(key)}; normal has mu (or loc) and sigma (or scale)")
        for one, other in (("mu", "loc"), ("sigma", "scale")):
            if one in params and other in params:
                _fail(f"has both {one} and {other}; give one")
        mean, deviation = "mu" if "mu" in params else "loc", "sigma" if "sigma" in params else "scale"
        self._add(k, NORM, share, params, (mean, deviation), (0.0, 0.0))

    def _add(
        self,
        k: int,
        code: int,
        share: float,
        params: Mapping[str, Any],
        names: tuple[str, str],
        shapes: tuple[float, float],
    ) -> None:
        loc, scale = (
            _number(params.get(names[0], 0.0), names[0]),
            _number(params.get(names[1], 1.0), names[1]),
        )
        if scale <= 0.0:
            _fail(f"{names[1]} must be > 0")
        if not LOWEST_SCALE * self.unit <= scale <= HIGHEST_SCALE * self.unit:
            _fail(
                f"{names[1]} must be between {LOWEST_SCALE * self.unit:g} and {HIGHEST_SCALE * self.unit:g}"
            )
        if not -FURTHEST * self.unit <= loc <= FURTHEST * self.unit:
            _fail(f"{names[0]} must be between {-FURTHEST * self.unit:g} and {FURTHEST * self.unit:g}")
        self._count()
        self.rows.append((k, code, share, loc, scale, *shapes))

    def _count(self) -> None:
        self.components += 1
        if self.components > self.limits.max_components:
            _fail(f"more than {self.limits.max_components} components")

    def _points(self, k: int, density: dict[str, Any], share: float) -> None:
        if "points" in density:
            if "values" in density or "weights" in density:
                _fail("has both points and values; give one")
            points = _field(density, "points", dict, 'an object {"value": probability}')
            self._discrete(k, self._numerals(points, bare=False), list(points.values()), share)
            return
        if "values" not in density:
            _fail("points (or values and weights) is missing")
        values, weights = (
            _field(density, "values", list, "a list"),
            _field(density, "weights", list, "a list"),
        )
        if len(values) != len(weights):
            _fail(f"{len(values)} values but {len(weights)} weights")
        self._discrete(k, self._numbers(values, "values"), weights, share)

    def _discrete(self, k: int, places: list[float], weights: list[Any], share: float) -> None:
        if self.rule == "likelihood":
            _fail("a discrete distribution has no likelihood")
        if not weights:
            _fail("a discrete distribution needs at least one point")
        if len(weights) > self.limits.max_points:
            _fail(f"{len(weights)} points; at most {self.limits.max_points} are allowed")
        masses = self._numbers(weights, "a probability")
        if min(masses) < 0.0:
            _fail("probabilities must be >= 0")
        if max(masses) <= 0.0:
            _fail(_NO_MASS.format("probabilities"))
        furthest = FURTHEST * self.unit
        if not (min(places) >= -furthest and max(places) <= furthest):
            _fail(f"values must be between {-furthest:g} and {furthest:g}")
        self._count()
        self.points.append((k, share, masses, places))

    @staticmethod
    def _numerals(keys: Collection[str], *, bare: bool) -> list[float]:
        """Values that are given as JSON keys."""
        if not keys:
            return []
        joined = ",".join(keys)
        # By number, too: a key with a comma in it is no two numerals.
        if joined.count(",") == len(keys) - 1:
            # As JSON's own numbers, which most are, they are read in a quarter of the time.
            with suppress(msgspec.DecodeError):
                if joined.isascii() and joined.split() == [joined]:  # JSON has room between numbers
                    return _NUMBERS.decode(f"[{joined}]")
            if _NUMERALS.fullmatch(joined):
                places = list(map(float, keys))
                if all(map(math.isfinite, places)):
                    return places
        wrong = next(key for key in keys if not (_ONE_NUMERAL.fullmatch(key) and math.isfinite(float(key))))
        if bare:
            _fail(f"type is missing ({_quoted(wrong)} is no number, so this is no discrete distribution)")
        _fail(f"point {_quoted(wrong)} is not a finite number")

    @staticmethod
    def _numbers(values: list[Any], field: str) -> list[float]:
        kinds = set(map(type, values))
        if not kinds <= {int, float}:
            _fail(f"{field} must be a number")
        return [_number(value, field) for value in values] if int in kinds else values
