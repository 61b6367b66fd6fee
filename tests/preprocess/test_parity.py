"""Raw sample files through our preparation equal the tensors that the public networks were fed, in every pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from parity_samples import SAMPLES

from flashcocos.preprocess import load_image, load_raw, to_uint8

SIZE = (256, 256)


@pytest.mark.parametrize("task", SAMPLES)
def test_images_and_labels_are_equal(shared: Path, task: str) -> None:
    with np.load(shared / "parity" / f"{task}.npz", allow_pickle=False) as stored:
        for name, label_name, file in zip(("image", "ref"), ("label", "label_ref"), SAMPLES[task], strict=True):
            path = shared / "samples" / file
            np.testing.assert_array_equal(to_uint8(load_image(path, SIZE)), stored[name][0].transpose(1, 2, 0))
            # the stored edges were made with scikit-image 0.26's Canny
            label = load_raw(task, path, SIZE, canny="modern")
            expected = stored[label_name][0]
            if label.ndim == 2:
                # beside the ids, celebahq stores the mask of the glasses, which nobody here wears
                assert not expected[1:].any()
                expected = expected[0]
            np.testing.assert_array_equal(label, expected)


def test_upstream_canny_changes_the_first_edge_plane_alone(shared: Path) -> None:
    path = shared / "samples" / SAMPLES["celebahqedge"][0]
    upstream, modern = (load_raw("celebahqedge", path, SIZE, canny=canny) for canny in ("upstream", "modern"))
    assert (upstream[0] != modern[0]).sum() == 552
    np.testing.assert_array_equal(upstream[1:], modern[1:])
