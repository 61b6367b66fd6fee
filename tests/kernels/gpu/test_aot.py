"""Every line of the tile table compiles, for every architecture, within its shared memory and without a spill.

The real compiler runs in a process of its own, because this one may have Triton in interpreter mode.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest

from flashcocos.errors import BackendError, InputError
from flashcocos.kernels import signatures
from flashcocos.kernels.gpu import aot, configs

triton_nine_tap = pytest.importorskip("flashcocos.kernels.gpu.triton_nine_tap", reason="needs the triton package")

# what a block may use, from NVIDIA's tables; of others the line of an older chip is compiled, and no more used
SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
OTHERS = (87, 103, 110, 121)


def python(*arguments, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**environment, **variables})


FORWARD = f"""
import sys
from pathlib import Path
from flashcocos.kernels.gpu import aot

for architectures, values, options in (
    ([80, 86, 89, 120, *{OTHERS}], [48], {{}}),
    ([75, 90], [48, 151], {{}}),
    ([80, 90, 120], [48, 151], {{"patch": 5}}),
    ([80], [48, 151], {{"dtypes": ["float32"]}}),
):
    list(aot.compile_kernels(Path(sys.argv[1]), architectures, values=values, **options))
"""

BACKWARD = """
from pathlib import Path
from flashcocos.kernels.gpu import aot, configs, triton_kernels as kernels
from flashcocos.kernels.signatures import ELEMENTS

# float32 is the same code on every architecture
for sm, dtype, size in ((75, "float16", 2), (80, "float16", 2), (90, "float16", 2), (80, "float32", 4)):
    element, blocks = "*" + ELEMENTS[dtype], configs.backward_blocks(sm, size)
    types = dict.fromkeys(kernels.score_gradient_kernel.arg_names, "*fp32")
    types |= dict.fromkeys(("theta", "phi", "values", "grad_out"), element)
    types |= {n: "i32" for n in types if n.startswith(("first", "count", "height", "width"))}
    types |= {"scale": "fp32", "inverse_temperature": "fp32"}
    constants = {"C": 256, "V": 48, "PATCH": 3, "STORE_WEIGHT": True}
    constants |= {"BN": blocks.queries, "BM": blocks.keys, "BC": blocks.channels, "BV": 16}
    types = {name: kind for name, kind in types.items() if name not in constants}
    job = aot._Job(f"score_{dtype}", kernels.score_gradient_kernel, blocks, types, constants)
    aot._compile(Path(sys.argv[1]), sm, dtype, job)
    blocks = configs.fold_blocks(size, 256)
    types = dict.fromkeys(kernels.fold_kernel.arg_names, "i32")
    types |= {"chunk": "*fp32", "source": element, "target": "*fp32"}
    constants = {"stride_j": 1, "source_c": 1, "target_c": 1, "C": 256, "PATCH": 3, "BX": blocks.queries}
    tf32 = size == 2 and configs.architecture(sm).tf32
    constants |= {"BY": blocks.keys, "BC": blocks.channels, "PRECISION": "tf32" if tf32 else "ieee"}
    types = {name: kind for name, kind in types.items() if name not in constants}
    job = aot._Job(f"fold_{dtype}", kernels.fold_kernel, blocks, types, constants)
    aot._compile(Path(sys.argv[1]), sm, dtype, job)
"""


# what only a launch from Python takes: the bands of a split, maps of one pixel (sizes become constants), the merge
SPLIT = """
import dataclasses
from pathlib import Path
from flashcocos.kernels.gpu import aot, configs, triton_nine_tap as kernels
from flashcocos.kernels.signatures import arguments

for sm, dtype in ((80, "float16"), (90, "bfloat16"), (120, "float16")):
    blocks = configs.nine_tap_blocks(sm, 2, 3, 256, 0)
    types = arguments("warp", dtype)
    del types["index"], types["probability"]
    types["lse"] = "*fp32"
    constants = configs.warp_constants(3, 256, 151, blocks, configs.SPLIT_BAND)
    constants |= dict.fromkeys(("index", "probability"))
    job = aot._Job(f"split_{dtype}", kernels.nine_tap_kernel, blocks, types, constants)
    aot._compile(Path(sys.argv[1]), sm, dtype, job)
