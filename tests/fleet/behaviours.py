"""What a model may do to the game: well-behaved, broken and hostile, each by its name.

Every behaviour takes ticks as it should where the name does not say otherwise.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import random
from collections.abc import Callable
from functools import lru_cache

import grpc
import orjson
from model_runner_client.grpc.generated.commons_pb2 import Status, VariantType
from model_runner_client.grpc.generated.dynamic_subclass_pb2 import CallRequest, SetupRequest, SetupResponse

from tests.fleet.model import (
    DONE,
    Abort,
    Behaviour,
    ModelServer,
    SetupBehaviour,
    Wire,
    answers_well,
    asked,
    hang,
    normals,
    refusal,
    success,
)

SLOW_S = 0.1
UNKNOWN_KIND = 99


def _on_predict(answer: Callable[[CallRequest], Wire]) -> Behaviour:
    async def behaviour(model: ModelServer, request: CallRequest) -> Wire:
        return DONE if request.methodName == "tick" else answer(request)

    return behaviour


def _aborts(code: grpc.StatusCode, details: str) -> Behaviour:
    async def behaviour(model: ModelServer, request: CallRequest) -> Wire:
        if request.methodName == "predict":
            raise Abort(code, details)
        return DONE

    return behaviour


# -- time ----------------------------------------------------------------------------------------------------


async def slow(model: ModelServer, request: CallRequest) -> Wire:
    await asyncio.sleep(SLOW_S)
    return await answers_well(model, request)


async def hangs(model: ModelServer, request: CallRequest) -> Wire:
    if request.methodName == "predict":
        await hang()
    return await answers_well(model, request)


async def hangs_in_tick(model: ModelServer, request: CallRequest) -> Wire:
    if request.methodName == "tick" and model.calls > 1:  # its history it takes
        await hang()
    return await answers_well(model, request)


async def deaf(model: ModelServer, request: CallRequest) -> Wire:
    """Works on after its caller gave up, as the public server does: the next call is refused as busy."""
    if request.methodName == "predict":
        model.stuck = True
        await hang()
    return await answers_well(model, request)


async def late(model: ModelServer, request: CallRequest) -> Wire:
    """Answers, but after any deadline of a test."""
    if request.methodName == "predict":
        await asyncio.sleep(30)
    return await answers_well(model, request)


# -- the process ---------------------------------------------------------------------------------------------


async def exits(model: ModelServer, request: CallRequest) -> Wire:
    """Crashes in a call, and with it every model of its process."""
    if request.methodName == "predict":
        os._exit(1)
    return await answers_well(model, request)


async def breaks_off(model: ModelServer, request: CallRequest) -> Wire:
    """Its server ends in the middle of a call, and is there again on the same port, without Setup."""
    if request.methodName == "predict":
        model.restarting = asyncio.create_task(model.restart())
        await hang()
    return await answers_well(model, request)


async def forgets_setup(model: ModelServer, request: CallRequest) -> Wire:
    """Time and again it turns out to have been restarted."""
    if request.methodName == "predict" and model.calls % 3 == 2:
        model.instance = False
        return refusal("FAILED_PRECONDITION", "Setup has not been called yet")
    return await answers_well(model, request)


# -- Setup ---------------------------------------------------------------------------------------------------


def refuses_setup(code: str) -> SetupBehaviour:
    async def setup(model: ModelServer, request: SetupRequest) -> SetupResponse:
        return SetupResponse(status=Status(code=code, message=f"told to say {code}"))

    return setup


async def hangs_in_setup(model: ModelServer, request: SetupRequest) -> SetupResponse:
    await hang()
    raise AssertionError("unreachable")


# -- the protocol --------------------------------------------------------------------------------------------


def _broken_utf8_status(request: CallRequest) -> bytes:
    return refusal("MODEL_FAILED", "broken: ??").SerializeToString().replace(b"??", b"\xff\xfe")


def _huge_integer_variant(request: CallRequest) -> Wire:
    return success(b"\x7f" * 100_000, VariantType.INT)


# -- the answer ----------------------------------------------------------------------------------------------


def _padded(request: CallRequest, size: int) -> bytes:
    return normals(request)[:-1].ljust(size - 1) + b"]"


@lru_cache(maxsize=8)
def _noise(size: int) -> bytes:
    digits = random.Random(0).randbytes(size // 2).hex().encode()
    return b'["' + digits[: size - 4] + b'"]'


def answer_of(size: int) -> Behaviour:
    """Answers with `size` bytes of JSON that compress badly: what costs most to receive and store."""
    return _on_predict(lambda request: success(_noise(size)))


def _changed(request: CallRequest, change: Callable[[list[dict[str, object]]], None]) -> Wire:
    densities = orjson.loads(normals(request))
    change(densities)
    return success(orjson.dumps(densities))


def _written(request: CallRequest, number: bytes) -> Wire:
    """A good answer but for one number, as Python's `json` would write it."""
    return success(normals(request).replace(b'"loc":0.0', b'"loc":' + number, 1))


