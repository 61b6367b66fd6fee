"""Settings of the service: sources, bounds, tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashcocos.errors import InputError
from flashcocos.serve.config import ServeConfig, read_config, read_tokens


def test_the_later_source_counts(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('batch = 2\nqueue = 5\ndrain_s = 7\ncors_origins = ["https://a.example"]\n')
    environment = {"FLASHCOCOS_QUEUE": "6", "FLASHCOCOS_DRAIN_S": "8.5", "FLASHCOCOS_OTHER": "x", "HOME": "/"}
    config = read_config({"drain_s": "9"}, environment, str(file))
    assert (config.batch, config.queue, config.drain_s) == (2, 6, 9)
    assert config.cors_origins == ("https://a.example",)
    assert read_config() == ServeConfig()


def test_texts_become_what_their_field_is() -> None:
    texts = {"model": "7", "hosts": "a.example, b.example", "threads": "2", "deadline_s": "1.5", "precision": "float32"}
    config = read_config(texts)
    assert (config.model, config.hosts, config.threads) == ("7", ("a.example", "b.example"), 2)
    assert (config.deadline_s, config.precision) == (1.5, "float32")


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("queue", "0", "queue: expected int >= 1, got 0"),
        ("queue", "1e9", "queue: expected int"),
        ("batch", "65", "batch: expected int <= 64, got 65"),
        ("threads", "100000", "threads: expected int <= 256, got 100000"),
        ("deadline_s", "nan", "deadline_s"),
        ("deadline_s", "-1", "deadline_s: expected float > 0"),
        ("max_side", "100", "max_side: expected int that's a multiple of 32, got 100"),
        ("port", "70000", "port: expected int <= 65535"),
        ("host", "example.org", "host: expected an IP address or localhost, got 'example.org'"),
        ("host", "0.0.0.0", "needs a token_file"),
        ("device", "tpu", "unknown device 'tpu'"),
        ("tile", "100", "tile: expected a side in pixels"),
        ("colour", "red", "unknown key colour"),
    ],
)
def test_every_setting_is_checked(field: str, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_config({field: text})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.5.5.5", "::1", "localhost"])
def test_this_machine_needs_no_tokens(host: str) -> None:
    assert read_config({"host": host}).loopback


def test_other_machines_need_tokens(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("anna 0123456789abcdef\n")
    for host in ("0.0.0.0", "::", "10.0.0.1"):
        assert not read_config({"host": host, "token_file": str(file)}).loopback


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no token in it"),
        ("# only a comment\n", "no token in it"),
        ("anna 0123456789abcde\n", "line 1: expected NAME TOKEN, the token of 16 characters"),
        ("\n0123456789abcdef\n", "line 2: expected NAME TOKEN"),
        ("anna 0123456789abcdeé\n", "line 1: expected NAME TOKEN"),
        ("anna 0123456789abcdef\nanna 0123456789abcdeg\n", "line 2: anna is named twice"),
    ],
)
def test_token_files_are_checked(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "tokens"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as error:
        read_tokens(str(file))
    assert "0123456789" not in str(error.value)


def test_files_are_bounded(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_bytes(b"#" * (2 << 20))
    with pytest.raises(InputError, match="2097152 bytes; expected at most 1048576"):
        read_config(path=str(file))
    file.write_bytes(b"\xff")
    with pytest.raises(InputError, match="not a readable text file"):
        read_config(path=str(file))
    file.write_text("batch = ")
    with pytest.raises(InputError, match="not TOML"):
        read_config(path=str(file))
