"""Secure connections: what the host's own credentials must be, which models are refused under them, and why.

The client library verifies a model's certificate (a TLS probe at each connection) and its wallet's signed
delegation (in the metadata of each reply). Added here: the delegation's `expires_at`, which the library never
looks at; a lost or late call is not taken for a forged one; and reasons in words.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from time import time as wall_now_s
from typing import Any

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from model_runner_client.security.credentials import SecureCredentials
from model_runner_client.security.gateway_credentials import GatewayCredentials
from model_runner_client.security.grpc_auth_interceptor import WalletTlsAuthClientInterceptor
from model_runner_client.security.tls_peer_key import TlsProbeError, fetch_peer_rsa_spki_mtls
from model_runner_client.security.wallet_gelegation import AuthError, decode_signed_message

from condor_lite.config_sections import OrchestratorConfig
from condor_lite.errors import ConfigError

_STATUS_WAIT_S = 1.0  # how long the status of a call without metadata may lag behind
_MAX_REASON_CHARS = 200

# By OpenSSL's verify codes (X509_V_ERR_*)
_WRONG_ISSUER = "its certificate was not issued by the ca.crt in orchestrator.credentials"
_CERTIFICATE = {
    7: _WRONG_ISSUER,
    9: "its certificate is not valid yet",
    10: "its certificate has expired",
    18: _WRONG_ISSUER,
    19: _WRONG_ISSUER,
    20: _WRONG_ISSUER,
    21: _WRONG_ISSUER,
    62: "its certificate is for another model",
}
_NOT_TLS = {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST"}


def load_credentials(config: OrchestratorConfig) -> dict[str, SecureCredentials | GatewayCredentials]:
    """What the client library takes as `secure_credentials` or `gateway_credentials`; empty for neither.

    Raises ConfigError with what is wrong with which file.
    """
    if config.mode != "remote":
        return {}
    if folder := config.credentials:
        if problems := [f"orchestrator.credentials: {problem}" for problem in _problems(folder)]:
            raise ConfigError(problems)
        try:
            return {"secure_credentials": SecureCredentials.from_directory(folder)}
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise ConfigError(
                [f"orchestrator.credentials: {folder} can't be used for TLS: {_first_line(error)}"]
            ) from None
    if path := config.gateway_key:
        try:
            key = _private_key(path)
            if not isinstance(key, rsa.RSAPrivateKey):
                raise _FileError(path, "is not an RSA key; a gateway takes no other kind")
        except _FileError as error:
            raise ConfigError([f"orchestrator.gateway_key: {error}"]) from None
        return {"gateway_credentials": GatewayCredentials(key)}
    return {}


class _FileError(Exception):
    def __init__(self, path: Path, wrong: str) -> None:
        super().__init__(f"{path} {wrong}")


def _problems(folder: Path) -> Iterator[str]:
    """What is wrong with each of the folder's files, and with one beside another."""
    certificate = key = None
    try:
        _certificates(folder / "ca.crt")
    except _FileError as error:
        yield str(error)
    try:
        certificate = _certificates(folder / "tls.crt")[0]
    except _FileError as error:
        yield str(error)
    try:
        key = _private_key(folder / "tls.key")
    except _FileError as error:
        yield str(error)
    if certificate and key and _der(certificate.public_key()) != _der(key.public_key()):
        yield f"{folder / 'tls.key'} is not the key of {folder / 'tls.crt'}; take both from the same place"


def _der(public_key: Any) -> bytes:
    encoded: bytes = public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return encoded


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _FileError(path, f"can't be read ({error.strerror or error})") from None


def _certificates(path: Path) -> list[x509.Certificate]:
    """The certificates in a PEM file, of which the first (the others are its issuers) is valid now."""
    try:
        certificates = x509.load_pem_x509_certificates(_read(path))
    except ValueError:
        raise _FileError(path, "holds no certificate in PEM form (-----BEGIN CERTIFICATE-----)") from None
    from_, until = certificates[0].not_valid_before_utc, certificates[0].not_valid_after_utc
    now_s = wall_now_s()
    if until.timestamp() <= now_s:
        raise _FileError(path, f"expired on {until:%Y-%m-%d %H:%M} UTC; get a new one")
    if from_.timestamp() > now_s:
        raise _FileError(
            path, f"is not valid before {from_:%Y-%m-%d %H:%M} UTC; is this machine's clock right?"
        )
    return certificates


def _private_key(path: Path) -> PrivateKeyTypes:
    data = _read(path)
    try:
        return load_pem_private_key(data, password=None)
    except TypeError:  # how the library says that a password is missing
        raise _FileError(path, "is encrypted; store it without a passphrase, readable by you only") from None
    except (ValueError, UnsupportedAlgorithm):
        raise _FileError(path, "holds no private key in PEM form (-----BEGIN PRIVATE KEY-----)") from None


