"""Secure connections over real TLS: whose models play, which are refused, and what the host is told."""

from __future__ import annotations

import base64
import gc
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from weakref import WeakSet

import base58
import grpc
import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_public_key,
)
from model_runner_client.grpc.generated.dynamic_subclass_pb2 import (
    CallRequest,
    SetupRequest,
    SetupResponse,
)
from structlog.testing import capture_logs

from condor_lite import check
from condor_lite.errors import ConfigError
from condor_lite.models import security
from condor_lite.models.fleet import Fleet
from condor_lite.models.runner import Connection
from tests import fleet
from tests.fleet import ModelServer
from tests.fleet.model import Abort, Wire
from tests.stage import CONFIG, START_S, Stage, load, staged, until, within

pytestmark = [
    pytest.mark.anyio,
    # The client library's probe leaves a connection that ended, or took too long, to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed <StreamWriter:ResourceWarning"),
]


@pytest.fixture(autouse=True)
async def _leave_nothing_to_later_tests(anyio_backend: str) -> AsyncIterator[None]:
    """While the loop lives: what is found later can't be closed any more."""
    yield
    gc.collect()


SECURE = f'{CONFIG}credentials = "credentials"\n'
GATEWAY = f'{CONFIG}gateway_key = "gateway.key"\n'
TRUST = "x-server-auth-message", "x-server-auth-signature", "x-server-wallet-pubkey"

Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


@cache
def rsa_key(owner: str) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def pem(key: Key, password: bytes | None = None) -> bytes:
    locked = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked)


def der(key: Key) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def days(number: float) -> timedelta:
    return timedelta(days=number)


YESTERDAY, NEXT_WEEK = days(-1), days(7)


@dataclass
class Authority:
    """A certificate authority. `host` and the models have one; a stranger's may have the same name."""

    name: str = "test authority"
    owner: str = "authority"

    @property
    def certificate(self) -> bytes:
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        return self._sign(self.name, rsa_key(self.owner), [constraints], YESTERDAY, NEXT_WEEK)

    def issue(
        self,
        name: str,
        key: Key,
        *,
        from_: timedelta = YESTERDAY,
        until: timedelta = NEXT_WEEK,
        ip: str | None = None,
    ) -> bytes:
        names = x509.SubjectAlternativeName([x509.IPAddress(ip_address(ip))] if ip else [x509.DNSName(name)])
        return self._sign(name, key, [names], from_, until)

    def _sign(self, name: str, key: Key, extensions: list[Any], from_: timedelta, until: timedelta) -> bytes:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, self.name)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + from_)
            .not_valid_after(now + until)
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(rsa_key(self.owner), hashes.SHA256()).public_bytes(Encoding.PEM)


AUTHORITY = Authority()
STRANGER = Authority(owner="stranger")


