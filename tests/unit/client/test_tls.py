from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes

from carnet.claims import certificate_thumbprint
from carnet.endpoints import Failover, Target, parse_targets
from carnet.errors import ConfigError
from carnet.identity import Identity, load_ca_file
from carnet.testing.ca import CertificateAuthority, IssuedCertificate, certificate_pem
from carnet.tls import channel_options

ORDERS = "spiffe://prod.example/ns/shop/sa/orders"
NO_PASSWORD = serialization.NoEncryption()


@pytest.fixture(name="ca", scope="module")
def _ca() -> CertificateAuthority:
    return CertificateAuthority.create()


@pytest.fixture(name="orders", scope="module")
def _orders(ca: CertificateAuthority) -> IssuedCertificate:
    return ca.issue(ORDERS)


def pem_of(key: CertificateIssuerPrivateKeyTypes, encryption: object = NO_PASSWORD) -> bytes:
    """`key` as PKCS 8."""
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def leaf_over(ca: CertificateAuthority, key: CertificateIssuerPrivateKeyTypes) -> bytes:
    """A certificate of orders over `key`, with its chain."""
    now = datetime.now(UTC)
    leaf = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(ca.intermediate.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(ORDERS)]), critical=True)
        .sign(ca.intermediate.private_key, hashes.SHA256())
    )
    return certificate_pem(leaf, ca.intermediate.certificate)


def refusal(function: object, *arguments: object, **keywords: object) -> str:
    """The message of the ConfigError that the call must raise."""
    with pytest.raises(ConfigError) as caught:
        function(*arguments, **keywords)
    return str(caught.value)


def test_identity_is_read_from_its_files(orders: IssuedCertificate, tmp_path: Path) -> None:
    """A pair of files gives the identity: chain, key, leaf, SPIFFE ID, thumbprint and validity."""
    identity = Identity.load(*orders.write(tmp_path, "orders"))
    assert orders.certificate_pem == identity.certificate_chain_pem
    assert orders.leaf == identity.certificate
    assert ORDERS == str(identity.spiffe_id)
    assert certificate_thumbprint(orders.leaf) == identity.thumbprint
    assert (orders.leaf.not_valid_before_utc, orders.leaf.not_valid_after_utc) == (
        identity.not_before,
        identity.not_after,
    )


def test_identity_never_shows_its_key(orders: IssuedCertificate) -> None:
    """Neither repr nor str of an identity holds the key, or the certificate."""
    identity = Identity.parse(orders.certificate_pem, orders.private_key_pem)
    for shown in (repr(identity), str(identity), f"{identity}"):
        assert "PRIVATE" not in shown
        assert "BEGIN" not in shown


def test_identities_are_equal_by_certificate(ca: CertificateAuthority, orders: IssuedCertificate) -> None:
    """The same certificate is the same identity; another one of the same workload is not."""
    one, same = (Identity.parse(orders.certificate_pem, orders.private_key_pem) for _ in range(2))
    renewed = ca.issue(ORDERS)
    assert one == same
    assert hash(one) == hash(same)
    assert one != Identity.parse(renewed.certificate_pem, renewed.private_key_pem)