sizes = dict.fromkeys(("height_q", "width_q", "height_k", "width_k"), 1)
types = {name: kind for name, kind in job.types.items() if name not in sizes}
pixel = dataclasses.replace(job, name="pixel_float16", types=types, constants={**job.constants, **sizes})
aot._compile(Path(sys.argv[1]), 120, "float16", pixel)
whole = configs.warp_constants(3, 256, 1, blocks, configs.WHOLE_BAND)
match = {name: kind for name, kind in arguments("warp", "float16").items() if name not in ("values", "out")}
unwanted = dict.fromkeys(("values", "out", "lse"))
job = aot._Job("match_float16", kernels.nine_tap_kernel, blocks, match, whole | unwanted)
aot._compile(Path(sys.argv[1]), 120, "float16", job)
types = {"parts": "*fp32", "part_lse": "*fp32", "out": "*fp16", "lse": "*fp32", "positions": "i32", "splits": "i32"}
blocks = configs.MERGE
constants = {"V": 48, "BN": blocks.queries, "BV": blocks.channels}
job = aot._Job("merge_float16", kernels.merge_kernel, blocks, types, constants)
aot._compile(Path(sys.argv[1]), 80, "float16", job)
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The descriptions of all kernels: the warp of 48 channels everywhere, the rest once for each different tile."""
    folder = tmp_path_factory.mktemp("cubins")
    # in one process, for each takes seconds to import Triton
    done = python("-c", FORWARD + BACKWARD + SPLIT, folder, TRITON_CACHE_DIR=str(folder / "cache"))
    assert done.returncode == 0, done.stderr
    return folder, [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def test_every_architecture_has_every_kernel(compiled):
    folder, descriptions = compiled
    expected = {f"{name}_float16" for name in ("pack", "statistics_p3_c256", "warp_p3_c256_v48")}
    for sm in (*SHARED_KIB, *OTHERS):
        assert {d["kernel"] for d in descriptions if d["architecture"] == sm} >= expected
    for description in descriptions:
        cubin = (folder / description["cubin"]).read_bytes()
        assert cubin.startswith(b"\x7fELF")
        assert hashlib.sha256(cubin).hexdigest() == description["sha256"]
    assert len(list(folder.glob("*.cubin"))) == len(descriptions)


def test_the_rule_chooses_the_kernel(compiled):
    _, descriptions = compiled
    for description in descriptions:
        if description["kernel"].startswith("warp"):
            few = description["architecture"] in (86, 87, 89, 120, 121) and description["dtype"] != "float32"
            nine_tap = few and description["constants"]["PATCH"] == 3
            assert description["entry"] == ("nine_tap_kernel" if nine_tap else "forward_kernel"), description["kernel"]


def test_nothing_spills_and_shared_memory_fits(compiled):
    _, descriptions = compiled
    assert {sm: line.shared_kib for sm, line in configs.ARCHITECTURES.items()} == SHARED_KIB
    for description in descriptions:
        name = f"sm{description['architecture']} {description['kernel']}"
        line = configs.architecture(description["architecture"])
        assert description["shared_bytes"] <= line.shared_kib * 1024, name
        assert description["spilled_bytes"] == 0, name
        # a block's registers must fit the 65536 of a multiprocessor
        assert 16 <= description["registers"] <= 65536 // description["threads"], name


def test_a_description_is_all_that_a_launch_needs(compiled):
    _, descriptions = compiled
    for sm, entry in ((120, "nine_tap_kernel"), (80, "forward_kernel"), (75, "forward_kernel")):
        warp = next(d for d in descriptions if d["kernel"] == "warp_p3_c256_v48_float16" and d["architecture"] == sm)
        table, types = signatures.arguments("warp", "float16"), {a["name"]: a["type"] for a in warp["arguments"]}
        assert list(types)[: len(table)] == list(table)
        assert list(types)[len(table) :] == list(signatures.HIDDEN)[: len(types) - len(table)]
        assert {name: types[name] for name in table} == table
        assert warp["entry"] == entry
        assert warp["revision"] == signatures.REVISION
        assert warp["constants"]["V"] == warp["constants"]["VP"] == 48
        assert int(warp["cuda"].split(".")[0]) >= (13 if sm >= 90 else 12)


@pytest.mark.parametrize(
    ("kernel", "constants", "sizes", "grid"),
    [
        ("pack", {"BN": 64, "BC": 64}, {"positions": 65, "padded": 128}, (2, 2, 3)),
        ("statistics", {"BN": 64}, {"height": 9, "width": 7}, (1, 3, 1)),
        ("warp", {"BN": 64}, {"height_q": 9, "width_q": 8}, (2, 3, 1)),
        # 9 rows in bands of 4 are 3, of 100 columns each: 300 lanes in tiles of 62
        ("warp", {"BN": 64, "BAND": 4}, {"height_q": 9, "width_q": 100}, (5, 3, 1)),
    ],
)
def test_grids(kernel, constants, sizes, grid):
    assert signatures.grid(kernel, constants, sizes, 3) == grid


@pytest.mark.parametrize(
    ("architecture", "dtype", "message"),
    [
        (70, "float16", "architecture 70 is not one of 75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121"),
        (75, "bfloat16", "architecture 75 has no bfloat16"),
    ],
)
def test_wrong_options_are_refused_before_any_work(architecture, dtype, message, tmp_path, monkeypatch):
    monkeypatch.setattr(aot, "_compile", lambda *_: pytest.fail("compiled something"))
    with pytest.raises(InputError, match=message):
        next(aot.compile_kernels(tmp_path / "out", [architecture], dtypes=[dtype]))
    assert not (tmp_path / "out").exists()


def test_interpreted_triton_cannot_compile(tmp_path):
    script = f"from flashcocos.kernels.gpu import aot; next(aot.compile_kernels({str(tmp_path)!r}))"
    done = python("-c", script, TRITON_INTERPRET="1")
    assert "BackendError: TRITON_INTERPRET is set" in done.stderr


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
