"""A model's answer -> checked densities as flat arrays, in bounded time and memory.

Two ways lead to the same `Densities`. Most answers are made of normal distributions, or of others on the
whole line: those are read straight into typed records (msgspec checks names and types while it parses) and
checked as arrays. Everything else, and everything that fails there, goes through `Reader`, which walks the
plain JSON and knows what to say to a participant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from math import nan
from operator import attrgetter, eq
from typing import Any, Generic, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from condor_lite.errors import InvalidAnswer
from condor_lite.game.answer import FURTHEST, HIGHEST_SCALE, LOWEST_SCALE, Limits, Reader
from condor_lite.game.entities import Setting
from condor_lite.game.families import BY_NAME, CODES, NORM, Floats
from condor_lite.game.mixture import Densities, Ints

__all__ = ["Densities", "Limits", "decode"]

Leaf = TypeVar("Leaf")
Codes = npt.NDArray[np.uint8]

T = CODES["t"]
(_DF,) = BY_NAME["t"][1].shapes


def decode(
    payload: bytes, setting: Setting, limits: Limits, *, rule: str = "crps", scale_unit: float = 1.0
) -> Densities:
    """Check an answer's JSON and turn it into arrays.

    `scale_unit`: the price at t0 where the target is `price_change`, to which the bounds on scales and places
    are relative; else 1. `rule` matters for `likelihood`, which a discrete distribution has none of. Raises
    `InvalidAnswer` naming the first offending segment (1-based) and field.
    """
    n, limit = setting.segments, limits.payload_bytes(setting.segments)
    if len(payload) > limit:
        raise InvalidAnswer(
            f"the answer has {len(payload)} bytes; at most {limit} are accepted for {n} segments"
        )
    densities = _decode_fast(payload, setting, limits, scale_unit)
    if densities is not None:
        return densities
    return Reader(setting, limits, rule, scale_unit).read(_parse(payload))


_NO_NUMBER = re.compile(rb"-?(NaN|Infinity)")


def _parse(payload: bytes) -> Any:
    try:
        return msgspec.json.decode(payload)
    except UnicodeDecodeError:
        raise InvalidAnswer("not JSON: the text is not UTF-8") from None
    except RecursionError:
        raise InvalidAnswer("not accepted: the JSON is nested too deeply") from None
    except msgspec.DecodeError as error:
        if found := _NO_NUMBER.search(payload):
            word, at = found[0].decode(), found.start()
            raise InvalidAnswer(f"{word} is not allowed (byte {at}: {_segment_at(payload, at)})") from None
        raise InvalidAnswer(f"not JSON: {error}") from None


def _segment_at(payload: bytes, at: int) -> str:
    """Where a position is, for a payload that can't be parsed."""
    depth = segment = 0
    for char in payload[:at]:
        if char in b"[{":
            depth += 1
            segment += depth == 2
        elif char in b"]}":
            depth -= 1
    return f"segment {segment}" if segment else "before the first segment"


# --- the fast way: distributions on the whole line, and their mixtures ----------