def test_certificate_that_ended_can_be_loaded(ca: CertificateAuthority) -> None:
    """Whether a certificate is over is for the moment of use: a process may start offline, and be renewed later."""
    ended = ca.issue(
        ORDERS,
        not_before=datetime.now(UTC) - timedelta(hours=2),
        not_after=datetime.now(UTC) - timedelta(hours=1),
    )
    assert Identity.parse(ended.certificate_pem, ended.private_key_pem).not_after < datetime.now(UTC)


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP384R1()),
        rsa.generate_private_key(public_exponent=65537, key_size=2048),
    ],
    ids=["P-384", "RSA-2048"],
)
def test_other_kinds_of_key_that_grpc_can_use(ca: CertificateAuthority, key: CertificateIssuerPrivateKeyTypes) -> None:
    """P-384 and RSA of 2,048 bits are as good as P-256."""
    assert ORDERS == str(Identity.parse(leaf_over(ca, key), pem_of(key)).spiffe_id)


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP521R1()),
        ec.generate_private_key(ec.SECP256K1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(public_exponent=65537, key_size=1024),  # noqa: S505 - that it is weak is the point
    ],
    ids=["P-521", "secp256k1", "Ed25519", "RSA-1024"],
)
def test_kind_of_key_that_would_fail_in_the_handshake_is_refused(
    ca: CertificateAuthority, key: CertificateIssuerPrivateKeyTypes
) -> None:
    """gRPC would show these as a closed socket; here the error says what kind of key to have issued."""
    assert "P-256" in refusal(Identity.parse, leaf_over(ca, key), pem_of(key))


def test_key_in_the_form_of_openssl_ecparam_is_read(ca: CertificateAuthority) -> None:
    """What stands before the key in its file is not handed to gRPC."""
    key = ec.generate_private_key(ec.SECP256R1())
    sec1 = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, NO_PASSWORD)
    text = b"-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n" + sec1
    assert pem_of(key) == Identity.parse(leaf_over(ca, key), text).private_key_pem


def test_key_of_another_certificate_is_refused(ca: CertificateAuthority, orders: IssuedCertificate) -> None:
    """A pair that does not belong together is told at once, not by a handshake that fails."""
    message = refusal(Identity.parse, orders.certificate_pem, ca.issue(ORDERS).private_key_pem)
    assert "the key is not the key of the certificate" in message


def test_chain_that_does_not_begin_with_the_leaf_is_refused(
    ca: CertificateAuthority, orders: IssuedCertificate
) -> None:
    """The workload's own certificate is the first of its file."""
    wrong_order = ca.intermediate_pem + certificate_pem(orders.leaf)
    assert "is not that of a workload" in refusal(Identity.parse, wrong_order, orders.private_key_pem)


@pytest.mark.parametrize(
    ("certificate", "part"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"junk", "holds no PEM certificate"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "cannot be parsed"),
        (b"-----BEGIN CERTIFICATE-----\n", "cannot be parsed"),
    ],
)
def test_text_that_is_no_certificate_is_refused(orders: IssuedCertificate, certificate: bytes, part: str) -> None:
    """The error says what is wrong with the certificate, and names it."""
    message = refusal(Identity.parse, certificate, orders.private_key_pem)
    assert message.startswith("the certificate ")
    assert part in message


@pytest.mark.parametrize(
    ("key", "part"),
    [
        (b"", "holds no PEM private key"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "holds no PEM private key"),
        (
            pem_of(ec.generate_private_key(ec.SECP256R1()), serialization.BestAvailableEncryption(b"secret")),
            "has a password",
        ),
    ],
)
def test_text_that_is_no_key_is_refused(orders: IssuedCertificate, key: bytes, part: str) -> None:
    """The error says what is wrong with the key, and shows nothing of it."""
    message = refusal(Identity.parse, orders.certificate_pem, key)
    assert message.startswith("the key ")
    assert part in message


def test_missing_file_is_named_with_its_variable(orders: IssuedCertificate, tmp_path: Path) -> None:
    """The error names the file, the variable that named it, what is wrong and what to do."""
    _, key_file = orders.write(tmp_path, "orders")
    missing = tmp_path / "missing.pem"
    message = refusal(Identity.load, missing, key_file, cert_variable="CARNET_CERT_FILE")
    assert message.startswith(f"certificate file {missing} (CARNET_CERT_FILE) does not exist: ")


def test_wrong_key_file_is_named(ca: CertificateAuthority, orders: IssuedCertificate, tmp_path: Path) -> None:
    """What is wrong with a pair of files is said of the file that it is wrong with."""
    cert_file, _ = orders.write(tmp_path, "orders")
    _, key_file = ca.issue(ORDERS).write(tmp_path, "other")
    message = refusal(Identity.load, cert_file, key_file, key_variable="CARNET_KEY_FILE")
    assert message.startswith(f"key file {key_file} (CARNET_KEY_FILE) is not the key of the certificate: ")


