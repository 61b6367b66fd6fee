"""The PTX instructions that the kernels contain. `find` gives what executes one, and raises `Fault` for every other."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from ptx_machine import Group

WARP = 32
NO_GUARD = "%p"  # a register that is always true
BITS = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}
U16, U32, F16, F32 = BITS[2], BITS[4], np.dtype(np.float16), np.dtype(np.float32)
KINDS: dict[str, np.dtype[Any]] = {f"{kind}{8 * size}": bits for kind in "bu" for size, bits in BITS.items()}
KINDS |= {f"s{8 * size}": np.dtype(f"i{size}") for size in BITS}
KINDS |= {"f16": F16, "bf16": U16, "f32": F32, "f32x2": F32, "pred": np.dtype(bool)}


class Fault(AssertionError):
    """What cannot be executed: an unknown instruction, a wild address, or threads of a block that part."""


class Instruction(NamedTuple):
    """`@guard opcode operands`; a braced list is one operand."""

    text: str
    guard: str
    opcode: str
    operands: tuple[str, ...]


Handler = Callable[["Group", Instruction], "int | None"]  # returns where to go on if that is not the next instruction


@functools.cache
def find(opcode: str, guarded: bool) -> Handler:
    """What executes it. Raises `Fault` for what is unknown."""
    handler = next((run for pattern, run in HANDLERS.items() if re.fullmatch(pattern, opcode)), None)
    name, _, suffix = re.sub(r"\.(rn|approx|full|ftz|lo)\b", "", opcode).rpartition(".")
    function = FUNCTIONS.get(f"{name}.{suffix}", FUNCTIONS.get(name))
    if handler is None and function and suffix in KINDS:
        handler = functools.partial(_compute, function, KINDS[suffix])
    if handler is None or (guarded and handler not in GUARDED):
        raise Fault(f"unknown instruction: {opcode}{' with a guard' if guarded else ''}")
    return handler


@functools.cache
def parts(operand: str) -> list[str]:
    """Registers and constants of a braced list, of a sum in brackets, or the operand itself."""
    return re.findall(r"[^\s,{}\[\]+]+", operand)


@functools.cache
def constant(text: str, kind: np.dtype[Any]) -> Any:
    """A number, whose float32 PTX writes as 0f and its bits; shared memory begins at 0."""
    number = 0 if text == "global_smem" else int(text.replace("0f", "0x").rstrip("U"), 0)
    bits = BITS[kind.itemsize]
    return bits.type(number & (1 << 8 * bits.itemsize) - 1).view(kind)


def _compute(function: Callable[..., Any], kind: np.dtype[Any], group: Group, one: Instruction) -> None:
    """Element by element; roundings and approximations are numpy's."""
    group.write(one.operands[0], function(*[group.read(operand, kind) for operand in one.operands[1:]]))


def _divide(x: Any, y: Any) -> Any:
    """Toward zero; by zero, where a GPU may give anything, something."""
    quotient = np.abs(x.astype(np.int64)) // np.maximum(np.abs(y.astype(np.int64)), 1)
    return (quotient * np.sign(x) * np.sign(y)).astype(x.dtype)


def _multiply_wide(x: Any, y: Any, *z: Any) -> Any:
    wide = np.dtype(f"{x.dtype.kind}{2 * x.itemsize}")
    return x.astype(wide) * y.astype(wide) + sum(part.astype(wide) for part in z)


def _to_bfloat16(x: Any) -> Any:
    """To the nearest, of two the even."""
    bits = x.view(U32)
    rounded = (bits + U32.type(0x7FFF) + (bits >> U32.type(16) & U32.type(1))) >> U32.type(16)
    return np.where(np.isnan(x), U32.type(0x7FC0), rounded).astype(U16)


def _from_bfloat16(x: Any) -> Any:
    return (x.astype(U32) << U32.type(16)).view(F32)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "mov": lambda x: x, "ld.param": lambda x: x, "selp": lambda x, y, chosen: np.where(chosen, x, y),
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "mad": lambda x, y, z: x * y + z, "neg": np.negative,
    "mul.wide": _multiply_wide, "mad.wide": _multiply_wide, "ex2": np.exp2, "sqrt": np.sqrt,
    "div": _divide, "rem": lambda x, y: x - _divide(x, y) * y, "div.f32": np.divide,
    "fma": lambda x, y, z: (x.astype(np.float64) * y + z).astype(F32),  # float64 holds the product exactly
    # the number if the other is NaN; the greater of two zeros is 0, not -0
    "min": np.fmin, "max": lambda *x: functools.reduce(np.fmax, x) + x[0].dtype.type(0),
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "shl": np.left_shift, "shr": np.right_shift,  # beyond the last bit there are zeros, or signs
    "bfe": lambda x, first, count: (x << (32 - first - count)) >> (32 - count),
    # with NaN, all are false
    "setp.lt": np.less, "setp.le": np.less_equal, "setp.gt": np.greater, "setp.ge": np.greater_equal,
    "setp.eq": np.equal, "setp.ne": lambda x, y: (x < y) | (x > y),
    **{f"cvt.{kind}": lambda x, to=KINDS[kind]: x.astype(to) for kind in ("u16", "u32", "u64", "s64", "f16", "f32")},
    "cvt.bf16": _to_bfloat16, "cvt.f32.bf16": _from_bfloat16,
    "cvt.f16x2": lambda high, low: np.stack([low, high], 1).astype(F16),
    "cvt.bf16x2": lambda high, low: _to_bfloat16(np.stack([low, high], 1)),
}  # fmt: skip


