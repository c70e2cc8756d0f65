"""Decoding of answers: what is accepted, what is rejected and with which words, and at what cost."""

import json
import math
import pickle
import time
import tracemalloc
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from condor_lite.errors import InvalidAnswer
from condor_lite.game.answer import Reader
from condor_lite.game.density import Densities, Limits, decode
from condor_lite.game.entities import Setting
from condor_lite.game.families import BY_NAME, CODES, FAMILIES, NORM, POINT

LIMITS = Limits(max_components=16, max_segment_bytes=2048)
SETTING = Setting("BTC", 900, 300)
NORMAL = {"type": "builtin", "name": "norm", "params": {"loc": 0.0, "scale": 0.001}}
SHAPES = {
    "t": {"df": 4},
    "lognorm": {"s": 0.5},
    "gamma": {"a": 2.0},
    "beta": {"a": 2, "b": 3.5},
    "weibull_min": {"c": 1.5},
    "weibull_max": {"c": 1.5},
    "pareto": {"b": 2.5},
    "chi": {"df": 3},
    "chi2": {"df": 3},
    "f": {"dfn": 4, "dfd": 5},
}


def leaf(name: str, kind: str = "builtin", **params: Any) -> dict[str, Any]:
    return {"type": kind, "name": name, "params": {**SHAPES.get(name, {}), **params}}


def mixture(*parts: tuple[Any, Any]) -> dict[str, Any]:
    return {"type": "mixture", "components": [{"density": density, "weight": w} for density, w in parts]}


def answer(third: Any, wrapped: bool = True) -> bytes:
    """Three densities, of which the last is the one in question."""
    densities = [NORMAL, mixture((NORMAL, 1.0)), third]
    if wrapped:
        return json.dumps(
            [{"step": 300 * (k + 1), "prediction": d} for k, d in enumerate(densities)]
        ).encode()
    return json.dumps(densities).encode()


def read(payload: bytes, setting: Setting = SETTING, **options: Any) -> Densities:
    return decode(payload, setting, LIMITS, **options)


def reason(payload: bytes, setting: Setting = SETTING, **options: Any) -> str:
    with pytest.raises(InvalidAnswer) as caught:
        read(payload, setting, **options)
    return str(caught.value)


def same(one: Densities, other: Densities) -> bool:
    names = ("segment", "family", "weight", "loc", "scale", "a", "b")
    return one.n == other.n and all(np.array_equal(getattr(one, n), getattr(other, n)) for n in names)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("kind", ["builtin", "scipy"])
def test_every_family_is_read_with_its_parameters(name: str, kind: str) -> None:
    densities = read(answer(leaf(name, kind, loc=0.25, scale=2)))
    shapes = [*SHAPES.get(name, {}).values(), 0.0, 0.0]
    assert densities.n == len(densities) == 3
    assert FAMILIES[densities.family[-1]].name == name
    assert densities.segment.tolist() == [0, 1, 2]
    assert [c[-1] for c in (densities.loc, densities.scale, densities.a, densities.b)] == [
        0.25,
        2.0,
        *shapes[:2],
    ]


def test_missing_loc_is_0_and_missing_scale_is_1() -> None:
    densities = read(answer({"type": "scipy", "name": "laplace", "params": {}}))
    assert (densities.loc[-1], densities.scale[-1]) == (0.0, 1.0)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("density", [NORMAL, mixture((NORMAL, 1), (leaf("norm", loc=1e-4), 3))])
def test_normals_read_the_fast_way_are_as_the_careful_way_reads_them(wrapped: bool, density: Any) -> None:
    items = [{"step": 300 * (k + 1), "prediction": density} if wrapped else density for k in range(3)]
    fast = read(json.dumps(items).encode())
    assert same(fast, Reader(SETTING, LIMITS, "crps", 1.0).read(items))
    assert set(fast.family) == {NORM}
    np.testing.assert_allclose(np.bincount(fast.segment, fast.weight), 1.0, rtol=1e-15)


