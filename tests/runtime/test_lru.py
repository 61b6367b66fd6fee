"""The dictionary of bounded size."""

from __future__ import annotations

from flashcocos.runtime.lru import LruBytes


def test_the_least_recently_used_make_room() -> None:
    cache: LruBytes[bytes] = LruBytes(10, len)
    for key in "abc":
        cache.put(key, bytes(3))
    assert cache.get("a") is not None
    cache.put("d", bytes(4))
    assert [key for key in "abcd" if cache.get(key)] == ["a", "c", "d"]
    assert cache.bytes == 10
    cache.put("a", bytes(5))  # again, and larger: in place of the old one
    assert (cache.bytes, len(cache)) == (9, 2)
    cache.put("e", bytes(99))
    assert (cache.bytes, len(cache)) == (99, 1)
