"""Downloads from a local server that cuts connections, ignores ranges, lies, or has moved."""

from __future__ import annotations

import errno
import hashlib
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashcocos.errors import CheckpointError, FlashcocosError, InputError
from flashcocos.export import download as module
from flashcocos.export.download import RemoteFile, download

CONTENT = {"corr.pth": bytes(range(256)) * 40, "generator.pth": b"generator" * 1000}


class Mirror(ThreadingHTTPServer):
    """Serves `files`; cuts each of the first `cuts` answers after `cut_after` bytes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = dict(CONTENT)
        self.ranges, self.cuts, self.cut_after, self.status = True, 0, 1000, 0
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/ckpt/"


class _Handler(BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        name, wanted = self.path.rsplit("/", 1)[1], self.headers.get("Range", "")
        self.server.requests.append((name, wanted))
        if self.server.status or name not in self.server.files:
            self.send_error(self.server.status or 404)
            return
        body, start = self.server.files[name], 0
        if wanted and self.server.ranges:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        body = body[start:]
        if self.server.cuts:
            self.server.cuts -= 1
            body = body[: self.server.cut_after]
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    files = [RemoteFile(name, len(body), hashlib.sha384(body).hexdigest()) for name, body in CONTENT.items()]
    monkeypatch.setattr(module, "PUBLISHED", {"ade20k": tuple(files)})
    monkeypatch.setattr(module, "RETRY_WAIT", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Mirror()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def content(paths: tuple[Path, Path]) -> list[bytes]:
    return [path.read_bytes() for path in paths]


def test_both_files_arrive_whole_and_a_second_call_makes_no_request(mirror: Mirror, tmp_path: Path) -> None:
    paths = download("ade20k", tmp_path, base_url=mirror.url)
    assert content(paths) == list(CONTENT.values())
    assert [path.name for path in paths] == list(CONTENT)
    assert sorted(path.name for path in (tmp_path / "ade20k").iterdir()) == sorted(CONTENT)
    assert download("ade20k", tmp_path, base_url=mirror.url) == paths
    assert [name for name, _ in mirror.requests] == list(CONTENT)


def test_a_cut_connection_resumes_within_the_call(mirror: Mirror, tmp_path: Path) -> None:
    mirror.cuts = 2
    assert content(download("ade20k", tmp_path, base_url=mirror.url)) == list(CONTENT.values())
    assert [wanted for name, wanted in mirror.requests if name == "corr.pth"] == ["", "bytes=1000-", "bytes=2000-"]


def test_a_connection_cut_each_time_is_one_error_and_the_next_call_resumes(mirror: Mirror, tmp_path: Path) -> None:
    mirror.cuts = module.ATTEMPTS
    with pytest.raises(FlashcocosError, match=f"got {1000 * module.ATTEMPTS} of 10240 bytes.*again to resume"):
        download("ade20k", tmp_path, base_url=mirror.url)
    assert (tmp_path / "ade20k" / "corr.pth.part").stat().st_size == 1000 * module.ATTEMPTS
    assert content(download("ade20k", tmp_path, base_url=mirror.url)) == list(CONTENT.values())
    assert ("corr.pth", f"bytes={1000 * module.ATTEMPTS}-") in mirror.requests


def test_a_server_without_ranges_starts_over(mirror: Mirror, tmp_path: Path) -> None:
    mirror.ranges, mirror.cuts = False, 1
    assert content(download("ade20k", tmp_path, base_url=mirror.url)) == list(CONTENT.values())
    assert ("corr.pth", "bytes=1000-") in mirror.requests


def test_a_wrong_hash_is_refused_and_the_file_deleted(mirror: Mirror, tmp_path: Path) -> None:
    mirror.files["corr.pth"] = bytes(len(CONTENT["corr.pth"]))
    with pytest.raises(CheckpointError, match=r"SHA-384 is .* expected .* deleted"):
        download("ade20k", tmp_path, base_url=mirror.url)
    assert list((tmp_path / "ade20k").iterdir()) == []


def test_a_damaged_file_in_the_cache_is_fetched_again(mirror: Mirror, tmp_path: Path) -> None:
    corr, _ = download("ade20k", tmp_path, base_url=mirror.url)
    corr.write_bytes(bytes(len(CONTENT["corr.pth"])))
    assert content(download("ade20k", tmp_path, base_url=mirror.url)) == list(CONTENT.values())


def test_a_part_that_is_too_long_is_dropped(mirror: Mirror, tmp_path: Path) -> None:
    part = tmp_path / "ade20k" / "corr.pth.part"
    part.parent.mkdir()
    part.write_bytes(bytes(len(CONTENT["corr.pth"]) + 1))
    assert content(download("ade20k", tmp_path, base_url=mirror.url)) == list(CONTENT.values())


@pytest.mark.parametrize("change", [b"too short", CONTENT["corr.pth"] + b"more"])
def test_a_file_of_another_size_is_refused_before_it_is_fetched(mirror: Mirror, tmp_path: Path, change: bytes) -> None:
    mirror.files["corr.pth"] = change
    with pytest.raises(CheckpointError, match=f"{len(change)} bytes on the server, expected 10240"):
        download("ade20k", tmp_path, base_url=mirror.url)
    assert len(mirror.requests) == 1
    assert not (tmp_path / "ade20k" / "corr.pth").exists()


def test_a_moved_file_is_one_clear_error(mirror: Mirror, tmp_path: Path) -> None:
    del mirror.files["generator.pth"]
    with pytest.raises(FlashcocosError, match=r"generator\.pth: HTTP 404 .*another base URL"):
        download("ade20k", tmp_path, base_url=mirror.url)


def test_a_failing_server_is_tried_several_times(mirror: Mirror, tmp_path: Path) -> None:
    mirror.status = 503
    with pytest.raises(FlashcocosError, match=r"got 0 of 10240 bytes \(HTTP Error 503"):
        download("ade20k", tmp_path, base_url=mirror.url)
    assert len(mirror.requests) == module.ATTEMPTS


def test_nobody_listening_is_one_clear_error(mirror: Mirror, tmp_path: Path) -> None:
    with pytest.raises(FlashcocosError, match=r"got 0 of 10240 bytes .*refused"):
        download("ade20k", tmp_path, base_url="http://127.0.0.1:1/")


def test_too_little_space_is_said_before_any_request(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10_239))
    with pytest.raises(FlashcocosError, match=r"0 MiB free, corr\.pth needs 1 MiB more"):
        download("ade20k", tmp_path, base_url=mirror.url)
    assert mirror.requests == []


def test_a_disk_that_fills_up_keeps_what_was_fetched(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def transfer(url: str, part: Path, *_: object) -> None:
        part.write_bytes(CONTENT["corr.pth"][:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_transfer", transfer)
        with pytest.raises(FlashcocosError, match="No space left on device; what was fetched is kept"):
            download("ade20k", tmp_path, base_url=mirror.url)
    assert content(download("ade20k", tmp_path, base_url=mirror.url)) == list(CONTENT.values())
    assert mirror.requests[0] == ("corr.pth", "bytes=100-")


def test_unknown_names_and_urls_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no public mirror of 'celebahq'; available: ade20k"):
        download("celebahq", tmp_path)
    with pytest.raises(InputError, match="expected https:// or http://"):
        download("ade20k", tmp_path, base_url="file:///etc/")


def test_downloads_are_kept_in_the_cache_folder(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path)
    assert [path.parent for path in download("ade20k", base_url=mirror.url)] == [tmp_path / "ade20k"] * 2


def test_the_published_pair_is_the_mirrors() -> None:
    corr, generator = module.PUBLISHED["ade20k"]
    assert (corr.bytes, generator.bytes) == (237_624_725, 387_069_636)
    assert [len(file.sha384) for file in (corr, generator)] == [96, 96]