class _Params(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    loc: float = 0.0
    scale: float = 1.0


class _Shaped(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    loc: float = 0.0
    scale: float = 1.0
    df: float | msgspec.UnsetType = msgspec.UNSET


class _Normal(msgspec.Struct, gc=False):
    type: Literal["builtin", "scipy"]
    name: Literal["norm"]
    params: _Params


class _Smooth(msgspec.Struct, gc=False):
    type: Literal["builtin", "scipy"]
    name: Literal["norm", "t", "laplace", "logistic", "cauchy"]
    params: _Shaped


class _FlatNormal(_Normal, gc=False):
    step: float | msgspec.UnsetType = msgspec.UNSET
    prediction: msgspec.UnsetType = msgspec.UNSET


class _FlatSmooth(_Smooth, gc=False):
    step: float | msgspec.UnsetType = msgspec.UNSET
    prediction: msgspec.UnsetType = msgspec.UNSET


class _Component(msgspec.Struct, Generic[Leaf], gc=False):
    density: Leaf
    weight: float


class _Mixture(msgspec.Struct, Generic[Leaf], gc=False):
    type: Literal["mixture"]
    components: list[_Component[Leaf]]


class _FlatMixture(_Mixture[Leaf], Generic[Leaf], gc=False):
    step: float | msgspec.UnsetType = msgspec.UNSET
    prediction: msgspec.UnsetType = msgspec.UNSET


class _Wrapped(msgspec.Struct, Generic[Leaf], gc=False):
    prediction: Leaf
    step: float | msgspec.UnsetType = msgspec.UNSET
    type: msgspec.UnsetType = msgspec.UNSET


@dataclass(frozen=True, slots=True)
class _Shape:
    """What to read a payload as; where a segment's components are (None: it is a leaf itself), where in a
    component, or segment, its leaf's fields are. `normal`: whether it holds nothing else.
    """

    decoder: msgspec.json.Decoder[Any]
    components: Callable[[Any], list[Any]] | None
    leaf: str
    normal: bool

    def fields(self, leaves: list[Any], name: str) -> Iterator[Any]:
        return map(attrgetter(self.leaf + name), leaves)


def _shapes(leaf: Any, flat: Any) -> Iterator[_Shape]:
    nested, normal = attrgetter("prediction.components"), leaf is _Normal
    yield _Shape(msgspec.json.Decoder(list[_Wrapped[_Mixture[leaf]]]), nested, "density.", normal)
    yield _Shape(msgspec.json.Decoder(list[_FlatMixture[leaf]]), attrgetter("components"), "density.", normal)
    yield _Shape(msgspec.json.Decoder(list[_Wrapped[leaf]]), None, "prediction.", normal)
    yield _Shape(msgspec.json.Decoder(list[flat]), None, "", normal)


_SHAPES = (*_shapes(_Normal, _FlatNormal), *_shapes(_Smooth, _FlatSmooth))


def _decode_fast(payload: bytes, setting: Setting, limits: Limits, unit: float) -> Densities | None:
    """Densities, or None where the answer is of another kind or has a fault that `Reader` will name."""
    for shape in _SHAPES:
        try:
            segments = shape.decoder.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        n = len(segments)
        if n != setting.segments or not _steps_fit([item.step for item in segments], setting.step_s):
            return None
        if shape.components is None:
            leaves, counts, weight = segments, np.ones(n, np.intp), np.ones(n)
        else:
            groups = list(map(shape.components, segments))
            counts = np.fromiter(map(len, groups), np.intp, n)
            if counts.min() < 1 or counts.max() > limits.max_components:
                return None
            leaves = list(chain.from_iterable(groups))
            weight = np.array([leaf.weight for leaf in leaves])
        params = list(shape.fields(leaves, "params"))
        loc, scale = np.array([one.loc for one in params]), np.array([one.scale for one in params])
        if shape.normal:
            family, a = np.full(len(loc), NORM, np.uint8), np.zeros(len(loc))
        else:
            names = list(shape.fields(leaves, "name"))
            family = np.fromiter(map(CODES.__getitem__, names), np.uint8, len(loc))
            a = np.array([nan if one.df is msgspec.UNSET else one.df for one in params])
            if ((family == T) == np.isnan(a)).any():
                return None
            a = np.where(family == T, a, 0.0)
            if not ((family != T) | ((a > _DF.above) & (a >= _DF.lowest) & (a <= _DF.highest))).all():
                return None
        return _gathered(counts, weight, family, loc, scale, a, unit)
    return None


def _steps_fit(steps: list[Any], step_s: int) -> bool:
    expected = range(step_s, (len(steps) + 1) * step_s, step_s)
    return all(map(eq, steps, expected)) or all(
        step is msgspec.UNSET or step == right for step, right in zip(steps, expected, strict=True)
    )


def _gathered(
    counts: Ints, weight: Floats, family: Codes, loc: Floats, scale: Floats, a: Floats, unit: float
) -> Densities | None:
    n = len(counts)
    segment = np.repeat(np.arange(n), counts)
    starts = np.cumsum(counts) - counts
    largest = np.maximum.reduceat(weight, starts)
    inside = (
        weight.min() >= 0.0
        and largest.min() > 0.0
        and scale.min() >= LOWEST_SCALE * unit
        and scale.max() <= HIGHEST_SCALE * unit
        and np.abs(loc).max() <= FURTHEST * unit
    )
    if not inside:
        return None
    weight = weight / largest[segment]
    weight /= np.bincount(segment, weight, n)[segment]
    densities = Densities(n, segment, family, weight, loc, scale, a, np.zeros(len(loc)))
    return densities if weight.all() else densities.leaves(np.flatnonzero(weight))