def test_file_that_cannot_be_a_certificate_is_refused(orders: IssuedCertificate, tmp_path: Path) -> None:
    """A directory, a name with a NUL, and a file of more than 1 MiB are refused with their names."""
    _, key_file = orders.write(tmp_path, "orders")
    large = tmp_path / "large.pem"
    large.write_bytes(b"x" * (1024 * 1024 + 1))
    assert "cannot be read (Is a directory)" in refusal(Identity.load, tmp_path, key_file)
    assert "cannot be read" in refusal(Identity.load, "a\0b", key_file)
    assert "larger than 1048576 bytes" in refusal(Identity.load, large, key_file)


def test_file_that_may_not_be_read_is_named(orders: IssuedCertificate, tmp_path: Path, monkeypatch: object) -> None:
    """A missing right is not a missing file: the error says which it is."""
    cert_file, key_file = orders.write(tmp_path, "orders")

    def forbidden(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", forbidden)  # The tests run as root, who may read everything.
    assert f"certificate file {cert_file} may not be read" in refusal(Identity.load, cert_file, key_file)


def test_a_key_file_that_everybody_may_write_to_is_told_of_and_used(
    orders: IssuedCertificate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning and no refusal: file systems without modes show every file so."""
    cert_file, key_file = orders.write(tmp_path, "orders")
    key_file.chmod(0o666)
    Identity.load(cert_file, key_file)
    told = f"every user of this host may write to key file {key_file} (mode 0666): take that right away (chmod o-w)"
    assert [("carnet", logging.WARNING, told)] == caplog.record_tuples


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o440, 0o640, 0o644])
def test_a_key_file_as_platforms_mount_it_is_used_without_a_word(
    mode: int, orders: IssuedCertificate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The twin: Kubernetes mounts keys 0644, and with a group 0440 or 0640; behind symbolic links."""
    cert_file, key_file = orders.write(tmp_path, "orders")
    key_file.chmod(mode)
    link = tmp_path / "link.pem"
    link.symlink_to(key_file)
    Identity.load(cert_file, link)
    assert [] == caplog.records


def test_ca_file_is_read(ca: CertificateAuthority, tmp_path: Path) -> None:
    """A bundle of authorities comes back as it is."""
    bundle = ca.root_pem + ca.intermediate_pem
    (tmp_path / "ca.pem").write_bytes(bundle)
    assert bundle == load_ca_file(tmp_path / "ca.pem")


@pytest.mark.parametrize("content", [b"", b"junk", b"-----BEGIN CERTIFICATE-----\nAA\n-----END CERTIFICATE-----\n"])
def test_wrong_ca_file_is_named(content: bytes, tmp_path: Path) -> None:
    """A bundle that gRPC would take for an empty one is refused, with file and variable."""
    path = tmp_path / "ca.pem"
    path.write_bytes(content)
    assert refusal(load_ca_file, path, variable="CARNET_CA_FILE").startswith(f"CA file {path} (CARNET_CA_FILE) ")


@pytest.mark.parametrize(
    ("text", "host", "port", "shown"),
    [
        ("broker:8443", "broker", 8443, "broker:8443"),
        ("broker.carnet.svc.prod.example:1", "broker.carnet.svc.prod.example", 1, "broker.carnet.svc.prod.example:1"),
        ("127.0.0.1:65535", "127.0.0.1", 65535, "127.0.0.1:65535"),
        ("[::1]:443", "::1", 443, "[::1]:443"),
        ("[2001:DB8:0::1]:443", "2001:db8::1", 443, "[2001:db8::1]:443"),
        ("under_score:1", "under_score", 1, "under_score:1"),
    ],
)
def test_target_is_host_and_port(text: str, host: str, port: int, shown: str) -> None:
    """Names, IPv4 and bracketed IPv6 addresses, each with a port; `str` gives what gRPC takes."""
    target = Target.parse(text)
    assert (host, port) == (target.host, target.port)
    assert shown == str(target)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "broker",
        "broker:",
        ":443",
        "broker:0",
        "broker:65536",
        "broker:443 ",
        "broker:4 43",
        "broker:٤٤٣",
        "::1:443",
        "[::1]",
        "[broker]:443",
        "[::1%eth0]:443",
        "256.0.0.1:443",
        "1.2.3:443",
        "-broker:443",
        "a..b:443",
        "dns:///broker:443",
        "unix:/run/broker.sock:1",
        "https://broker:443",
        "user@broker:443",
        "bröker:443",
        f"{'a' * 255}:443",
        "broker:443\n",
    ],
)
def test_what_is_no_target_is_refused(text: str) -> None:
    """No scheme, no path, no default port, nothing that gRPC would read as another kind of address."""
    assert "write host:port" in refusal(Target.parse, text)


