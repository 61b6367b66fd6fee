"""The store of exemplars: bounded, encoded once, kept over restarts."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashcocos.runtime import Exemplar
from flashcocos.serve.errors import ApiError
from flashcocos.serve.exemplars import ExemplarStore, Folder, Source

KEYS = [f"{number:032x}" for number in range(10)]
SIZE = 1000  # bytes of an encoded exemplar


def source(number: int) -> Source:
    return Source(bytes([number]) * 200, None, None, (64, 64))


class Store(ExemplarStore):
    """A store whose encoder waits for `go` and notes what it encodes."""

    def __init__(self, folder: Folder | None = None, limit: int = 1 << 20, **builtin: Source) -> None:
        self.go, self.encoded, self.lookups = asyncio.Event(), [], []
        self.go.set()
        super().__init__(self._note, self._here, limit, folder, builtin, self.lookups.append)

    async def _note(self, source: Source) -> Exemplar:
        await self.go.wait()
        self.encoded.append(source.image[0])
        array = np.zeros((1, 1, 10, 10), np.float32)
        return Exemplar(array, array, source.size, "")

    async def _here(self, function: Any, *arguments: Any) -> Any:
        return function(*arguments)


def test_an_exemplar_is_encoded_once_for_all_who_ask() -> None:
    async def run() -> None:
        store = Store()
        store.go.clear()
        tasks = [asyncio.create_task(store.put(KEYS[1], source(1))) for _ in range(5)]
        await asyncio.sleep(0)
        store.go.set()
        entries = await asyncio.gather(*tasks)
        assert len({id(entry) for entry, _ in entries}) == 1
        assert store.encoded == [1]
        assert await store.get(KEYS[1]) is entries[0][0]
        assert (await store.put(KEYS[1], source(1)))[1] is False
        assert store.encoded == [1]
        assert store.lookups == ["encode", "hit"]

    asyncio.run(run())


def test_the_last_who_leaves_stops_the_encoding() -> None:
    async def run() -> None:
        store = Store()
        store.go.clear()
        first, second = (asyncio.create_task(store.put(KEYS[1], source(1))) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0.01)
        assert len(store._flights) == 1
        second.cancel()
        await asyncio.sleep(0.01)
        assert store._flights == {}
        store.go.set()
        await asyncio.sleep(0.01)
        assert store.encoded == []
        await store.put(KEYS[1], source(1))
        assert store.encoded == [1]

    asyncio.run(run())


def test_one_who_leaves_harms_no_other() -> None:
    async def run() -> None:
        store = Store()
        store.go.clear()
        first, second = (asyncio.create_task(store.put(KEYS[1], source(1))) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        store.go.set()
        assert (await second)[1]

    asyncio.run(run())


def test_memory_is_bounded_and_a_folder_remembers(tmp_path: Path) -> None:
    async def run() -> None:
        store = Store(Folder(str(tmp_path / "new"), 1 << 20, Source, ".exemplar"), limit=2 * SIZE + 600)
        for number in range(1, 5):
            await store.put(KEYS[number], source(number))
        assert len(store.entries) == 2
        assert store.entries.bytes <= 2 * SIZE + 600
        assert (await store.source(KEYS[1])).image == source(1).image
        await store.get(KEYS[1])  # no longer encoded, and so again
        assert store.encoded == [1, 2, 3, 4, 1]
        restarted = Store(Folder(str(tmp_path / "new"), 1 << 20, Source, ".exemplar"))
        await restarted.get(KEYS[4])
        assert restarted.encoded == [4]
        await restarted.delete(KEYS[4])
        assert restarted.size(KEYS[4]) == 0
        for store_now in (restarted, Store(Folder(str(tmp_path / "new"), 1 << 20, Source, ".exemplar"))):
            with pytest.raises(ApiError, match="no exemplar of this id"):
                await store_now.get(KEYS[4])

    asyncio.run(run())


def test_a_folder_is_bounded_and_the_oldest_make_room(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path), 1000, Source, ".exemplar")  # a file takes 234
    for number in range(4):
        folder.write(KEYS[number], source(number))
        os.utime(tmp_path / f"{KEYS[number]}.exemplar", (number, number))
    assert folder.read(KEYS[0]) is not None  # and so it is the newest
    folder.write(KEYS[5], source(5))
    assert [number for number in range(6) if folder.read(KEYS[number])] == [0, 2, 3, 5]
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 1000


def test_damage_in_the_folder_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path), 1000, Source, ".exemplar")
    (tmp_path / f"{KEYS[1]}.exemplar").write_bytes(b"\xc1 no source")
    (tmp_path / f"{KEYS[2]}.exemplar").mkdir()
    assert folder.read(KEYS[1]) is None
    assert folder.read(KEYS[2]) is None


@pytest.mark.parametrize("key", ["", "x", "../secret", "0" * 31, "0" * 33, "0x" + "0" * 30, "A" * 32, "٣" * 32])
def test_only_ids_reach_the_folder(tmp_path: Path, key: str) -> None:
    async def run() -> None:
        store = Store(Folder(str(tmp_path), 1000, Source, ".exemplar"))
        with pytest.raises(ApiError, match="no exemplar of this id"):
            await store.get(key)
        with pytest.raises(ApiError, match="no exemplar of this id"):
            await store.delete(key)

    asyncio.run(run())
    assert list(tmp_path.iterdir()) == []


def test_what_is_built_in_stays(tmp_path: Path) -> None:
    async def run() -> None:
        store = Store(None, 1 << 20, **{KEYS[1]: source(1)})
        await store.get(KEYS[1])
        await store.delete(KEYS[1])  # of its encoding only
        await store.get(KEYS[1])
        assert store.encoded == [1, 1]

    asyncio.run(run())