def _branch(group: Group, one: Instruction) -> int | None:
    """Blocks that part go on one after the other."""
    (target,), machine = one.operands, group.machine
    taken = group.chosen(one).reshape(len(group.blocks), -1)
    if (taken.any(1) != taken.all(1)).any():
        raise Fault(f"threads of a block part: {one.text}")
    if taken.all():
        return machine.labels[target]
    if not taken.any():
        return None
    machine.waiting += [group.part(taken[:, 0], machine.labels[target]), group.part(~taken[:, 0], group.place + 1)]
    return len(machine.program)


def _shuffle(group: Group, one: Instruction) -> None:
    """The value of another thread of the warp."""
    target, source, lanes, *_ = one.operands
    group.write(target, group.read(source, U32).reshape(-1, WARP)[:, np.arange(WARP) ^ int(lanes)].ravel())


PRODUCTS: dict[str, Callable[[Any], Any]] = {  # the numbers that registers of the factors hold
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": lambda x: x.view(F16).astype(F32),
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": lambda x: _from_bfloat16(x.view(U16)),
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32": lambda x: (x & U32.type(0xFFFFE000)).view(F32),
}


def _product(group: Group, one: Instruction) -> None:
    """A warp's product of 16 x K and K x 8 with float32 sums.

    All are made of matrices of 8 rows, of which the warp's threads have 4 a row: a thread has one or two elements.
    """
    target, a, b, c = one.operands
    factors = [PRODUCTS[one.opcode](group.read(part, U32)) for part in (*parts(a), *parts(b))]
    a0, a1, a2, a3, b0, b1 = (factor.reshape(len(group.threads) // WARP, 8, -1) for factor in factors)
    rows = np.concatenate([np.concatenate([a0, a2], 2), np.concatenate([a1, a3], 2)], 1)
    product = (rows @ np.concatenate([b0, b1], 2).transpose(0, 2, 1)).reshape(-1, 2, 8, 4, 2)
    group.write(target, product.transpose(0, 2, 3, 1, 4).reshape(-1, 4) + group.read(c, F32))


def _load(group: Group, one: Instruction) -> None:
    (target, source), kind = one.operands, KINDS[one.opcode.rpartition(".")[2]]
    values = np.array(group.read(target, kind)).reshape(len(group.threads), -1)
    access = group.access(one, source, kind.itemsize * values.shape[1])
    values[access.places] = access.read().view(kind)
    group.write(target, values)


def _store(group: Group, one: Instruction) -> None:
    (target, source), kind = one.operands, KINDS[one.opcode.rpartition(".")[2]]
    values = group.read(source, kind).reshape(len(group.threads), -1).astype(kind)
    group.access(one, target, kind.itemsize * values.shape[1]).write(values)


def _load_matrices(group: Group, one: Instruction) -> None:
    """Of 8 x 8 halves, the addresses of whose rows the warp's first threads have."""
    target, source = one.operands
    count, rows = len(parts(target)), np.zeros((len(group.threads), 4), U32)
    access = group.access(one, source, 16, group.threads % WARP < 8 * count)
    rows[access.places] = access.read().view(U32)
    matrices = rows.reshape(-1, 4, 8, 4)[:, :count]
    if ".trans" in one.opcode:
        halves = np.ascontiguousarray(matrices).view(U16)
        matrices = np.ascontiguousarray(halves.swapaxes(2, 3)).view(U32)
    group.write(target, matrices.transpose(0, 2, 3, 1).reshape(-1, count))


def _store_matrices(group: Group, one: Instruction) -> None:
    target, source = one.operands
    matrices = group.read(source, U32).reshape(-1, 8, 4, 4).transpose(0, 3, 1, 2)
    group.access(one, target, 16).write(matrices.reshape(-1, 4))


def _copy(group: Group, one: Instruction) -> None:
    """From global to shared memory: `size` bytes, or zeros where the last of four operands is 0."""
    target, source, size, *taken = one.operands
    count = np.broadcast_to(group.read(taken[0] if taken else size, U32), len(group.threads))
    if not np.isin(count, (0, int(size, 0))).all():
        raise Fault(f"part of a copy: {one.text}")
    values = np.zeros((len(count), int(size, 0) // 4), U32)
    access = group.access(one, source, int(size, 0), group.chosen(one) & (count > 0))
    values[access.places] = access.read().view(U32)
    group.access(one, target, int(size, 0)).copy(values, group.copies)


HANDLERS: dict[str, Handler] = {
    r"bra(\.uni)?": _branch,
    r"ret": lambda group, _: len(group.machine.program),
    r"bar\.sync": lambda group, one: group.barrier(*one.operands),
    r"shfl\.sync\.bfly\.b32": _shuffle,
    **{re.escape(opcode): _product for opcode in PRODUCTS},
    r"ld\.(shared|global)(\.v[24])?\.[bs]\d+": _load,
    r"st\.(shared|global)(\.v[24])?\.b\d+": _store,
    r"ldmatrix\.sync\.aligned\.m8n8\.x[14](\.trans)?\.shared\.b16": _load_matrices,
    r"stmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16": _store_matrices,
    r"cp\.async\.c[ag]\.shared\.global": _copy,
    r"cp\.async\.commit_group": lambda group, _: group.commit(),
    r"cp\.async\.wait_group": lambda group, one: group.wait(int(one.operands[0])),
}
GUARDED = (_branch, _load, _store, _copy)