class DelegationGuard(WalletTlsAuthClientInterceptor):
    """Lets no reply pass that does not carry its wallet's delegation, valid on the wall's clock.

    Sits in the path of every call to one model. Raises AuthError with the reason.
    """

    def __init__(self, **expected: Any) -> None:
        super().__init__(**expected)
        self._verified: tuple[Any, ...] | None = None
        self._expires_at_s: float | None = None

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        """The library's check, but a call that failed goes on to its caller as what it was."""
        call = await continuation(client_call_details, request)
        try:
            try:
                await self._verify_from_call_headers(
                    client_call_details.method, await call.initial_metadata()
                )
            except AuthError:
                if not await _failed(call):
                    raise
        except BaseException:
            call.cancel()
            raise
        return call

    async def _verify_from_call_headers(self, method: str, md: Any) -> None:
        headers = {str(key).lower(): value for key, value in md}
        presented = tuple(headers.get(key) for key in (self.MESSAGE_KEY, self.SIGNATURE_KEY, self.WALLET_KEY))
        if presented != self._verified:  # 0.1 ms of the event loop that most replies need not cost
            try:
                await super()._verify_from_call_headers(method, md)
                expires_at = decode_signed_message(base64.b64decode(headers[self.MESSAGE_KEY])).get(
                    "expires_at"
                )
                self._expires_at_s = None if expires_at is None else float(int(expires_at))
            except AuthError:
                raise
            except Exception as error:  # signed by the wallet, and still no delegation
                raise AuthError(f"it can't be read: {type(error).__name__}: {error}") from error
            self._verified = presented
        if self._expires_at_s is not None and wall_now_s() >= self._expires_at_s:
            raise AuthError(f"it expired {_when(self._expires_at_s)}")


async def _failed(call: Any) -> bool:
    """Whether the call ended with a gRPC error: then there is neither metadata nor a reply to mistrust."""
    try:
        async with asyncio.timeout(_STATUS_WAIT_S):
            return await call.code() is not grpc.StatusCode.OK
    except TimeoutError:
        return False


def _when(at_s: float) -> str:
    try:
        return f"on {datetime.fromtimestamp(at_s, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, ValueError, OSError):
        return "long ago"


async def secure_channels(model: Any, credentials: SecureCredentials) -> tuple[Any, Any]:
    """Channels for the calls and for health checks to `model` (a ModelRunner), guarded as above.

    As the library makes them. Raises TlsProbeError where the model is refused, and TimeoutError where it
    can't be reached, which the library takes for a reason to try again: it may not listen yet.
    """
    try:
        peer = await fetch_peer_rsa_spki_mtls(
            host=model.ip, port=model.port, tls_ctx=credentials.tls_ctx, server_hostname=model.server_hostname
        )
    except TlsProbeError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError):
            raise TimeoutError(f"cannot connect: {cause.strerror or cause}") from error
        raise
    channel_credentials = grpc.ssl_channel_credentials(
        root_certificates=peer.leaf_cert_pem,
        private_key=credentials.key_bytes,
        certificate_chain=credentials.cert_bytes,
    )
    infos = model.infos if isinstance(model.infos, dict) else {}
    guard = DelegationGuard(
        expected_wallet_pub_b58=infos.get("cruncher_wallet_pubkey"),
        expected_hotkey=infos.get("cruncher_hotkey"),
        expected_model_id=model.model_id,
        tls_pub=peer.spki_der,
    )
    target = f"{model.ip}:{model.port}"
    return (
        grpc.aio.secure_channel(target, channel_credentials, model.grpc_options, interceptors=[guard]),
        grpc.aio.secure_channel(target, channel_credentials, model.grpc_options),
    )


def refusal(error: BaseException) -> str:
    """Why a model was refused, or refuses us, in words for its host."""
    if isinstance(error, AuthError):
        return f"its wallet's delegation is refused: {_first_line(error)}"
    if not isinstance(error, TlsProbeError):
        return _first_line(error) or type(error).__name__
    cause = error.__cause__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return _CERTIFICATE.get(cause.verify_code, f"its certificate is refused: {cause.verify_message}")
    if isinstance(cause, ssl.SSLError):
        reason = cause.reason or "the connection broke"
        if reason in _NOT_TLS:
            return "it does not speak TLS, as orchestrator.credentials asks for"
        if "ALERT" in reason:
            return f"it refuses the certificate in orchestrator.credentials ({reason})"
        return f"the TLS handshake failed ({reason})"
    if "terminated the connection" in str(error):
        return "it closed the connection after the TLS handshake: it may refuse orchestrator.credentials"
    return _first_line(error)


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:_MAX_REASON_CHARS] if lines else ""
