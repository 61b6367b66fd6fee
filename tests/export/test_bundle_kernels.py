"""`flashcocos export --aot`: a bundle that brings the warp, compiled for GPUs that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from exported import model_file

from flashcocos import cli
from flashcocos.bundle import Bundle
from flashcocos.config import ModelConfig
from flashcocos.errors import BackendError
from flashcocos.export import bundle as export_module
from flashcocos.runtime.gpu.cubins import find_kernels

TINY = ModelConfig.preset("tiny")
# this process's Triton interprets and cannot compile
_COMPILE = """
import json, sys
from flashcocos.config import ModelConfig
from flashcocos.export.bundle import compiled_kernels
files = compiled_kernels(ModelConfig.preset("tiny"), [86, 120], ["float16"])
print(json.dumps({name: data.hex() for name, data in files.items()}))
"""


@pytest.fixture(scope="module")
def kernels():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", _COMPILE], capture_output=True, text=True, env=environment, check=True)
    return {name: bytes.fromhex(data) for name, data in json.loads(done.stdout.splitlines()[-1]).items()}


def test_the_kernels_become_files_of_the_bundle(kernels, make_bundle, monkeypatch, tmp_path):
    asked = []

    def compiled(config, targets):
        asked.append((config, targets))
        return kernels

    monkeypatch.setattr(export_module, "compiled_kernels", compiled)
    plain = Bundle(make_bundle(TINY, "plain"))
    bundle = Bundle(export_module.export_bundle(model_file(TINY), tmp_path / "model.zip", targets=[86, 120]))
    assert asked == [(TINY, [86, 120])]
    assert set(bundle.manifest.files) - set(plain.manifest.files) == set(kernels)
    bundle.verify()

    def find(capability, driver="13.0"):
        sources = [bundle]
        return find_kernels(sources, TINY, ["float16"], capability=capability, driver=driver, remedy="build them")

    for capability in (86, 89, 120):  # 8.9 runs the cubins of 8.6
        assert {cubin.dtype for cubin in find(capability).values()} == {"float16"}
    assert find(89, driver="12.0")
    with pytest.raises(BackendError, match=r"compiled by CUDA 13\.\d+, the NVIDIA driver supports CUDA 12\.9"):
        find(120, driver="12.9")  # Triton's other compiler, for sm_90 and newer
    with pytest.raises(BackendError, match="there are: float16 for sm_86, sm_120"):
        find(90)


def test_single_takes_no_kernels(capsys, tmp_path):
    command = ["export", "model.safetensors", "-o", str(tmp_path / "one.onnx"), "--single", "--aot", "sm_89"]
    assert cli.main(command) == 1
    assert "--aot puts kernels into a bundle" in capsys.readouterr().err
