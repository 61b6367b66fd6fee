"""Every line of the tile table compiles, for every architecture, within its shared memory and without a spill.

The real compiler runs in a process of its own, because this one may have Triton in interpreter mode.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys

import pytest

from flashcocos.errors import BackendError
from flashcocos.kernels.gpu import aot, configs
from flashcocos.runtime.gpu.cubins import evaluate

triton_nine_tap = pytest.importorskip("flashcocos.kernels.gpu.triton_nine_tap", reason="needs the triton package")

SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # what a block may use, from NVIDIA's tables
SAME_AS_80 = (86, 89)


def python(*arguments, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**environment, **variables})


def run(*arguments, **variables):
    return python("-m", "flashcocos.kernels.gpu.aot", *arguments, **variables)


# In one process, which imports once, and each distinct case once. Of the forward, 86 and 89 have the tiles of 80. The
# warp of 48 needs more registers than narrower ones; a patch of 5 has two widths of tile. Float32 is the same code on
# every architecture. The last part is what only a launch from Python takes: the bands of a split, maps of one pixel
# (sizes become constants), the merge.
COMPILE = """
import dataclasses, sys
from pathlib import Path
from flashcocos.kernels.gpu import aot, configs, triton_kernels, triton_nine_tap

folder = Path(sys.argv[1])
for sms, dtype, patch, values in (
    ([80, 90, 120], "float16", 3, [48]),
    ([80], "float16", 5, [48, 151]),
    ([80], "float32", 3, [48, 151]),
):
    list(aot.compile_kernels(folder, sms, dtypes=[dtype], patch=patch, values=values))


def warp(sm, dtype, values, patch=3):
    return next(job for job in aot._jobs(sm, dtype, [values], patch, 256) if job.name.startswith("warp"))


for sm, values, patch in ((86, 48, 3), (89, 48, 3), (90, 48, 5), (90, 151, 5), (120, 48, 5), (120, 151, 5)):
    aot._compile(folder, sm, "float16", warp(sm, "float16", values, patch))

for sm, dtype, size in ((75, "float16", 2), (80, "float16", 2), (90, "float16", 2), (80, "float32", 4)):
    element, blocks = "*" + aot.DTYPES[dtype], configs.backward_blocks(sm, size)
    types = dict.fromkeys(triton_kernels.score_gradient_kernel.arg_names, "*fp32")
    types |= dict.fromkeys(("theta", "phi", "values", "grad_out"), element)
    types |= {n: "i32" for n in types if n.startswith(("first", "count", "height", "width"))}
    types |= {"scale": "fp32", "inverse_temperature": "fp32"}
    constants = {"C": 256, "V": 48, "PATCH": 3, "STORE_WEIGHT": True}
    constants |= {"BN": blocks.queries, "BM": blocks.keys, "BC": blocks.channels, "BV": 16}
    types = {name: kind for name, kind in types.items() if name not in constants}
    kernel = triton_kernels.score_gradient_kernel
    aot._compile(folder, sm, dtype, aot._Job(f"score_{dtype}", kernel, blocks, types, constants, ("", "", "")))
    blocks = configs.fold_blocks(size, 256)
    types = dict.fromkeys(triton_kernels.fold_kernel.arg_names, "i32")
    types |= {"chunk": "*fp32", "source": element, "target": "*fp32"}
    constants = {"stride_j": 1, "source_c": 1, "target_c": 1, "C": 256, "PATCH": 3, "BX": blocks.queries}
    tf32 = size == 2 and configs.architecture(sm).tf32
    constants |= {"BY": blocks.keys, "BC": blocks.channels, "PRECISION": "tf32" if tf32 else "ieee"}
    types = {name: kind for name, kind in types.items() if name not in constants}
    kernel = triton_kernels.fold_kernel
    aot._compile(folder, sm, dtype, aot._Job(f"fold_{dtype}", kernel, blocks, types, constants, ("", "", "")))