class Wallet:
    """A player's wallet, which signs what its models may show."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()
        self.address = base58.b58encode(self._key.public_key().public_bytes_raw()).decode()

    def delegation(self, **claims: Any) -> tuple[tuple[str, str], ...]:
        return self.signed(json.dumps(claims).encode())

    def signed(self, message: bytes) -> tuple[tuple[str, str], ...]:
        signature = self._key.sign(message)
        values = base64.b64encode(message).decode(), base64.b64encode(signature).decode(), self.address
        return tuple(zip(TRUST, values, strict=True))


WALLET = Wallet()
HOTKEY = "hotkey of the player"


def claims(model_id: str, **other: Any) -> dict[str, Any]:
    """What a good delegation says."""
    key = base64.b64encode(der(rsa_key("models"))).decode()
    tomorrow_s = int(time.time()) + 86400
    return {"cert_pub": key, "model_id": model_id, "hotkey": HOTKEY, "expires_at": tomorrow_s, **other}


def server_credentials(
    certificate: bytes, key: Key, client_authority: Authority | None = AUTHORITY
) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials(
        [(pem(key), certificate)],
        root_certificates=client_authority.certificate if client_authority else None,
        require_client_auth=client_authority is not None,
    )


@dataclass
class SecureModel(ModelServer):
    """A model that shows `metadata` with each reply."""

    metadata: tuple[tuple[str, str], ...] = ()

    async def Setup(self, request: SetupRequest, context: Any) -> SetupResponse:  # noqa: N802
        await self._show(context)
        return await super().Setup(request, context)

    async def Call(self, request: CallRequest, context: Any) -> Wire:  # noqa: N802
        await self._show(context)
        return await super().Call(request, context)

    async def _show(self, context: Any) -> None:
        if self.metadata:
            await context.send_initial_metadata(self.metadata)


def secure_model(
    model_id: str,
    *,
    metadata: tuple[tuple[str, str], ...] | None = None,
    authority: Authority = AUTHORITY,
    client_authority: Authority = AUTHORITY,
    certified_as: str | None = None,
    key: Key | None = None,
    **validity: timedelta,
) -> SecureModel:
    """A model that is right in everything that is not said otherwise."""
    key = key or rsa_key("models")
    name = f"model-node-{certified_as or model_id}.crunchdao.internal"
    return SecureModel(
        model_id,
        infos={"cruncher_wallet_pubkey": WALLET.address, "cruncher_hotkey": HOTKEY},
        credentials=server_credentials(authority.issue(name, key, **validity), key, client_authority),
        metadata=WALLET.delegation(**claims(model_id)) if metadata is None else metadata,
    )


def write_credentials(folder: Path) -> Path:
    credentials = folder / "credentials"
    credentials.mkdir()
    key = rsa_key("host")
    (credentials / "ca.crt").write_bytes(AUTHORITY.certificate)
    (credentials / "tls.crt").write_bytes(AUTHORITY.issue("host", key))
    (credentials / "tls.key").write_bytes(pem(key))
    return credentials


async def announce(stage: Stage, *models: ModelServer) -> None:
    """Start and announce models without waiting for them."""
    for model in models:
        await model.start()
        stage.models.append(model)
    await stage.orchestrator.announce(*models)


def impatient_with(model: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library gives up after 10 s, a connection to `model`, ends at the first failure."""
    made_of = grpc.aio._channel.Channel
    make, ready = made_of.__init__, made_of.channel_ready
    theirs: WeakSet[grpc.aio.Channel] = WeakSet()

    def noting(self: grpc.aio.Channel, target: str, *rest: Any) -> None:
        make(self, target, *rest)
        if target == f"127.0.0.1:{model.port}":
            theirs.add(self)

    async def impatient(self: grpc.aio.Channel) -> None:
        await (_first_try(self) if self in theirs else ready(self))

    monkeypatch.setattr(made_of, "__init__", noting)
    monkeypatch.setattr(made_of, "channel_ready", impatient)


async def _first_try(channel: grpc.aio.Channel) -> None:
    state = channel.get_state(try_to_connect=True)
    while state is not grpc.ChannelConnectivity.READY:
        if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            raise TimeoutError
        await channel.wait_for_state_change(state)
        state = channel.get_state(try_to_connect=True)


def refused_models() -> dict[str, tuple[ModelServer, str]]:
    """By model id: a model with one thing wrong, and part of what must be said of it."""
    now_s = int(time.time())
    forged = WALLET.delegation(**claims("forged"))[0], *Wallet().delegation(**claims("forged"))[1:2]
    foreign = base64.b64encode(der(rsa_key("host"))).decode()
    plaintext = ModelServer("plaintext", infos={"cruncher_wallet_pubkey": WALLET.address})
    cases = [
        (secure_model("stranger", authority=STRANGER), "not issued by the ca.crt"),
        (secure_model("late", from_=days(-3), until=days(-1)), "certificate has expired"),
        (secure_model("early", from_=days(1)), "certificate is not valid yet"),
        (secure_model("namesake", certified_as="another"), "certificate is for another model"),
        (secure_model("curve", key=ec.generate_private_key(ec.SECP256R1())), "not RSA"),
        (
            secure_model("choosy", client_authority=Authority("someone", "stranger")),
            "orchestrator.credentials",
        ),
        (plaintext, "does not speak TLS"),
        (secure_model("silent", metadata=()), "Missing auth metadata"),
        (secure_model("borrowed", metadata=WALLET.delegation(**claims("another"))), "model_id"),
        (secure_model("thief", metadata=Wallet().delegation(**claims("thief"))), "wallet public key"),
        (secure_model("forged", metadata=(*forged, (TRUST[2], WALLET.address))), "wallet signature"),
        (secure_model("cold", metadata=WALLET.delegation(**claims("cold", hotkey="other"))), "Hotkey"),
        (
            secure_model("copied", metadata=WALLET.delegation(**claims("copied", cert_pub=foreign))),
            "cert_pub",
        ),
        (
            secure_model("lapsed", metadata=WALLET.delegation(**claims("lapsed", expires_at=now_s - 60))),
            "it expired on",
        ),
        (
            secure_model("vague", metadata=WALLET.delegation(**claims("vague", expires_at="soon"))),
            "can't be read",
        ),
        (secure_model("list", metadata=WALLET.signed(b"[]")), "can't be read"),
    ]
    return {model.model_id: (model, reason) for model, reason in cases}