class _Payload:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("echo pwned",)


def _fickle() -> Behaviour:
    turns = itertools.count(1)

    async def behaviour(model: ModelServer, request: CallRequest) -> Wire:
        if request.methodName == "tick":
            return DONE
        return success(normals(request, sigma=1e-4 * (1 + next(turns) % 7)))

    return behaviour


MIB = 2**20

BEHAVIOURS: dict[str, Behaviour] = {
    "well": answers_well,
    "fickle": _fickle(),
    "slow": slow,
    "hangs": hangs,
    "hangs_in_tick": hangs_in_tick,
    "deaf": deaf,
    "late": late,
    "exits": exits,
    "breaks_off": breaks_off,
    "forgets_setup": forgets_setup,
    "raises": _on_predict(lambda request: refusal("MODEL_FAILED", "division by zero")),
    "invalid_argument": _on_predict(lambda request: refusal("INVALID_ARGUMENT", "no such asset")),
    "bad_implementation": _on_predict(lambda request: refusal("BAD_IMPLEMENTATION", "no method predict")),
    "setup_failed": _on_predict(lambda request: refusal("SETUP_FAILED", "no weights")),
    "unknown_code": _on_predict(lambda request: refusal("EXPLODED", "boom\nand more of it")),
    "no_code": _on_predict(lambda request: b""),
    "grpc_internal": _aborts(grpc.StatusCode.INTERNAL, "inner\nworkings"),
    "grpc_unimplemented": _aborts(grpc.StatusCode.UNIMPLEMENTED, "no such method"),
    "grpc_unauthenticated": _aborts(grpc.StatusCode.UNAUTHENTICATED, "who are you"),
    "grpc_deadline": _aborts(grpc.StatusCode.DEADLINE_EXCEEDED, "says who"),
    "grpc_refuses": _aborts(grpc.StatusCode.RESOURCE_EXHAUSTED, "Server busy"),
    "not_protobuf": _on_predict(lambda request: b"\xff\xff\xff\xff not a message"),
    "broken_utf8_status": _on_predict(_broken_utf8_status),
    "unknown_kind": _on_predict(lambda request: success(b"[]", UNKNOWN_KIND)),
    "parquet": _on_predict(lambda request: success(b"PAR1\x15\x04\x15PAR1", VariantType.PARQUET)),
    "double": _on_predict(lambda request: success(b"\0" * 8, VariantType.DOUBLE)),
    "huge_integer_variant": _on_predict(_huge_integer_variant),
    "nothing": _on_predict(lambda request: DONE),
    "empty": _on_predict(lambda request: success(b"")),
    "broken_utf8": _on_predict(lambda request: success(b'["\xff\xfe\x80"]')),
    "truncated": _on_predict(lambda request: success(normals(request)[:-20])),
    "deep": _on_predict(lambda request: success(b"[" * 200_000 + b"]" * 200_000)),
    "nan": _on_predict(lambda request: _written(request, b"NaN")),
    "infinity": _on_predict(lambda request: _written(request, b"-Infinity")),
    "overflow": _on_predict(lambda request: _written(request, b"1e999")),
    "huge_integer": _on_predict(lambda request: _written(request, b"9" * 100_000)),
    "pickle": _on_predict(lambda request: success(pickle.dumps(_Payload()))),
    "too_few": _on_predict(lambda request: _changed(request, lambda densities: densities.clear())),
    "too_many": _on_predict(lambda request: _changed(request, lambda d: d.append(d[-1]))),
    "wrong_segments": _on_predict(lambda request: _changed(request, lambda d: d.reverse())),
    "four_mib": _on_predict(lambda request: success(_padded(request, 4 * MIB))),
    "five_mib": _on_predict(lambda request: success(_padded(request, 5 * MIB))),
    "bomb": _on_predict(lambda request: success(b"[" + b"0" * (16 * MIB) + b"]")),
}
"""By name. A `bomb` is one only from a server that compresses."""


def server(model_id: str, name: str, **given: object) -> ModelServer:
    """A model that behaves as `name` says."""
    compression = grpc.Compression.Gzip if name == "bomb" else None
    return ModelServer(model_id, BEHAVIOURS[name], compression=compression, **given)  # type: ignore[arg-type]


__all__ = ["BEHAVIOURS", "answer_of", "asked", "hangs_in_setup", "refuses_setup", "server"]