def test_flat_and_wrapped_densities_may_carry_their_step() -> None:
    flat = json.dumps([{"step": 300 * (k + 1), **NORMAL} for k in range(3)]).encode()
    assert same(read(flat), read(json.dumps([NORMAL] * 3).encode()))
    wrong = json.dumps([{"step": 300, **NORMAL} for _ in range(3)]).encode()
    assert reason(wrong) == "segment 2: step must be 600"


@pytest.mark.parametrize("names", [("mu", "sigma"), ("loc", "scale"), ("mu", "scale")])
def test_statistics_normal_takes_either_spelling(names: tuple[str, str]) -> None:
    params = dict(zip(names, (0.5, 2.0), strict=True))
    densities = read(answer({"type": "statistics", "name": "normal", "params": params}))
    assert (densities.family[-1], densities.loc[-1], densities.scale[-1]) == (NORM, 0.5, 2.0)


@pytest.mark.parametrize(
    "discrete",
    [
        {"type": "discrete", "points": {"-0.001": 1, "0": 2, "1e-3": 1}},
        {"type": "discrete", "values": [-0.001, 0, 0.001], "weights": [0.25, 0.5, 0.25]},
        {"-0.001": 0.25, "0": 0.5, ".001": 0.25},
    ],
)
@pytest.mark.parametrize("wrapped", [True, False])
def test_discrete_distributions_in_all_their_spellings(discrete: dict[str, Any], wrapped: bool) -> None:
    densities = read(answer(discrete, wrapped))
    points = slice(2, 5)
    assert set(densities.family[points]) == {POINT}
    assert densities.loc[points].tolist() == [-0.001, 0.0, 0.001]
    assert densities.weight[points].tolist() == [0.25, 0.5, 0.25]


def test_nested_mixtures_are_flattened_and_normalised_and_their_zeros_dropped() -> None:
    inner = mixture((leaf("t"), 1e300), (leaf("laplace"), 3e300), (leaf("cauchy"), 0))
    densities = read(answer(mixture((mixture((inner, 5)), 1), ({"type": "discrete", "points": {"1": 7}}, 1))))
    assert [FAMILIES[code].name for code in densities.family[2:]] == ["t", "laplace", "point"]
    assert densities.weight[2:].tolist() == [0.125, 0.375, 0.5]


