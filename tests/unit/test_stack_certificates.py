"""Certificates of the embedded stack: names, renewal, permissions, and that TLS of the mesh accepts them."""

import datetime
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from cli.stack import certificates as subject
from servicekit.tls import TlsFiles, client_ssl_context, server_name, server_ssl_context


@pytest.fixture
def directories(tmp_path: Path) -> tuple[Path, Path]:
    directory, authority = tmp_path / "certificates", tmp_path / "authority"
    directory.mkdir()
    authority.mkdir()
    subject.ensure_certificates(directory, authority)
    return directory, authority


def load(directory: Path, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((directory / f"{name}.crt").read_bytes())


@pytest.mark.parametrize("name", subject.MEMBERS)
def test_a_member_is_named_as_the_mesh_expects(directories: tuple[Path, Path], name: str) -> None:
    certificate = load(directories[0], name)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert server_name(name) in names.get_values_for_type(x509.DNSName)
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"spiffe://genmesh/{name}"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usage) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}


def test_the_public_certificate_proves_no_member(directories: tuple[Path, Path]) -> None:
    names = load(directories[0], subject.EDGE).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == []
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]


def test_keys_are_for_the_owner_only(directories: tuple[Path, Path]) -> None:
    directory, authority = directories
    keys = [*directory.glob("*.key"), *authority.glob("*.key")]
    assert len(keys) == len(subject.MEMBERS) + 2
    assert {key.stat().st_mode & 0o777 for key in keys} == {0o600}


def test_nothing_is_made_twice(directories: tuple[Path, Path]) -> None:
    before = {path: path.read_bytes() for path in directories[0].iterdir()}
    assert subject.ensure_certificates(*directories) == []
    assert {path: path.read_bytes() for path in directories[0].iterdir()} == before


def test_what_is_missing_or_damaged_is_made_again(directories: tuple[Path, Path]) -> None:
    (directories[0] / "gateway.key").unlink()
    (directories[0] / "edge.crt").write_text("nonsense")
    assert subject.ensure_certificates(*directories) == ["gateway", "edge"]


def test_what_expires_soon_is_renewed(directories: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expiry = load(directories[0], "gateway").not_valid_after_utc
    left = expiry - datetime.datetime.now(datetime.UTC)
    monkeypatch.setattr(subject, "RENEW_BEFORE", left + datetime.timedelta(hours=1))
    assert subject.ensure_certificates(*directories) == [*subject.MEMBERS, subject.EDGE]
    assert load(directories[0], "gateway").not_valid_after_utc >= expiry


def test_a_lost_authority_renews_everything(directories: tuple[Path, Path]) -> None:
    (directories[1] / "ca.key").unlink()
    assert subject.ensure_certificates(*directories) == ["ca", *subject.MEMBERS, subject.EDGE]


def test_two_members_shake_hands(directories: tuple[Path, Path]) -> None:
    server = server_ssl_context(TlsFiles.of(directories[0], "credit_service"))
    client = client_ssl_context(TlsFiles.of(directories[0], "jobs_service"))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)]
    for _ in range(4):  # flights of a TLS 1.3 handshake, with one to spare
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    der = ends[1].getpeercert(binary_form=True)
    assert der is not None
    assert x509.load_der_x509_certificate(der) == load(directories[0], "jobs_service")
