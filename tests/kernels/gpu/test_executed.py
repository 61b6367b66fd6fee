"""The compiled kernels, executed: their PTX in an interpreter of our own, where neither a GPU nor ptxas is involved.

Every launch is the project's own, from Python or by the torch-free runtime with kernels compiled ahead of time. What it
computes is compared with the float64 oracle, and what the machine of tests/support/ptx_machine.py notices must be
nothing: accesses out of bounds, misaligned or racing, and branches within a block.

CI executes a choice; all of it, with every number and every mistake, in about an hour:

    FLASHCOCOS_EXECUTE=all python -m pytest tests/kernels/gpu/test_executed.py -s
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

import msgspec
import numpy as np
import ptx_compiler
import pytest
import torch
from ptx_launch import Launcher, memory_of
from ptx_machine import Machine
from ptx_operations import Fault
from tolerances import EXECUTED, assert_close

from flashcocos.config import PRESETS
from flashcocos.kernels import reference
from flashcocos.runtime.gpu.cubins import find_kernels
from flashcocos.runtime.gpu.device import nbytes
from flashcocos.runtime.gpu.warp import DeviceWarp, key_tensors, query_tensors

triton_warp = pytest.importorskip("flashcocos.kernels.gpu.triton_warp", reason="needs the triton package")

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
EVERYTHING = os.environ.get("FLASHCOCOS_EXECUTE") == "all"


class Case(NamedTuple):
    """Maps, and what they are warped by. multiprocessors: of the GPU, by which nine taps are split over the keys."""

    sm: int
    dtype: torch.dtype
    kernel: str = "straightforward"
    multiprocessors: int = 1
    query: tuple[int, int] = (5, 7)
    key: tuple[int, int] = (6, 11)
    batch: int = 1
    channels: int = 20
    values: int = 3

    def __str__(self) -> str:
        sizes = f"{self.batch}x{self.channels}x{self.query}x{self.key}x{self.values}".replace(", ", "x")
        return f"sm{self.sm}-{str(self.dtype)[6:]}-{self.kernel}-{self.multiprocessors}-{sizes}"


# of several tiles of queries, keys and values; of which a row of keys fills a tile; of several chunks of the backward
LARGE = {"query": (20, 23), "key": (17, 19), "batch": 2, "channels": 40, "values": 17}
WIDE = {"query": (3, 67), "key": (9, 62), "channels": 32}
CHUNKS = {"query": (9, 8), "key": (10, 13), "channels": 40, "values": 17}
NINE_TAP = {"kernel": "nine_tap"}

if EVERYTHING:
    TARGETS = list(itertools.product((80, 86, 120), (HALF, BRAIN)))
    MATCH = [
        Case(sm, dtype, **sizes, **kernel)
        for sm, dtype in TARGETS
        for kernel in ({}, NINE_TAP)
        for sizes in ({}, LARGE, WIDE)
    ]
    MATCH += [Case(sm, SINGLE, **sizes) for sm in (80, 86, 120) for sizes in ({}, LARGE)]
    # split over the keys; with 17 values the parts would take more memory than the maps, so there would be one
    FORWARD = MATCH + [case._replace(multiprocessors=3, values=3) for case in MATCH if case.kernel == "nine_tap"]
    BACKWARD = [
        Case(sm, dtype, **sizes) for sm in (80, 86, 120) for dtype in (HALF, BRAIN, SINGLE) for sizes in ({}, CHUNKS)
    ]
    AHEAD = [
        Case(sm, dtype, query=query, key=key, batch=2, channels=channels)
        for sm, dtype in [*TARGETS, (89, HALF), (89, BRAIN)]
        for channels in (32, 128)
        for query, key in (((5, 7), (6, 11)), ((13, 19), (9, 17)))
    ]
else:
    FORWARD = [Case(80, HALF, "nine_tap", 3, batch=2), Case(120, BRAIN, "nine_tap", 3), Case(86, SINGLE)]
    MATCH = [Case(80, HALF, "nine_tap")]
    BACKWARD = [Case(80, HALF), Case(120, BRAIN, key=(6, 7)), Case(86, SINGLE, key=(6, 7))]
    AHEAD = [
        Case(86, BRAIN, query=(5, 17), key=(4, 7), channels=128),
        Case(80, BRAIN, query=(13, 11), key=(6, 7), channels=32),
        Case(120, HALF, query=(5, 7), key=(6, 11), channels=32),
    ]

# a pattern and what takes its place: a barrier left out, the mask of an access inverted, an access moved by an element
MISTAKES = {
    "barrier": (r"bar\.sync.*", ""),
    "mask": (r"@(?=%p\d+ (ld|st)\.global)", "@!"),
    "offset": (r"(?<=global\.b32 )(.*?)\+ 0 \]", r"\1+ 4 ]"),
}


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executor]:
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        for sm in (80, 120):
            get_ptxas(sm)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs a triton with its ptxas, which the version of the PTX follows: {error}")
    with ptx_compiler.start(tmp_path_factory.mktemp("ptx")) as process:
        yield process


@pytest.fixture(autouse=True)
def _fill_empty_tensors():
    """With NaN, so that what no kernel writes is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make(case: Case) -> list[torch.Tensor]:
    """theta, phi, values, and a gradient of the warp."""
    generator = torch.Generator().manual_seed(0)
    shapes = (case.channels, case.query), (case.channels, case.key), (case.values, case.key), (case.values, case.query)
    return [torch.randn(case.batch, count, *size, generator=generator).to(case.dtype) for count, size in shapes]