FAULTS: list[tuple[Any, str]] = [
    (leaf("norm", scale=0), "scale must be > 0"),
    (leaf("norm", scale=-1), "scale must be > 0"),
    (leaf("norm", scale=1e-10), "scale must be between 1e-09 and 1e+09"),
    (leaf("norm", scale=1e10), "scale must be between 1e-09 and 1e+09"),
    (leaf("norm", loc=1e300), "loc must be between -1e+09 and 1e+09"),
    (leaf("norm", scale="0.1"), "scale must be a number"),
    (leaf("norm", scale="NaN"), "scale must be a number"),
    (leaf("norm", scale=True), "scale must be a number"),
    (leaf("norm", loc=[0.1]), "loc must be a number"),
    (leaf("norm", loc=None), "loc must be a number"),
    (leaf("norm", mu=1), "unknown parameter 'mu'; norm has loc, scale"),
    (leaf("t", loc=10**400), "loc is too large"),
    ({"type": "builtin", "name": "t", "params": {}}, "df is missing"),
    (leaf("t", df=None), "df must be a number"),
    (leaf("t", df=1e10), "df must be between 1e-06 and 1e+09"),
    (leaf("norm", df=None), "unknown parameter 'df'; norm has loc, scale"),
    (leaf("laplace", df=3), "unknown parameter 'df'; laplace has loc, scale"),
    (leaf("t", df=0.5), "df must be > 0.5: its CRPS is infinite otherwise"),
    (leaf("pareto", b=0.5), "b must be > 0.5: its CRPS is infinite otherwise"),
    (leaf("f", dfd=1), "dfd must be > 1: its CRPS is infinite otherwise"),
    (leaf("f", dfn=0), "dfn must be > 0"),
    (leaf("gamma", a=-2), "a must be > 0"),
    (leaf("lognorm", s=11), "s must be between 1e-06 and 10"),
    (leaf("norm", kind="gaussian"), "unknown type 'gaussian'"),
    (leaf("__class__"), "unknown name '__class__'"),
    (leaf("levy_stable" * 100), "unknown name 'levy_stablelevy_stablelevy_stablelevy...'"),
    ({"type": "builtin", "params": {}}, "name is missing"),
    ({"type": "builtin", "name": "norm"}, "params is missing"),
    ({"type": "builtin", "name": "norm", "params": [0, 1]}, "params must be an object"),
    ({"type": "builtin", "name": 1, "params": {}}, "name must be a string"),
    ({"type": ["mixture"]}, "type must be a string"),
    ({}, "type is missing"),
    (
        {"name": "norm", "params": {}},
        "type is missing ('name' is no number, so this is no discrete distribution)",
    ),
    (
        {"type": "statistics", "name": "normal", "params": {"mu": 0, "loc": 0}},
        "has both mu and loc; give one",
    ),
    ({"type": "statistics", "name": "normal", "params": {"sigma": -1}}, "sigma must be > 0"),
    ({"type": "statistics", "name": "normal", "params": {"s": 1}}, "unknown parameter 's'"),
    ({"type": "statistics", "name": "norm", "params": {}}, "unknown name 'norm'; statistics has normal"),
    ({"type": "mixture"}, "components is missing"),
    ({"type": "mixture", "components": {}}, "components must be a list"),
    (mixture(), "components must not be empty"),
    (mixture((NORMAL, -1)), "component 1: weight must be >= 0"),
    (mixture((NORMAL, 2), (NORMAL, -1)), "component 2: weight must be >= 0"),
    (mixture((NORMAL, 0), (NORMAL, 0)), "the weights of components must sum to more than 0"),
    (mixture((NORMAL, "1")), "component 1: weight must be a number"),
    (
        mixture((NORMAL, 1), (leaf("t", df=0.4), 0)),
        "component 2: df must be > 0.5: its CRPS is infinite otherwise",
    ),
    (
        mixture((mixture((NORMAL, 1), (leaf("norm", scale=0), 1)), 1)),
        "component 1: component 2: scale must be > 0",
    ),
    (
        mixture((mixture((mixture((mixture((NORMAL, 1)), 1)), 1)), 1)),
        "component 1: component 1: component 1: mixtures may be nested at most 3 deep",
    ),
    (mixture(*[(NORMAL, 1)] * 17), "17 components; at most 16 are allowed"),
    (mixture(*[(mixture(*[(NORMAL, 1)] * 9), 1)] * 2), "component 2: component 8: more than 16 components"),
    ({"type": "mixture", "components": [{"density": NORMAL}]}, "component 1: weight is missing"),
    ({"type": "mixture", "components": [{"weight": 1}]}, "component 1: density is missing"),
    ({"type": "mixture", "components": [[NORMAL, 1]]}, "component 1: must be an object"),
    ({"type": "discrete"}, "points (or values and weights) is missing"),
    ({"type": "discrete", "points": {}}, "a discrete distribution needs at least one point"),
    ({"type": "discrete", "points": {"0": 0, "1": 0}}, "probabilities must sum to more than 0"),
    ({"type": "discrete", "points": {"0": 2, "1": -1}}, "probabilities must be >= 0"),
    ({"type": "discrete", "points": {"0": "1"}}, "a probability must be a number"),
    ({"type": "discrete", "points": {"nan": 1}}, "point 'nan' is not a finite number"),
    ({"type": "discrete", "points": {"Infinity": 1}}, "point 'Infinity' is not a finite number"),
    ({"type": "discrete", "points": {"1e999": 1}}, "point '1e999' is not a finite number"),
    ({"type": "discrete", "points": {"1_0": 1}}, "point '1_0' is not a finite number"),
    ({"type": "discrete", "points": {" 1": 1}}, "point ' 1' is not a finite number"),
    ({"type": "discrete", "points": {"0": 1, "1\n": 1}}, "point '1\\n' is not a finite number"),
    ({"type": "discrete", "points": {"0": 1, "1,\t2": 1}}, "point '1,\\t2' is not a finite number"),
    ({"type": "discrete", "points": {"\u0661": 1}}, "point '\\u0661' is not a finite number"),
    ({"type": "discrete", "points": {"1e10": 1}}, "values must be between -1e+09 and 1e+09"),
    ({"type": "discrete", "values": ["0.1"], "weights": [1]}, "values must be a number"),
    ({"type": "discrete", "values": [0.1, 0.2], "weights": [1]}, "2 values but 1 weights"),
    ({"type": "discrete", "values": [0.1], "weights": [True]}, "a probability must be a number"),
    ({"type": "discrete", "points": {}, "values": []}, "has both points and values; give one"),
    (
        {"type": "discrete", "points": {str(i): 1 for i in range(1025)}},
        "1025 points; at most 1024 are allowed",
    ),
    ("norm", "prediction must be an object"),
]