async def test_who_proves_too_little_is_reported_and_hurts_no_other(tmp_path: Path) -> None:
    write_credentials(tmp_path)
    refused = refused_models()
    endless = secure_model("endless", metadata=WALLET.delegation(**{**claims("endless"), "expires_at": None}))
    with capture_logs() as logs:
        async with staged(tmp_path, SECURE) as stage:
            await announce(stage, *(model for model, _ in refused.values()))
            await stage.join(secure_model("good"), endless)
            await until(lambda: len(stage.orchestrator.reports) >= len(refused))
            await stage.play(30)
            answers = await stage.answers()
            assert set(stage.predict.fleet.running) == {"good", "endless"}
    assert {model_id for model_id, _ in answers} == {"good", "endless"}
    assert {status for status, _ in answers.values()} == {"SUCCESS"}
    assert ("good", START_S + 20) in answers
    assert len(stage.orchestrator.reports) == len(refused)
    logged = {entry["model_id"]: entry["reason"] for entry in logs if entry["event"] == "model_given_up"}
    for report in stage.orchestrator.reports:
        model, reason = refused[report["model_id"]]
        assert report["failure_code"] == "CONNECTION_FAILED"
        assert reason in report["failure_reason"], model.model_id
        assert logged[model.model_id] == report["failure_reason"]
    assert not [model.model_id for model, _ in refused.values() if model.predicts]


async def test_a_delegation_that_expires_in_mid_game_ends_as_a_failed_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_credentials(tmp_path)
    lasting = secure_model("lasting", metadata=WALLET.delegation(**claims("lasting", expires_at=2**40)))
    async with staged(tmp_path, SECURE) as stage:
        await stage.join(secure_model("a"), lasting)
        await stage.play(12)
        monkeypatch.setattr(security, "wall_now_s", lambda: time.time() + 2 * 86400)
        await stage.play(20)
        answers = await stage.answers()
        status, detail = answers["a", START_S + 20]
        assert status == "FAILED"
        assert (detail or "").startswith("its wallet's delegation is refused: it expired on")
        assert answers["a", START_S + 10][0] == "SUCCESS"
        assert answers["lasting", START_S + 20][0] == "SUCCESS"
        await until(lambda: stage.orchestrator.reports and "a" not in stage.predict.fleet.running)
        report = stage.orchestrator.reports[0]
        assert (report["model_id"], report["failure_code"]) == ("a", "CONNECTION_FAILED")
        assert report["failure_reason"] == detail


async def test_metadata_is_checked_on_every_call(tmp_path: Path) -> None:
    write_credentials(tmp_path)
    model = secure_model("a")
    async with staged(tmp_path, SECURE) as stage:
        await stage.join(model, secure_model("b"))
        await stage.play(12)
        model.metadata = Wallet().delegation(**claims("a"))
        await stage.play(20)
        answers = await stage.answers()
        assert answers["a", START_S + 20][0] == "FAILED"
        assert "wallet public key" in (answers["a", START_S + 20][1] or "")
        assert answers["b", START_S + 20][0] == "SUCCESS"


async def test_a_late_or_lost_answer_is_not_taken_for_a_forged_one(tmp_path: Path) -> None:
    write_credentials(tmp_path)
    slow, lost = secure_model("slow"), secure_model("lost")
    async with staged(tmp_path, within("4s", SECURE)) as stage:
        await stage.join(slow, lost, *(secure_model(f"good{number}") for number in range(2)))
        await stage.play(12)
        slow.behaviour, slow.metadata = fleet.hangs, ()
        await lost.stop()
        await stage.play(20)
        answers = await stage.answers()
        assert answers["slow", START_S + 20][0] == "TIMEOUT"
        status, detail = answers["lost", START_S + 20]
        assert status == "FAILED"
        assert (detail or "").startswith("cannot connect")
        assert not stage.orchestrator.reports