configs.WHOLE_BAND = configs.SPLIT_BAND
for sm, dtype in ((80, "float16"), (90, "bfloat16"), (120, "float16")):
    job = warp(sm, dtype, 151)
    aot._compile(folder, sm, dtype, dataclasses.replace(job, name=f"split_{dtype}"))
sizes = dict.fromkeys(("height_q", "width_q", "height_k", "width_k"), 1)
types = {name: kind for name, kind in job.types.items() if name not in sizes}
pixel = dataclasses.replace(job, name="pixel_float16", types=types, constants={**job.constants, **sizes})
aot._compile(folder, 120, "float16", pixel)
types = {"parts": "*fp32", "part_lse": "*fp32", "out": "*fp16", "lse": "*fp32", "positions": "i32", "splits": "i32"}
blocks = configs.MERGE
constants = {"V": 48, "BN": blocks.queries, "BV": blocks.channels}
job = aot._Job("merge_float16", triton_nine_tap.merge_kernel, blocks, types, constants, ("", "", ""))
aot._compile(folder, 80, "float16", job)
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The descriptions of the kernels of `COMPILE`, and of 75's by the command line."""
    folder = tmp_path_factory.mktemp("cubins")
    variables = {"TRITON_CACHE_DIR": str(folder / "cache")}
    for done in (
        run("-o", folder, "--sm", 75, "--values", 48, 151, **variables),
        python("-c", COMPILE, folder, **variables),
    ):
        assert done.returncode == 0, done.stderr
    return folder, [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def test_every_architecture_has_its_kernels(compiled):
    folder, descriptions = compiled
    warp = "warp_p3_c256_v48_float16"
    every = {"pack_float16", "statistics_p3_c256_float16", "match_p3_c256_float16", warp}
    for sm in SHARED_KIB:
        expected = {warp} if sm in SAME_AS_80 else every
        assert {d["kernel"] for d in descriptions if d["architecture"] == sm} >= expected
    for description in descriptions:
        cubin = (folder / description["cubin"]).read_bytes()
        assert cubin.startswith(b"\x7fELF")
        assert hashlib.sha256(cubin).hexdigest() == description["sha256"]
    assert len(list(folder.glob("*.cubin"))) == len(descriptions)


def test_what_fits_80_fits_those_with_its_tiles(compiled):
    _, descriptions = compiled
    for sm in SAME_AS_80:
        line = dataclasses.replace(configs.ARCHITECTURES[sm], shared_kib=SHARED_KIB[80])
        assert line == configs.ARCHITECTURES[80]
        assert max(d["shared_bytes"] for d in descriptions if d["architecture"] == 80) <= SHARED_KIB[sm] * 1024


def test_the_rule_chooses_the_kernel(compiled):
    _, descriptions = compiled
    for description in descriptions:
        if description["kernel"].startswith(("warp", "match")):
            tensor_cores = description["architecture"] >= 80 and description["dtype"] != "float32"
            nine_tap = tensor_cores and description["constants"]["PATCH"] == 3
            assert description["entry"] == ("nine_tap_kernel" if nine_tap else "forward_kernel"), description["kernel"]


def test_nothing_spills_and_shared_memory_fits(compiled):
    _, descriptions = compiled
    assert {sm: line.shared_kib for sm, line in configs.ARCHITECTURES.items()} == SHARED_KIB
    for description in descriptions:
        name = f"sm{description['architecture']} {description['kernel']}"
        assert description["shared_bytes"] <= SHARED_KIB[description["architecture"]] * 1024, name
        assert description["spilled_bytes"] == 0, name
        # a block's registers must fit the 65536 of a multiprocessor
        assert 16 <= description["registers"] <= 65536 // description["threads"], name


def test_a_description_is_all_that_a_launch_needs(compiled):
    _, descriptions = compiled
    warp = next(d for d in descriptions if d["kernel"] == "warp_p3_c256_v48_float16" and d["architecture"] == 80)
    names = [argument["name"] for argument in warp["arguments"]]
    sizes = ["height_q", "width_q", "height_k", "width_k", "scale"]
    assert names[:14] == ["theta", "phi", "values", "mu", "a", "nu", "b", "out", "lse", *sizes]
    assert names[14:] == list(aot.HIDDEN)[: len(names) - 14]
    types = {argument["name"]: argument["type"] for argument in warp["arguments"]}
    assert types["theta"] == types["values"] == "*fp16"
    assert types["out"] == types["lse"] == "*fp32"
    assert types["scale"] == "fp32"
    blocks = configs.nine_tap_blocks(80, 2, 3, 256, 0)
    assert warp["entry"] == "nine_tap_kernel"
    assert warp["grid"] == [f"ceil(ceil(height_q / 4) * width_q / {blocks.queries - 2})", "batch", "1"]
    assert warp["threads"] == 32 * blocks.warps
    assert warp["constants"]["V"] == warp["constants"]["VP"] == 48
    old = next(d for d in descriptions if d["kernel"] == "warp_p3_c256_v48_float16" and d["architecture"] == 75)
    assert old["arguments"] == warp["arguments"]
    assert old["grid"] == [f"ceil(height_q * width_q / {configs.forward_blocks(75, 2, 48).queries})", "batch", "1"]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (9, 7), (64, 64), (33, 200)])
