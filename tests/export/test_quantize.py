"""`flashcocos quantize`: int8 where it holds, float where it does not, and a measure before anything is written."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from exported import CLASSES
from PIL import Image
from tiny_bundle import random_label, random_picture

from flashcocos import cli
from flashcocos.bundle import Bundle
from flashcocos.bundle.default_model import PAIRS, resolve_model
from flashcocos.errors import BackendError, InputError
from flashcocos.export.bundle import export_bundle
from flashcocos.export.quantize import MIN_PSNR, quantize_bundle
from flashcocos.export.verify import verify
from flashcocos.runtime import Translator
from flashcocos.runtime.jobs import FolderRequest, match_files


@pytest.fixture(scope="module")
def quantized(pairs, tmp_path_factory):
    return quantize_bundle(resolve_model(), tmp_path_factory.mktemp("bundle") / "int8.zip", pairs)


def weights(path):
    """Element type of the weight of every convolution of a bundle's synthesis."""
    found = {}
    for stage in ("coarse", "fine"):
        graph = onnx.load_model_from_string(Bundle(path).read_stage(stage)).graph
        stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
        made = {node.output[0]: stored.get(node.input[0]) for node in graph.node if node.op_type == "DequantizeLinear"}
        for node in graph.node:
            if node.op_type == "Conv":
                found[stage, node.input[1]] = made.get(node.input[1], stored.get(node.input[1]))
    return found


def test_the_generator_is_int8_and_keeps_its_picture(quantized, pairs):
    assert Bundle(quantized.path).manifest.precision == "int8"
    assert len(quantized.psnr) == len(pairs) // 4
    # measured: 57 dB
    assert min(quantized.psnr) >= 52 > MIN_PSNR
    kinds = list(weights(quantized.path).values())
    assert kinds.count(onnx.TensorProto.INT8) == quantized.quantized == 54
    assert len(kinds) == quantized.convolutions == 74
    with Translator(quantized.path, device="cpu") as small, Translator(device="cpu") as large:
        job = pairs[0]
        pictures = [
            one.translate(job.label, one.encode_exemplar(job.exemplar, job.exemplar_label)).image
            for one in (small, large)
        ]
    error = np.square(pictures[0].astype(float) - pictures[1]).mean()
    assert 10 * np.log10(255**2 / error) == pytest.approx(quantized.psnr[0], abs=0.2)


def test_the_bundle_passes_verification(quantized):
    report = verify(quantized.path, sizes=((64, 96),))
    assert report.ok, report.table()


def test_float_stays_where_it_has_to(make_bundle, tmp_path):
    """The last convolution, the self-attention, and the convolutions over the label's planes."""
    for index in range(2):
        Image.fromarray(random_label(CLASSES, 64, 64, seed=index)).save(tmp_path / f"{index}.png")
        Image.fromarray(random_picture(64, 64, seed=index)).save(tmp_path / f"{index}.jpg")
    list_ = tmp_path / "pairs.csv"
    list_.write_text("".join(f"{index}.png,{index}.jpg,{index}.png\n" for index in range(2)))
    jobs = match_files(FolderRequest(None, None, None, tmp_path / "pictures", pairs=list_))
    done = quantize_bundle(make_bundle(CLASSES), tmp_path / "int8", jobs, min_psnr=20)
    kinds = weights(done.path)
    names = [name for (_, name), kind in kinds.items() if kind != onnx.TensorProto.INT8]
    assert sum(".attention." in name for name in names) == 4
    assert any(name.endswith("generator.last.weight") for name in names)
    assert done.quantized == len(kinds) - len(names)


def test_too_little_quality_is_refused_and_nothing_written(pairs, tmp_path, caplog):
    with pytest.raises(
        BackendError, match=r"int8 gives \d+\.\d dB on a held-out pair, expected 90 or more; calibrate on"
    ):
        quantize_bundle(resolve_model(), tmp_path / "int8.zip", pairs[:2], min_psnr=90)
    assert list(tmp_path.iterdir()) == []
    (warning,) = caplog.messages
    assert warning.startswith("measured on 1 held-out pairs: ")
    assert warning.endswith(" dB means little; give 32 pairs or more")


def test_what_cannot_be_quantized_is_refused(quantized, pairs, tmp_path):
    with pytest.raises(InputError, match="1 pairs: expected at least 2"):
        quantize_bundle(resolve_model(), tmp_path / "int8", pairs[:1])
    with pytest.raises(InputError, match="would overwrite the input"):
        quantize_bundle(quantized.path, quantized.path, pairs)
    with pytest.raises(InputError, match="its generator is int8 already"):
        quantize_bundle(quantized.path, tmp_path / "int8", pairs)
    with pytest.raises(InputError, match="export in float32, then flashcocos quantize"):
        export_bundle("model.safetensors", tmp_path / "b", precision="int8")


def test_the_command(tmp_path, capsys):
    output = tmp_path / "int8.zip"
    assert cli.main(["quantize", str(resolve_model()), "--pairs", str(PAIRS), "--count", "2", "-o", str(output)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("54 of 74 convolutions in int8; ")
    assert printed.splitlines()[-1] == str(output)
    assert cli.main(["quantize", str(resolve_model()), "-o", str(output)]) == 1
    assert "nothing to translate" in capsys.readouterr().err
