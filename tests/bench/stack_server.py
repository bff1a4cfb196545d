"""One token server, on the stack that is named: the real handler, issuer, audit file and TLS. For `run.py` alone.

``stack_server.py aio|sync THREADS fsync|write DIR``: prints its port, and serves until its standard input is closed.

With ``write`` the stacks are compared and not the disk: both hand each record to the kernel before the token leaves.
With ``fsync`` the broker's own stack syncs once for all that wait; the sync stack would sync once for each call.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import uvloop
from cryptography.hazmat.primitives.asymmetric import ec

from carnet.admission import Admission
from carnet.jwk import PublicJWK
from carnet.testing import CertificateAuthority
from carnet.v1 import token_pb2, token_pb2_grpc
from carnet_broker.app import SystemClock
from carnet_broker.core.keyring import Keyring, Timing
from carnet_broker.core.minting import MintingRules
from carnet_broker.core.policy import load_policy
from carnet_broker.core.workload import IdentityCache, LeafRules, TrustBundle, Workload
from carnet_broker.edges.grpc import tokens
from carnet_broker.edges.grpc.calls import AuthenticatedCalls, CallLimits
from carnet_broker.edges.grpc.listeners import ListenerLimits, MutualTls, TlsPems, bind, new_server, server_credentials
from carnet_broker.edges.ledger.json_lines import JsonLinesAudit
from carnet_broker.edges.vault.kv_store import KvSigner
from carnet_broker.group_commit import GroupCommit
from carnet_broker.issuance import Issuer, RefusedError
from carnet_broker.ports import Signer
from carnet_broker.revocation_view import RevocationHolder
from carnet_broker.signing import KeyringHolder, KeyringView
from carnet_broker.telemetry import Telemetry
from support.running_broker import BROKER, BROKER_NAME, ISSUER, POLICY


def _issuer(commit: Any, audit: JsonLinesAudit) -> Issuer:  # noqa: ANN401 - a callable, or one on a loop
    now = datetime.now(UTC)
    timing = Timing()
    private_key = ec.generate_private_key(ec.SECP256R1())
    jwk = PublicJWK.of(private_key.public_key())
    keyring = Keyring(issuer=ISSUER).with_created(jwk, None, now).with_published(jwk.kid, now)
    keyring = keyring.with_activated(jwk.kid, now, timing)
    holder = KeyringHolder(island=timing.island)
    jwks = keyring.key_set().to_json()
    holder.adopt(KeyringView(keyring, keyring.active, KvSigner(jwk.kid, private_key), jwks, now, time.monotonic()))
    policy = load_policy(POLICY.encode(), "policy.yaml")

    async def sign(signer: Signer, inputs: Sequence[bytes]) -> list[bytes]:
        return [signer.sign(one) for one in inputs]

    return Issuer(
        rules=MintingRules(issuer=ISSUER),
        policy=lambda: policy,
        keys=holder,
        admission=Admission(rate=1e9, burst=10**9),
        audit=audit,
        commit=commit,
        sign=sign,
        revocations=RevocationHolder(),
    )


class _Peers:
    """Authenticates as the broker does."""

    def __init__(self, ca: CertificateAuthority) -> None:
        self._bundle = TrustBundle.parse(ca.root_pem, [], ["prod.example"])
        self._cache = IdentityCache(LeafRules())

    def __call__(self, auth: Any) -> Workload:  # noqa: ANN401 - gRPC's mapping
        sent = (*auth.get("x509_pem_cert", ()), *auth.get("x509_pem_cert_chain", ()))
        version = auth["ssl_tls_version"][0].decode()
        return self._cache.authenticate(sent, tls_version=version, bundle=self._bundle, now=datetime.now(UTC))


def _run_to_end(coroutine: Any) -> Any:  # noqa: ANN401 - whatever it returns
    """Run a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    msg = "the coroutine waits"
    raise AssertionError(msg)


class _SyncServicer(token_pb2_grpc.TokenServiceServicer):
    """The same work on the sync stack: each call writes its own record, and blocks its thread for it."""

    def __init__(self, issuer: Issuer, peers: _Peers) -> None:
        self._issuer, self._peers, self._clock = issuer, peers, SystemClock()

    def IssueToken(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: ANN401, N802
        workload = self._peers(context.auth_context())
        now, mono = self._clock.now(), self._clock.mono()
        (answer,) = _run_to_end(self._issuer.issue(workload, [tokens.parse(request)], now=now, mono=mono))
        if isinstance(answer, RefusedError):
            raise answer
        return tokens.response(answer)

    def IssueTokens(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: ANN401, N802
        workload = self._peers(context.auth_context())
        now, mono = self._clock.now(), self._clock.mono()
        asked = [tokens.parse(one) for one in request.requests]
        answers = _run_to_end(self._issuer.issue(workload, asked, now=now, mono=mono))
        return token_pb2.IssueTokensResponse(results=[tokens.result(answer) for answer in answers])


class _AioServicer(tokens.TokenServicer):
    """The broker's own handlers of tokens, without a store to revoke in."""

    def __init__(self, issuer: Issuer, clock: SystemClock) -> None:
        self._issuer = issuer
        self._clock = clock


def _serve_sync(threads: int, audit: JsonLinesAudit, ca: CertificateAuthority, pems: TlsPems) -> None:

    async def commit(records: Any) -> None:  # noqa: ANN401 - as the port
        audit.issue(records)

    server = grpc.server(ThreadPoolExecutor(threads), options=[("grpc.so_reuseport", 0)])
    token_pb2_grpc.add_TokenServiceServicer_to_server(_SyncServicer(_issuer(commit, audit), _Peers(ca)), server)
    port = server.add_secure_port("127.0.0.1:0", server_credentials(lambda: pems))
    server.start()
    print(port, flush=True)
    sys.stdin.read()
    server.stop(0).wait()


async def _serve_aio(audit: JsonLinesAudit, ca: CertificateAuthority, pems: TlsPems) -> None:
    commit = GroupCommit(audit.issue, ThreadPoolExecutor(1), deadline=timedelta(seconds=5))
    calls = AuthenticatedCalls(
        _Peers(ca),
        Telemetry(),
        limits=CallLimits(
            read_within=timedelta(seconds=5), write_within=timedelta(seconds=5), calls_in_flight=256, streams=256
        ),
        record=lambda error, workload, peer: None,
    )
    limits = ListenerLimits()
    server = new_server(limits)
    servicer = _AioServicer(_issuer(commit, audit), SystemClock())
    token_pb2_grpc.add_TokenServiceServicer_to_server(servicer, calls.on(server))
    port = bind(server, "127.0.0.1:0", MutualTls(lambda: pems, limits), setting="bench")
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


def main() -> None:
    """Serve."""
    stack, threads, durability, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    ca = CertificateAuthority.create()
    mine = ca.issue(BROKER, dns_names=[BROKER_NAME])
    theirs = ca.issue("spiffe://prod.example/ns/shop/sa/orders")
    theirs.write(directory, "orders")
    (directory / "ca.pem").write_bytes(ca.root_pem)
    pems = TlsPems(mine.private_key_pem, mine.certificate_pem, ca.root_pem)
    audit = JsonLinesAudit(directory / "audit", durability=durability)
    if stack == "sync":
        _serve_sync(threads, audit, ca, pems)
    else:
        uvloop.run(_serve_aio(audit, ca, pems))


if __name__ == "__main__":
    main()