@pytest.mark.parametrize(("density", "words"), FAULTS, ids=[words[:40] for _, words in FAULTS])
def test_a_fault_is_named_with_its_segment_and_field(density: Any, words: str) -> None:
    told = reason(answer(density))
    assert told.startswith(f"segment 3: {words}")
    assert len(told) < 300


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"", "not JSON: "),
        (b"[", "not JSON: "),
        (b"\x00", "not JSON: "),
        (b"[] []", "not JSON: "),
        (b"null", "the answer must be a list of densities"),
        (b'{"step": 300}', "the answer must be a list of densities"),
        (b"[]", "the answer has 0 densities; 3 are expected"),
        (json.dumps([NORMAL] * 4).encode(), "the answer has 4 densities; 3 are expected"),
        (b"[1, 2, 3]", "segment 1: a density must be an object"),
        (
            json.dumps([{"prediction": NORMAL, "type": "x"}] * 3).encode(),
            "segment 1: has both prediction and type",
        ),
        (json.dumps([{"prediction": NORMAL, "step": None}] * 3).encode(), "segment 1: step must be a number"),
        (answer(NORMAL).replace(b"0.001", b"NaN"), "NaN is not allowed (byte 97: segment 1)"),
        (answer(NORMAL).replace(b"0.001", b"Infinity"), "Infinity is not allowed (byte 97: segment 1)"),
        (answer(NORMAL).replace(b"0.001", b"1e999"), "not JSON: "),
        (answer(NORMAL).replace(b"0.001", b"9" * 5000), "not JSON: "),
        (answer(NORMAL).replace(b"0.001", b"1" + b"0" * 300), "segment 1: scale must be between"),
        (answer(leaf("t")).replace(b'"t"', b'"\xff"'), "not JSON: the text is not UTF-8"),
        (answer(leaf("t")).replace(b'"t"', b'"\\ud800"'), "not JSON: "),
    ],
)
def test_what_is_no_answer_at_all_is_rejected(payload: bytes, words: str) -> None:
    assert reason(payload).startswith(words)


def test_bounds_follow_the_price_where_the_target_is_a_price_change() -> None:
    payload = json.dumps([leaf("norm", scale=1e-5)] * 3).encode()
    assert read(payload, scale_unit=1e3).scale[0] == 1e-5
    assert reason(payload, scale_unit=1e5) == "segment 1: scale must be between 0.0001 and 1e+14"
    tiny = json.dumps([leaf("norm", scale=1e-13)] * 3).encode()
    assert read(tiny, scale_unit=1e-5).scale[0] == 1e-13


