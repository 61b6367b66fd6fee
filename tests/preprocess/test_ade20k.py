"""ADE20K ids: kept as they are, 255 to unknown."""

from __future__ import annotations

import numpy as np
import pytest

from flashcocos.errors import InputError
from flashcocos.preprocess import ade20k


def test_every_id_is_kept_and_dont_care_becomes_unknown() -> None:
    raw = np.arange(152, dtype=np.uint8).reshape(8, 19)
    raw[-1, -1] = 255
    label = ade20k.class_ids(raw)
    assert label[-1, -1] == 0
    np.testing.assert_array_equal(label.ravel()[:-1], np.arange(151))


@pytest.mark.parametrize("wrong", [151, 254])
def test_other_ids_are_refused(wrong: int) -> None:
    with pytest.raises(InputError, match=f"class id {wrong}.*expected 0 to 150"):
        ade20k.load(np.full((2, 2), wrong, np.uint8))