def test_the_grid_is_that_of_the_launch_from_python(height, width):
    blocks = configs.nine_tap_blocks(80, 2, 3, 256, 0)
    sizes = {"height_q": height, "width_q": width}
    programs = evaluate(aot._lanes_grid(blocks), sizes)
    assert programs == triton_nine_tap.query_tiles(height, width, configs.WHOLE_BAND, blocks.queries)


def test_help_has_an_example():
    done = run("--help")
    assert done.returncode == 0
    assert "example: python -m flashcocos.kernels.gpu.aot --sm 80 89" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sm", 70), "architecture 70 is not one of 75, 80, 86, 89, 90, 120"),
        (("--dtype", "int8"), "dtype 'int8' is not one of float16, bfloat16, float32"),
        (("--sm", 75, "--dtype", "bfloat16"), "architecture 75 has no bfloat16"),
        (("--patch", 2), "expected patch 1, 3 or 5"),
        (("--values", 300), "values of 1 to 256"),
    ],
)
def test_wrong_options_are_refused_before_any_work(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(aot, "_compile", lambda *_: pytest.fail("compiled something"))
    monkeypatch.setattr(aot, "_jobs", lambda *_: iter(()))
    with pytest.raises(SystemExit, match="2"):
        aot.main(["-o", str(tmp_path / "out"), *map(str, arguments)])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_interpreted_triton_cannot_compile(tmp_path):
    done = run("-o", tmp_path / "out", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr


def test_missing_triton_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(BackendError, match="needs the triton package"):
        next(aot.compile_kernels(tmp_path))


def test_too_much_shared_memory_is_refused(tmp_path):
    script = (
        "from pathlib import Path; from flashcocos.kernels.gpu import aot, configs;"
        "configs.PACK = configs.BlockSizes(256, 0, 256, 8, 1);"
        f"list(aot.compile_kernels(Path({str(tmp_path)!r}), [75], dtypes=['float32']))"
    )
    done = python("-c", script)
    assert "BackendError: pack_float32 takes 262144 bytes of shared memory, sm 75 has 65536" in done.stderr
    assert not list(tmp_path.iterdir())


def test_nearest_older_architecture_serves_an_unknown_one():
    assert configs.architecture(87) is configs.ARCHITECTURES[86]
    assert configs.architecture(103) is configs.ARCHITECTURES[90]
    with pytest.raises(BackendError, match="75 or newer, got 61"):
        configs.architecture(61)
