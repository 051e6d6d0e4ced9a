"""Certificates of the embedded stack: names, renewal, rotation, permissions, and that TLS of the mesh accepts them."""

import asyncio
import contextlib
import datetime
import fcntl
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from cli.stack import certificates as subject
from servicekit.tls import TlsFiles, client_ssl_context, read_material, server_name, server_ssl_context


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


def authorities(directory: Path) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates((directory / "ca.crt").read_bytes())


def test_a_running_mesh_gets_a_new_authority_in_stages(directories: tuple[Path, Path]) -> None:
    """Trusted beside the earlier one first, and alone only when nothing is signed by that any more."""
    (old,) = authorities(directories[0])
    (directories[1] / "ca.key").unlink()
    assert subject.renew(*directories) == ["ca"]
    new, beside = authorities(directories[0])
    assert beside == old
    for name in (*subject.MEMBERS, subject.EDGE):
        load(directories[0], name).verify_directly_issued_by(old)
    assert subject.renew(*directories) == [*subject.MEMBERS, subject.EDGE]
    assert authorities(directories[0]) == [new, old]
    for name in (*subject.MEMBERS, subject.EDGE):
        load(directories[0], name).verify_directly_issued_by(new)
    assert subject.renew(*directories) == []
    assert authorities(directories[0]) == [new]
    assert subject.renew(*directories) == []


def test_an_authority_about_to_end_is_followed_by_another(directories: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (old,) = authorities(directories[0])
    left = old.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    monkeypatch.setattr(subject, "CERTIFICATE_DAYS", left.days + 1)
    monkeypatch.setattr(subject, "AUTHORITY_DAYS", 2 * left.days)
    assert subject.renew(*directories) == ["ca"]
    assert authorities(directories[0])[1:] == [old]


def test_an_authority_whose_key_was_not_written_is_forgotten(directories: tuple[Path, Path]) -> None:
    """A process that died between the two files: the bundle has one certificate too many."""
    (old,) = authorities(directories[0])
    key = (directories[1] / "ca.key").read_bytes()
    (directories[1] / "ca.key").unlink()
    subject.renew(*directories)
    (directories[1] / "ca.key").write_bytes(key)
    assert subject.renew(*directories) == []
    assert authorities(directories[0]) == [old]


def test_rotation_replaces_every_pair(directories: tuple[Path, Path]) -> None:
    names = (*subject.MEMBERS, subject.EDGE)
    before = {name: load(directories[0], name).serial_number for name in names}
    kept = authorities(directories[0])
    assert subject.rotate(*directories) == list(names)
    for name in names:
        assert load(directories[0], name).serial_number != before[name]
        read_material(TlsFiles.of(directories[0], name))
    assert authorities(directories[0]) == kept
    assert subject.ensure_certificates(*directories) == []


def test_rotation_replaces_the_authority_too_if_asked(directories: tuple[Path, Path]) -> None:
    (old,) = authorities(directories[0])
    assert subject.rotate(*directories, True, settle_s=0.0) == ["ca", *subject.MEMBERS, subject.EDGE]
    (new,) = authorities(directories[0])
    assert new != old
    for name in (*subject.MEMBERS, subject.EDGE):
        load(directories[0], name).verify_directly_issued_by(new)
    assert subject.ensure_certificates(*directories) == []


def test_files_are_replaced_by_renaming(directories: tuple[Path, Path]) -> None:
    """Whoever has a file open goes on reading what it was; Envoy sees a rename, and nothing else."""
    key = directories[0] / "gateway.key"
    with key.open("rb") as open_file:
        before = key.read_bytes()
        subject.rotate(*directories)
        assert open_file.read() == before != key.read_bytes()
    assert {path.suffix for path in directories[0].iterdir()} == {".crt", ".key"}


def test_one_process_writes_at_a_time(directories: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "LOCK_TIMEOUT_S", 0.0)
    with (directories[1] / ".lock").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for write in (subject.ensure_certificates, subject.renew, subject.rotate):
            with pytest.raises(TimeoutError):
                write(*directories)
    assert subject.renew(*directories) == []


async def test_a_running_stack_renews_what_is_about_to_end_and_survives_failures(
    directories: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []
    renewed = asyncio.Event()
    renew = subject.renew

    def first_fails(directory: Path, authority_dir: Path) -> list[str]:
        calls.append("")
        if len(calls) == 1:
            raise OSError("no space left")
        made = renew(directory, authority_dir)
        loop.call_soon_threadsafe(renewed.set)
        return made

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(subject, "renew", first_fails)
    (directories[0] / "gateway.crt").unlink()
    renewing = asyncio.create_task(subject.keep_renewed(*directories, interval_s=0.0))
    async with asyncio.timeout(20):
        await renewed.wait()
    renewing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await renewing
    assert read_material(TlsFiles.of(directories[0], "gateway"))
    assert "no space left" in caplog.text


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