async def test_a_server_that_refuses_our_call_is_named_as_such(tmp_path: Path) -> None:
    write_credentials(tmp_path)
    model = secure_model("a")

    async def refuses_us(server: ModelServer, request: CallRequest) -> Wire:
        raise Abort(grpc.StatusCode.UNAUTHENTICATED, "the coordinator is not registered")

    async with staged(tmp_path, SECURE) as stage:
        await stage.join(model, secure_model("b"))
        await stage.play(12)
        model.behaviour = refuses_us
        await stage.play(20)
        status, detail = (await stage.answers())["a", START_S + 20]
        assert status == "FAILED"
        assert detail == "the model's server refuses our credentials: the coordinator is not registered"


async def test_a_tls_server_without_credentials_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secure = secure_model("a")
    impatient_with(secure, monkeypatch)
    async with staged(tmp_path) as stage:
        await announce(stage, secure)
        await stage.join(ModelServer("b"))
        await until(lambda: stage.orchestrator.reports)
        report = stage.orchestrator.reports[0]
        assert report["failure_code"] == "CONNECTION_FAILED"
        assert report["failure_reason"] == "it asks for TLS, and orchestrator.credentials is not set"
        assert set(stage.predict.fleet.running) == {"b"}


async def test_a_model_that_does_not_listen_yet_is_tried_again(tmp_path: Path) -> None:
    write_credentials(tmp_path)
    tries: list[float] = []

    class Backoff(float):
        def __pow__(self, attempt: int) -> float:  # type: ignore[override]
            tries.append(attempt)
            return 0.0

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # nobody else is given the port, and nobody listens
        entry = ModelServer("a", port=silent.getsockname()[1]).entry()
        connection = Connection(
            "Tracker",
            max_reply_bytes=1000,
            retry_backoff_factor=Backoff(),
            **security.load_credentials(load(tmp_path, SECURE).orchestrator),
            **{key: entry[key] for key in ("deployment_id", "model_id", "ip", "port", "infos")},
            model_name="a",
        )
        assert await connection.init() == (False, connection.ErrorType.GRPC_CONNECTION_FAILED)
    assert tries == [1, 2]
    assert connection.problem is not None
    assert connection.problem.startswith("cannot connect")
    await connection.close()


# -- gateway ----------------------------------------------------------------------------------------


class BehindGateway(ModelServer):
    """Answers whoever presents a fresh token for this model, signed with the key it knows."""

    known = rsa_key("gateway")

    async def Setup(self, request: SetupRequest, context: Any) -> SetupResponse:  # noqa: N802
        await self._check_token(context)
        return await super().Setup(request, context)

    async def Call(self, request: CallRequest, context: Any) -> Wire:  # noqa: N802
        await self._check_token(context)
        return await super().Call(request, context)

    async def _check_token(self, context: Any) -> None:
        values = dict(context.invocation_metadata())
        message, signature, public = (
            base64.b64decode(values[f"x-gateway-auth-{part}"]) for part in ("message", "signature", "pubkey")
        )
        token = json.loads(message)
        try:
            assert public == der(self.known), "unknown key"
            assert token["model_id"] == self.model_id, "a token for another model"
            assert abs(token["timestamp"] - time.time()) < 60, "a stale token"
            key = load_der_public_key(public)
            assert isinstance(key, rsa.RSAPublicKey)
            key.verify(signature, message, padding.PKCS1v15(), hashes.SHA256())
        except (AssertionError, InvalidSignature) as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))


def behind_gateway(model_id: str, authority: Authority = AUTHORITY) -> BehindGateway:
    key = rsa_key("models")
    certificate = authority.issue("gateway", key, ip="127.0.0.1")
    return BehindGateway(model_id, credentials=server_credentials(certificate, key, None))


