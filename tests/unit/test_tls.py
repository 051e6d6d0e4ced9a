"""Files of a certificate as they are replaced: what is taken, what is refused, what is logged."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
from structlog.testing import capture_logs

from servicekit import tls as subject
from servicekit.identity import peer_service
from servicekit.tls import TlsFiles, TlsMaterial, UnusableFilesError, WatchedContext, WatchedFiles, read_material, server_ssl_context
from tests.authority import Authority, pem, replace

HOUR = timedelta(hours=1)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "RELOAD_INTERVAL_S", 0.0)
    monkeypatch.setattr(subject, "READ_PAUSE_S", 0.0)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    authority = Authority()
    replace(tmp_path / "ca.crt", authority.pem)
    authority.issue("gateway").write(tmp_path, "gateway")
    return authority


@pytest.fixture
def files(authority: Authority, tmp_path: Path) -> TlsFiles:
    return TlsFiles.of(tmp_path, "gateway")


def test_what_stays_is_read_once(files: TlsFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = WatchedFiles(files)
    first = watched.current()
    monkeypatch.setattr(subject, "_read", lambda _: pytest.fail("read again"))
    assert watched.current() is first


def test_files_are_looked_at_once_an_interval(files: TlsFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = WatchedFiles(files)
    monkeypatch.setattr(subject, "RELOAD_INTERVAL_S", 3600.0)
    watched.current()
    monkeypatch.setattr(os, "stat", lambda _: pytest.fail("looked again"))
    watched.current()


def test_a_new_pair_is_taken_and_told(files: TlsFiles, authority: Authority, tmp_path: Path) -> None:
    watched = WatchedFiles(files)
    with capture_logs() as logs:
        serial = authority.issue("gateway", end=5 * HOUR).write(tmp_path, "gateway")
        assert watched.current().serial_number == serial
    assert [(line["event"], line["log_level"], line["serial_number"]) for line in logs] == [("tls.files_replaced", "info", f"{serial:x}")]


def test_the_metric_tells_the_end_of_the_certificate_in_use(files: TlsFiles, authority: Authority, tmp_path: Path) -> None:
    """Also of a process that neither calls nor is called."""
    WatchedFiles(files)
    for end in (5 * HOUR, 50 * HOUR):
        issued = authority.issue("gateway", end=end)
        issued.write(tmp_path, "gateway")
        told = prometheus_client.REGISTRY.get_sample_value("genmesh_certificate_expire_time_seconds", {"certificate": "gateway"})
        assert told == issued.certificate.not_valid_after_utc.timestamp()


def test_more_authorities_are_something_new(files: TlsFiles, authority: Authority) -> None:
    watched = WatchedFiles(files)
    before = watched.current()
    replace(files.ca, Authority("next CA").pem + authority.pem)
    assert watched.current() is not before


def test_the_same_content_again_is_nothing_new(files: TlsFiles) -> None:
    watched = WatchedFiles(files)
    before = watched.current()
    replace(files.certificate, files.certificate.read_bytes())
    assert watched.current() is before


def test_half_a_replacement_is_not_used(files: TlsFiles, authority: Authority) -> None:
    watched = WatchedFiles(files)
    before = watched.current()
    issued = authority.issue("gateway")
    with capture_logs() as logs:
        replace(files.key, pem(issued.key))
        assert watched.current() is before
        assert watched.current() is before
        replace(files.certificate, issued.certificate_pem)
        assert watched.current().serial_number == issued.certificate.serial_number
    assert [line["event"] for line in logs] == ["tls.files_refused", "tls.files_replaced"]
    assert logs[0]["problem"] == "gateway.key is not the key of gateway.crt"


@pytest.mark.parametrize("name", ["ca", "certificate", "key"])
@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda _: b"", None], ids=["cut", "empty", "missing"])
def test_damaged_files_are_refused(files: TlsFiles, name: str, damage: Any) -> None:
    watched = WatchedFiles(files)
    before = watched.current()
    path: Path = getattr(files, name)
    content = path.read_bytes()
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(content))
    with capture_logs() as logs:
        assert watched.current() is before
    assert [line["event"] for line in logs] == ["tls.files_refused"]
    assert "PRIVATE" not in str(logs)
    with pytest.raises(UnusableFilesError):
        read_material(files)
    replace(path, content)
    assert watched.current() is before


@pytest.mark.parametrize(("start", "end"), [(-9 * HOUR, -HOUR), (HOUR, 9 * HOUR)], ids=["ended", "not begun"])
def test_a_pair_that_is_not_valid_now_does_not_replace_one_that_is(
    files: TlsFiles, authority: Authority, tmp_path: Path, start: timedelta, end: timedelta
) -> None:
    watched = WatchedFiles(files)
    before = watched.current()
    authority.issue("gateway", start=start, end=end).write(tmp_path, "gateway")
    with capture_logs() as logs:
        assert watched.current() is before
    assert "the certificate" in logs[0]["problem"]


def test_a_process_starts_with_a_certificate_that_has_ended_and_says_so(files: TlsFiles, authority: Authority, tmp_path: Path) -> None:
    authority.issue("gateway", start=-9 * HOUR, end=-HOUR).write(tmp_path, "gateway")
    with capture_logs() as logs:
        watched = WatchedFiles(files)
    assert [(line["event"], line["log_level"]) for line in logs] == [("tls.files_not_valid", "warning")]
    serial = authority.issue("gateway").write(tmp_path, "gateway")
    assert watched.current().serial_number == serial


def test_a_start_in_the_middle_of_a_replacement_waits_for_its_end(
    files: TlsFiles, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    issued = authority.issue("gateway")
    replace(files.key, pem(issued.key))
    monkeypatch.setattr(subject.time, "sleep", lambda _: replace(files.certificate, issued.certificate_pem))
    assert read_material(files).serial_number == issued.certificate.serial_number


def test_a_directory_swapped_as_kubernetes_does_is_seen(authority: Authority, tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    serials: list[int] = []
    for version in ("..1", "..2"):
        (mount / version).mkdir(parents=True)
        replace(mount / version / "ca.crt", authority.pem)
        serials.append(authority.issue("gateway").write(mount / version, "gateway"))
    (mount / "..data").symlink_to("..1")
    for name in ("ca.crt", "gateway.crt", "gateway.key"):
        (mount / name).symlink_to(f"..data/{name}")
    watched = WatchedFiles(TlsFiles.of(mount, "gateway"))
    assert watched.current().serial_number == serials[0]
    (mount / "..data_tmp").symlink_to("..2")
    (mount / "..data_tmp").replace(mount / "..data")
    assert watched.current().serial_number == serials[1]


def test_many_threads_never_get_a_mixed_pair(files: TlsFiles, authority: Authority, tmp_path: Path) -> None:
    watched = WatchedFiles(files)
    issued = [authority.issue("gateway") for _ in range(50)]
    seen: dict[int, TlsMaterial] = {}
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            material = watched.current()
            seen[material.serial_number] = material

    with ThreadPoolExecutor(4) as pool, capture_logs():
        asking = [pool.submit(ask) for _ in range(4)]
        for one in issued:
            one.write(tmp_path, "gateway")
        done.set()
        for future in asking:
            future.result()
    assert watched.current().serial_number == issued[-1].certificate.serial_number
    by_serial = {one.certificate.serial_number: one for one in issued}
    assert len(seen) > 1
    for serial, material in seen.items():
        if serial in by_serial:
            assert (material.key, material.certificate) == (pem(by_serial[serial].key), by_serial[serial].certificate_pem)


def test_a_context_is_made_anew_only_for_new_files(files: TlsFiles, authority: Authority, tmp_path: Path) -> None:
    watched = WatchedContext(files, server_ssl_context)
    before = watched.current()
    assert watched.current() is before
    authority.issue("gateway").write(tmp_path, "gateway")
    assert watched.current() is not before


@pytest.mark.parametrize(
    "uris",
    [
        ["spiffe://elsewhere/jobs_service"],
        ["spiffe://genmesh.example/jobs_service"],
        ["https://genmesh/jobs_service"],
        ["spiffe://genmesh/jobs_service", "spiffe://genmesh/envoy"],
    ],
)
def test_only_one_name_of_our_trust_domain_names_a_service(uris: list[str]) -> None:
    """The second fence: gRPC itself reports no SPIFFE id when there are several URIs (tests/service/test_mtls_rotation.py)."""
    assert peer_service({"peer_spiffe_id": [uri.encode() for uri in uris]}) is None