def test_list_of_targets_keeps_its_order() -> None:
    """Targets are divided by commas, with or without spaces."""
    assert (Target("b", 2), Target("a", 1)) == parse_targets("b:2, a:1")


@pytest.mark.parametrize("text", ["a:1,", "a:1,,b:2", "a:1,a:1", ",".join(f"a{n}:1" for n in range(33))])
def test_list_with_gaps_repetitions_or_too_many_targets_is_refused(text: str) -> None:
    """An empty place is a mistake; a server named twice would be asked twice."""
    refusal(parse_targets, text)


A, B, C = (Target(name, 1) for name in "abc")


def test_servers_are_asked_from_the_chosen_one_on() -> None:
    """The first to be asked is the caller's choice, so that clients spread."""
    assert [B, C, A] == Failover([A, B, C], first=4).order(0)


def test_server_that_answered_is_asked_again() -> None:
    """A warm connection is used as long as it works."""
    failover = Failover([A, B, C])
    failover.succeeded(C)
    assert [C, A, B] == failover.order(0)


def test_server_that_failed_is_asked_last_until_its_pause_is_over() -> None:
    """The first pause is one second."""
    failover = Failover([A, B])
    failover.failed(A, mono=100)
    assert [B, A] == failover.order(100.9)
    assert [A, B] == failover.order(101)


def test_pauses_double_up_to_half_a_minute() -> None:
    """A server that stays down is tried ever more seldom before the others, and never forgotten."""
    failover = Failover([A, B])
    for _ in range(40):
        failover.failed(A, mono=0)
    assert [B, A] == failover.order(29.9)
    assert [A, B] == failover.order(30)


def test_when_all_failed_the_first_to_be_over_it_is_asked_first() -> None:
    """Nobody is left out: with every server in a pause all are still asked."""
    failover = Failover([A, B, C])
    for server, times in ((A, 3), (B, 1), (C, 2)):
        for _ in range(times):
            failover.failed(server, mono=0)
    assert [B, C, A] == failover.order(0)


def test_answer_ends_the_pause() -> None:
    """One success forgets all failures."""
    failover = Failover([A, B])
    failover.failed(A, mono=0)
    failover.succeeded(A)
    assert [A, B] == failover.order(0)


def test_channel_always_pins_the_name_and_never_shares_a_connection() -> None:
    """The expected name and the own subchannel pool are in every channel; no option takes the name away."""
    options = dict(channel_options("broker.example", [("grpc.ssl_target_name_override", "evil.example")]))
    assert "broker.example" == options["grpc.ssl_target_name_override"]
    assert 1 == options["grpc.use_local_subchannel_pool"]


def test_options_of_the_caller_come_on_top() -> None:
    """Limits and timings are the caller's to change."""
    options = dict(channel_options("broker.example", [("grpc.max_receive_message_length", 5)]))
    assert 5 == options["grpc.max_receive_message_length"]