async def test_a_gateway_takes_our_token_and_must_be_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gateway.key").write_bytes(pem(rsa_key("gateway")))
    real = grpc.ssl_channel_credentials
    monkeypatch.setattr(grpc, "ssl_channel_credentials", lambda: real(AUTHORITY.certificate))
    at_once = partial(Connection, retry_backoff_factor=0)  # three attempts, without their pauses
    monkeypatch.setattr("condor_lite.models.fleet.Connection", at_once)
    stranger, registered_elsewhere = behind_gateway("stranger", STRANGER), behind_gateway("elsewhere")
    impatient_with(stranger, monkeypatch)
    registered_elsewhere.known = rsa_key("host")
    async with staged(tmp_path, GATEWAY) as stage:
        await announce(stage, stranger, registered_elsewhere)
        await stage.join(behind_gateway("a"), behind_gateway("b"))
        await until(lambda: len(stage.orchestrator.reports) == 2)
        await stage.play(30)
        answers = await stage.answers()
    reasons = {report["model_id"]: report["failure_reason"] for report in stage.orchestrator.reports}
    assert reasons["stranger"] == "this machine does not trust its TLS certificate"
    assert reasons["elsewhere"] == "Setup failed: the model's server refuses our credentials: unknown key"
    assert {model_id for model_id, _ in answers} == {"a", "b"}
    assert {status for status, _ in answers.values()} == {"SUCCESS"}


# -- the host's files -------------------------------------------------------------------------------


def expire(folder: Path) -> None:
    certificate = AUTHORITY.issue("host", rsa_key("host"), from_=days(-3), until=days(-1))
    (folder / "tls.crt").write_bytes(certificate)


def lock_key(folder: Path) -> None:
    (folder / "tls.key").write_bytes(pem(rsa_key("host"), b"secret"))


async def serve_nobody(connection: Connection) -> None:
    raise AssertionError("there is nobody to serve")


WRONG_FILES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("ca.crt", lambda folder: (folder / "ca.crt").write_text("nonsense"), "holds no certificate"),
    ("ca.crt", lambda folder: (folder / "ca.crt").write_bytes(b""), "holds no certificate"),
    ("tls.crt", lambda folder: (folder / "tls.crt").write_bytes(b"\xff\x00" * 99), "holds no certificate"),
    ("tls.crt", expire, "expired on"),
    ("tls.key", lambda folder: (folder / "tls.key").write_text("nonsense"), "holds no private key"),
    ("tls.key", lock_key, "is encrypted"),
    (
        "tls.key",
        lambda folder: (folder / "tls.key").write_bytes(pem(rsa_key("stranger"))),
        "is not the key of",
    ),
]


@pytest.mark.parametrize(("name", "spoil", "wrong"), WRONG_FILES, ids=[case[2] for case in WRONG_FILES])
async def test_a_wrong_file_is_an_error_at_the_start_that_names_it(
    name: str, spoil: Callable[[Path], Any], wrong: str, tmp_path: Path
) -> None:
    folder = write_credentials(tmp_path)
    config = load(tmp_path, SECURE)
    spoil(folder)
    with pytest.raises(ConfigError) as refused:
        Fleet(config, 1, serve_nobody, lambda connection: None)
    assert len(refused.value.problems) == 1
    assert refused.value.problems[0].startswith(f"orchestrator.credentials: {folder / name} {wrong}")
    assert check.obstacles(config) == refused.value.problems


def test_all_wrong_files_are_named_at_once(tmp_path: Path) -> None:
    folder = write_credentials(tmp_path)
    config = load(tmp_path, SECURE)
    for name in ("ca.crt", "tls.crt", "tls.key"):
        (folder / name).unlink()
        (folder / name).mkdir()
    problems = check.obstacles(config)
    assert [problem.split()[1] for problem in problems] == [
        str(folder / name) for name in ("ca.crt", "tls.crt", "tls.key")
    ]
    assert all("can't be read (Is a directory)" in problem for problem in problems)


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b"nonsense", "holds no private key in PEM form"),
        (pem(ec.generate_private_key(ec.SECP256R1())), "is not an RSA key"),
        (pem(rsa_key("gateway"), b"secret"), "is encrypted"),
    ],
    ids=["nonsense", "curve", "encrypted"],
)
def test_a_wrong_gateway_key_is_an_error_at_the_start(content: bytes, wrong: str, tmp_path: Path) -> None:
    (tmp_path / "gateway.key").write_bytes(content)
    problems = check.obstacles(load(tmp_path, GATEWAY))
    assert len(problems) == 1
    assert problems[0].startswith(f"orchestrator.gateway_key: {tmp_path / 'gateway.key'} {wrong}")


def test_good_files_and_no_files_are_no_obstacle(tmp_path: Path) -> None:
    write_credentials(tmp_path)
    (tmp_path / "gateway.key").write_bytes(pem(rsa_key("gateway")))
    for text in (CONFIG, SECURE, GATEWAY):
        assert check.obstacles(load(tmp_path, text)) == []