def check_launches(launcher: Launcher, *kernels: str) -> None:
    """These were executed, and nothing was noticed."""
    for name, machine in launcher.launches:
        print(f"sm{launcher.sm} {name} {machine.grid}: {dict(machine.problems)}")
    assert {name for name, _ in launcher.launches} == set(kernels)
    assert not [problem for _, machine in launcher.launches for problem in machine.problems]


def check_best(found: Sequence[torch.Tensor], theta: torch.Tensor, phi: torch.Tensor) -> None:
    """Index and probability."""
    logits = reference.logits(theta.double(), phi.double(), 3, 0.01)
    assert torch.equal(found[0].flatten(1), logits.argmax(-1))
    assert_close("probability", found[1].flatten(1), logits.softmax(-1).amax(-1), EXECUTED["out", SINGLE])


def check_forward(case: Case, launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> Sequence[torch.Tensor]:
    theta, phi, values, _ = make(case)
    with monkeypatch.context() as patch, triton_warp.choose_forward(case.kernel):
        launcher.patch(patch, triton_warp, case.multiprocessors)
        out, lse = triton_warp.warp_forward(theta, phi, values, 3, 0.01)
    forward = ("nine_tap", "merge") if case.kernel == "nine_tap" else ("forward",)
    check_launches(launcher, "pack", "statistics", *forward)
    expected, expected_lse = reference.warp(theta.double(), phi.double(), values.double(), 3, 0.01)
    assert_close("out", out, expected, EXECUTED["out", case.dtype])
    assert_close("lse", lse, expected_lse, EXECUTED["lse", SINGLE])
    return out, lse


def check_match(case: Case, launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> Sequence[torch.Tensor]:
    theta, phi = make(case)[:2]
    with monkeypatch.context() as patch, triton_warp.choose_forward(case.kernel):
        launcher.patch(patch, triton_warp, case.multiprocessors)
        found = triton_warp.match_forward(theta, phi, 3, 0.01)
    check_launches(launcher, "pack", "statistics", "nine_tap" if case.kernel == "nine_tap" else "forward")
    check_best(found, theta, phi)
    return found


@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_forward(case, compiler, monkeypatch):
    launcher = Launcher(compiler, case.sm)
    check_forward(case, launcher, monkeypatch)
    splits = [machine.grid[2] for name, machine in launcher.launches if name == "nine_tap"]
    assert all(count > 1 for count in splits) == (case.multiprocessors > 1 or not splits)


@pytest.mark.parametrize("case", MATCH, ids=str)
def test_match(case, compiler, monkeypatch):
    check_match(case, Launcher(compiler, case.sm), monkeypatch)


@pytest.mark.parametrize("case", BACKWARD, ids=str)
def test_backward(case, compiler, monkeypatch):
    *inputs, grad = make(case)
    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    out, lse = reference.warp(*leaves, 3, 0.01)
    expected = torch.autograd.grad(out, leaves, grad.double())
    launcher = Launcher(compiler, case.sm)
    launcher.patch(monkeypatch, triton_warp, case.multiprocessors)
    monkeypatch.setattr(triton_warp, "MAX_SCRATCH_BYTES", 0)  # chunks of 64 x 64
    found = triton_warp.warp_backward(*inputs, out.detach().to(case.dtype), lse.detach().float(), grad, 3, 0.01)
    check_launches(launcher, "pack", "statistics", "score_gradient", "fold")
    chunks = -(-math.prod(case.query) // 64) * -(-math.prod(case.key) // 64)
    assert [name for name, _ in launcher.launches].count("score_gradient") == chunks
    for name, got, want in zip(("theta", "phi", "values"), found, expected, strict=True):
        assert_close(f"gradient of {name}", got, want, EXECUTED["grad", case.dtype])


@pytest.mark.parametrize("case", AHEAD, ids=str)
def test_ahead_of_time(case, compiler, tmp_path):
    """As the runtime launches them: warp and match in one."""
    dtype = str(case.dtype).removeprefix("torch.")
    config = msgspec.structs.replace(PRESETS["tiny"], feature_channels=case.channels)
    assert (config.warped_channels, config.temperature) == (case.values, 0.01)
    options = {"values": [case.values], "channels": case.channels, "dtypes": [dtype]}
    compiler.submit(ptx_compiler.compile_ahead, tmp_path, case.sm, **options).result()
    cubins = find_kernels([tmp_path], config, [dtype], capability=case.sm, driver="99.0", remedy="")
    launcher = Launcher(compiler, case.sm)
    warp = DeviceWarp(launcher, cubins, config)
    theta, phi, values = (tensor.float() for tensor in make(case)[:3])
    tensors = {
        **key_tensors(config, dtype, case.batch, case.key),
        **query_tensors(config, dtype, case.batch, case.query),
    }
    planes = {"planes of theta": theta, "planes of phi": phi, "planes of values": values}
    launcher.memory = {name: memory_of(tensor) for name, tensor in planes.items()}
    launcher.memory |= {name: np.full(nbytes(*tensor), 0xFF, np.uint8) for name, tensor in tensors.items()}
    at = {name: memory.ctypes.data for name, memory in launcher.memory.items()}
    work = warp.pack_keys(at["planes of phi"], at["planes of values"], at, case.batch, case.key)
    for launch in (*work, *warp.run(at["planes of theta"], at, at, case.batch, case.query, case.key)):
        launch()
    nine_tap = case.channels >= 128 and case.sm != 80
    check_launches(launcher, "pack", "statistics", "nine_tap" if nine_tap else "forward")
    expected, _ = reference.warp(theta.double(), phi.double(), values.double(), 3, 0.01)
    warped, *best = (
        torch.from_numpy(launcher.memory[name].view(kind).reshape(shape))
        for name, (shape, kind) in ((name, tensors[name]) for name in ("warped", "index", "probability"))
    )
    assert_close("out", warped, expected, EXECUTED["out", case.dtype])
    check_best(best, theta, phi)


def test_sm_89_is_compiled_as_sm_86(compiler, tmp_path):
    """So what is executed for one holds for the other."""
    for sm in (86, 89):
        options = {"values": [3], "channels": 128, "dtypes": ["bfloat16"]}
        compiler.submit(ptx_compiler.compile_ahead, tmp_path, sm, **options).result()
    names = [path.stem.removesuffix("_sm86") for path in tmp_path.glob("*_sm86.cubin")]
    assert len(names) == 3
    for name in names:
        older, newer = ((tmp_path / f"{name}_sm{sm}.cubin").read_text() for sm in (86, 89))
        assert older.replace(".target sm_86", ".target sm_89") == newer


# two blocks of 32 threads: %r1 is a thread's number, %r2 its block's, %r3 and %r4 the places of its word and of its
# neighbor's in shared memory; of thread 0, %p1 is true in both blocks, %p2 in the first and %p3 in the second
PROGRAM = """
.visible .entry one(.param .u64 .ptr .global one_param_0)
{
ld.param.b64 %rd1, [one_param_0];
mov.u32 %r1, %tid.x;
mov.u32 %r2, %ctaid.x;
shl.b32 %r3, %r1, 2;
xor.b32 %r4, %r3, 4;
setp.eq.s32 %p1, %r1, 0;
setp.eq.s32 %p3, %r2, 1;
not.pred %p2, %p3;
and.pred %p2, %p2, %p1;
and.pred %p3, %p3, %p1;
BODY
$end:
ret;
}"""
STORE, LOAD = "st.global.b32 [ %rd1 + 0 ], { %r2 };", "ld.global.b32 { %r5 }, [ %rd1 + 0 ];"
NOTICED = {
    "out of bounds, memory": "@%p1 st.global.b32 [ %rd1 + 64 ], { %r1 };",
    "out of bounds, shared": "st.shared.b32 [%r3+4], %r1;",
    "misaligned, memory": "@%p1 ld.global.b32 { %r5 }, [ %rd1 + 2 ];",
    "threads of a block part": "@%p1 bra $end;",
    "race, shared: ld.shared.b32": "st.shared.b32 [%r3], %r1; ld.shared.b32 %r5, [%r4];",
    "race, shared: ld.shared.b8": "st.shared.b8 [%r3], %r1; ld.shared.b8 %rs5, [%r4];",
    "race, shared: st.shared.b32 [%r5]": "and.b32 %r5, %r3, 64; st.shared.b32 [%r5], %r1;",
    # written where another thread, or several, read
    "race, shared: st.shared.b32 [%r4]": "ld.shared.b32 %r5, [%r3]; st.shared.b32 [%r4], %r1;",
    "race, shared: @%p1 st": "mov.b32 %r5, 0; ld.shared.b32 %r6, [%r5]; @%p1 st.shared.b32 [%r5], %r1;",
    "race, memory: @%p3 st": f"@%p2 {STORE} bar.sync 0; @%p3 {STORE}",
    "race, memory: @%p3 ld": f"@%p2 {STORE} bar.sync 0; @%p3 {LOAD}",
    "race, memory: @%p3 st.global.b32 [ %rd1 + 0 ], { %r1 }": f"{LOAD} bar.sync 0; @%p3 {STORE.replace('r2', 'r1')}",
    # read before and after it is waited for; the latter needs a barrier
    "race, shared: @%p1 ld": "@%p1 cp.async.cg.shared.global [ %r3 + 0 ], [ %rd1 + 0 ], 0x10;"
    "cp.async.commit_group; @%p1 ld.shared.b32 %r5, [%r3]; cp.async.wait_group 0;",
    "race, shared: ld.shared.b32 %r6": "@%p1 cp.async.cg.shared.global [ %r3 + 0 ], [ %rd1 + 0 ], 0x10;"
    "cp.async.commit_group; bar.sync 0; cp.async.wait_group 0; and.b32 %r5, %r3, 12; ld.shared.b32 %r6, [%r5];",
    "nothing": "st.shared.b32 [%r3], %r1; bar.sync 0; ld.shared.b32 %r5, [%r4]; bar.sync 0; st.shared.b8 [%r3], %r1;"
    f"ld.shared.b8 %rs5, [%r4+1]; setp.eq.s32 %p4, %r2, 1; @%p4 bra $end; {LOAD}",
}


@pytest.mark.parametrize("message", NOTICED)
def test_the_machine_notices(message):
    memory = np.zeros(64, np.uint8)
    machine = Machine(PROGRAM.replace("BODY", NOTICED[message].replace(";", ";\n")), 32, 128)
    try:
        machine.run((2, 1, 1), [memory.ctypes.data], {"memory": memory})
    except Fault as fault:
        machine.problems[str(fault)] += 1
    assert [problem[: len(message)] for problem in machine.problems] == ([] if message == "nothing" else [message])


# tiles of queries and keys are full enough that no access is masked in all threads
FULL = {
    "nine_tap": (check_forward, Case(80, HALF, "nine_tap", query=(2, 62), key=(3, 62))),
    "forward": (check_forward, Case(80, HALF, query=(9, 15), key=(7, 19))),
    "match": (check_match, Case(80, HALF, "nine_tap", query=(2, 62), key=(3, 62))),
}


def complaint(name: str, kind: str, number: int, compiler: Executor, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is noticed of the mistake of this kind in the place of this number; IndexError if there is no such place.

    "" if nothing is: then it must not change a bit of the results.
    """
    (check, case), (pattern, replacement) = FULL[name], MISTAKES[kind]

    def change(ptx: str) -> str:
        place = list(re.finditer(pattern, ptx))[number]
        return ptx[: place.start()] + place.expand(replacement) + ptx[place.end() :]

    kernel = "nine_tap" if case.kernel == "nine_tap" else "forward"
    try:
        found = check(case, Launcher(compiler, case.sm, {kernel: change}), monkeypatch)
    except AssertionError as error:
        return str(error)
    expected = check(case, Launcher(compiler, case.sm), monkeypatch)
    assert all(torch.equal(got, want) for got, want in zip(found, expected, strict=True)), f"{kind} {number} is missed"
    return ""


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_noticed(name, kind, compiler, monkeypatch):
    message = complaint(name, kind, 5, compiler, monkeypatch)
    assert message
    assert kind != "barrier" or "race" in message


@pytest.mark.skipif(not EVERYTHING, reason="takes minutes; see the head of this file")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("kind", MISTAKES)
def test_every_mistake_is_noticed_or_harmless(name, kind, compiler, monkeypatch):
    harmless = []
    for number in itertools.count():
        try:
            message = complaint(name, kind, number, compiler, monkeypatch)
        except IndexError:
            break
        harmless += [] if message else [number]
    print(f"{name}: of {number} mistakes of the kind {kind!r}, {len(harmless)} are harmless: {harmless}")
    assert len(harmless) <= number / 10