@pytest.mark.parametrize("discrete", [{"0": 1}, {"type": "discrete", "values": [0], "weights": [1]}])
def test_a_discrete_distribution_has_no_likelihood(discrete: dict[str, Any]) -> None:
    told = reason(answer(mixture((NORMAL, 1), (discrete, 1))), rule="likelihood")
    assert told == "segment 3: component 2: a discrete distribution has no likelihood"


def test_of_duplicate_keys_the_last_counts_in_either_way_of_reading() -> None:
    twice = b'{"type":"builtin","name":"%b","params":{"scale":1e-5,"scale":0.5}}'
    for name in (b"norm", b"laplace"):
        densities = read(b"[" + b",".join([twice % name] * 3) + b"]")
        assert densities.scale.tolist() == [0.5, 0.5, 0.5]


HOSTILE = {
    "arrays": b"[" * 200_000,
    "objects": b'{"a":' * 100_000,
    "nested mixtures": b'[{"type":"mixture","components":[{"weight":1,"density":'
    + b'{"type":"mixture","components":'
    b'[{"weight":1,"density":' * 10_000,
    "nested parameters": b'[{"type":"builtin","name":"norm","params":' + b"[" * 200_000,
    "whitespace": b" " * 500_000 + b"[]",
    "empty lists": b"[" + b"[]," * 150_000 + b"[]]",
    "empty objects": b"[" + b"{}," * 150_000 + b"{}]",
    "digits": b"[" + b"9" * 500_000 + b"]",
    "fraction": b"[0." + b"9" * 500_000 + b"]",
    "many points": b'[{"' + b",".join(b'%d":1' % i for i in range(50_000)).replace(b",", b',"') + b"}]",
    "one string": b'["' + b"\\u00e9" * 80_000 + b'"]',
    "one key": b'[{"' + b"x" * 500_000 + b'": 1}]',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_payload_costs_little_and_is_rejected(name: str) -> None:
    day = Setting("BTC", 86400, 300)
    tracemalloc.start()
    started_s = time.process_time()
    told = reason(HOSTILE[name], day)
    spent_s = time.process_time() - started_s
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(told) < 300
    assert peak < 64 * 2**20
    assert spent_s < 30.0  # a hang, not a slow machine


def test_size_is_bounded_before_anything_is_parsed() -> None:
    limit = LIMITS.payload_bytes(3)
    assert limit == 3 * 2048 + 16 * 1024
    padded = answer(NORMAL) + b" " * (limit - len(answer(NORMAL)))
    assert read(padded).n == 3
    assert (
        reason(padded + b" ")
        == f"the answer has {limit + 1} bytes; at most {limit} are accepted for 3 segments"
    )


def test_densities_pickle_as_plain_arrays() -> None:
    day = Setting("BTC", 86400, 300)
    payload = json.dumps([mixture((NORMAL, 1), (NORMAL, 2), (NORMAL, 3))] * 288).encode()
    densities = decode(payload, day, LIMITS)
    copy = pickle.loads(pickle.dumps(densities))
    assert same(densities, copy)
    assert len(pickle.dumps(densities)) < 60 * 3 * 288


def test_parts_and_intervals_of_densities() -> None:
    densities = read(answer(mixture((leaf("t"), 1), ({"0.5": 1}, 1))))
    x = np.array([0.0, 0.0005, 0.5])
    np.testing.assert_allclose(densities.cdf(x)[0], 0.5)
    assert same(densities.take(np.array([2])).take(np.array([0])), densities.take(np.array([2])))
    np.testing.assert_allclose(
        densities.take(np.array([0, 2])).cdf(x[[0, 2]]), densities.cdf(x)[[0, 2]], rtol=0
    )
    around = densities.interval(x - 1e-9, x)
    assert around[2] == pytest.approx(0.5, abs=1e-8)  # the point is inside (x - h, x]
    assert densities.interval(x, x + 1e-9)[2] < 1e-8
    far = densities.interval(np.full(3, 0.0081), np.full(3, 0.009))
    assert far[0] == pytest.approx(math.erfc(8.1 / math.sqrt(2)) / 2, rel=1e-3)


numbers = st.one_of(
    st.floats(),
    st.integers(),
    st.booleans(),
    st.none(),
    st.sampled_from(["0.1", "NaN", [], {}, 1e-9, 1e9, 0, -0.0, 5e-324]),
)
leaves = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["builtin", "scipy", "statistics", "mixture", "discrete", "x", 1]),
        "name": st.sampled_from([*BY_NAME, "normal", "point", "x"]),
        "params": st.dictionaries(
            st.sampled_from(["loc", "scale", "mu", "sigma", "df", "s", "a", "b", "c", "dfn", "dfd", "x"]),
            numbers,
        ),
        "points": st.dictionaries(st.one_of(st.text(max_size=4), st.floats().map(str)), numbers, max_size=3),
        "values": st.lists(numbers, max_size=3),
        "weights": st.lists(numbers, max_size=3),
    },
)
trees = st.recursive(
    leaves,
    lambda inner: st.fixed_dictionaries(
        {
            "type": st.just("mixture"),
            "components": st.lists(
                st.fixed_dictionaries({"density": inner, "weight": numbers}), min_size=1, max_size=3
            ),
        }
    ),
    max_leaves=6,
)


def finds_only_clean_rejections(payload: bytes) -> None:
    try:
        densities = read(payload, Setting("BTC", 300, 300))
    except InvalidAnswer as error:
        assert 0 < len(str(error)) < 300  # noqa: PT017
        return
    assert densities.n == 1
    assert densities.weight.sum() == pytest.approx(1.0)
    assert (densities.weight > 0).all()
    assert np.isfinite(densities.loc).all()
    assert ((densities.scale >= 1e-9) & (densities.scale <= 1e9)).all()


@settings(max_examples=150)
@given(st.one_of(trees, st.dictionaries(st.text(max_size=3), numbers, max_size=3)))
def test_fuzzed_densities_are_sound_or_rejected(tree: Any) -> None:
    finds_only_clean_rejections(json.dumps([tree]).encode())


@settings(max_examples=100)
@given(st.binary(max_size=60))
def test_fuzzed_bytes_are_rejected(data: bytes) -> None:
    finds_only_clean_rejections(data)


VALID = json.dumps(
    [{"step": 300, "prediction": mixture((NORMAL, 1), (leaf("t"), 2), ({"0.1": 1}, 1))}]
).encode()


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_mutated_answers_are_sound_or_rejected(changes: list[tuple[int, int]]) -> None:
    mutated = bytearray(VALID)
    for at, byte in changes:
        mutated[at] = byte
    finds_only_clean_rejections(bytes(mutated))


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["norm", "t", "laplace", "logistic", "cauchy", "expon"]),
            st.floats(-1e9, 1e9),
            st.floats(1e-9, 1e9),
            st.floats(0.4, 1e9),
            st.floats(0, 1e308),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_both_ways_of_reading_agree(parts: list[tuple[str, float, float, float, float]]) -> None:
    density = mixture(
        *[
            (leaf(name, loc=loc, scale=scale, **({"df": df} if name == "t" else {})), weight)
            for name, loc, scale, df, weight in parts
        ]
    )
    payload, setting = json.dumps([density]).encode(), Setting("BTC", 300, 300)
    try:
        careful = Reader(setting, LIMITS, "crps", 1.0).read(msgspec.json.decode(payload))
    except InvalidAnswer as error:
        assert reason(payload, setting) == str(error)  # noqa: PT017
    else:
        assert same(decode(payload, setting, LIMITS), careful)


def test_the_families_are_those_of_the_specification() -> None:
    without_shapes = {"norm", "laplace", "logistic", "expon", "uniform", "rayleigh", "cauchy"}
    assert set(BY_NAME) == without_shapes | set(SHAPES)
    assert len(CODES) == len(FAMILIES) == len(BY_NAME) + 1
