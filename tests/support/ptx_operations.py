"""The PTX instructions that Triton emits: `build` makes of each a function that executes it for a group of blocks."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from ptx_memory import BITS, NO_GUARD, REGISTERS, Fault, Group

WARP = 32
U16, U32, U64, F32 = np.uint16, np.uint32, np.uint64, np.float32
KINDS: dict[str, Any] = {f"{kind}{8 * size}": bits for kind in "bu" for size, bits in BITS.items()}
KINDS |= {"s16": np.int16, "s32": np.int32, "s64": np.int64, "f32": F32, "f32x2": F32, "pred": np.bool_}
SAME_HERE = {"rn", "approx", "full", "ftz", "lo"}  # modifiers of arithmetic that make no difference

Run = Callable[[Group], "int | None"]  # executes an instruction; returns where to go on if that is not the next one
Value = Callable[[Group], Any]  # an element for each thread, or one for all


class Instruction(NamedTuple):
    """`@guard name.modifiers operands`; a braced list is one operand."""

    text: str
    guard: str
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]

    @property
    def unknown(self) -> Fault:
        return Fault(f"unknown instruction: {self.text}")


def build(one: Instruction, labels: Mapping[str, int], place: int, end: int) -> Run:
    """The instruction at `place` of a program that ends at `end`. Raises `Fault` for what it does not know."""
    if one.name == "bra":
        return _branch(one, labels[one.operands[0]], place, end)
    if one.name == "ret":
        return lambda group: (group.compare(), end)[1]
    if one.name in EFFECTS:
        return EFFECTS[one.name](one)
    if one.guard != NO_GUARD and one.name != "ld":
        raise one.unknown
    value = VALUES.get(one.name, _arithmetic)(one)
    writes = [_writer(register) for register in _parts(one.operands[0])]
    if len(writes) == 1:
        write = writes[0]
        return lambda group: write(group, value(group))

    def run(group: Group) -> None:
        for write, values in zip(writes, value(group), strict=True):
            write(group, values)

    return run


def _reader(operand: str, kind: Any) -> Value:
    """The operand as `kind`: a part of its register, all of it, or for pairs of float32 twice as many elements."""
    size = np.dtype(kind).itemsize
    if operand.startswith("%"):
        stored = REGISTERS.get(re.sub(r"\W|\d", "", operand), U32)
        if stored is kind:
            return lambda group: group.registers[operand]
        if size < np.dtype(stored).itemsize and kind is not F32:
            return lambda group: group.registers[operand].astype(BITS[size]).view(kind)
        return lambda group: group.registers[operand].view(kind)
    mask = (1 << 8 * size) - 1
    if found := re.match(r"\[.*_param_(\d+)", operand):
        return lambda group: BITS[size](group.machine.arguments[int(found[1])] & mask).view(kind)
    number = 0 if operand == "global_smem" else int(operand.replace("0f", "0x").rstrip("U"), 0)
    constant = np.bool_(number) if kind is np.bool_ else BITS[size](number & mask).view(kind)
    return lambda group: constant


def _writer(register: str) -> Callable[[Group, Any], None]:
    """Writes a register, or "_" that is none; what is smaller is extended, by its sign if it has one."""
    stored = REGISTERS.get(register.strip("%0123456789"), U64)
    size = np.dtype(stored).itemsize

    def write(group: Group, values: Any) -> None:
        if values.ndim == 0:
            values = np.full(len(group.threads), values)
        whole = values.nbytes == size * len(group.threads)
        group.registers[register] = np.ascontiguousarray(values).view(stored) if whole else values.astype(stored)

    return write


def _parts(operand: str) -> list[str]:
    """The registers of a braced list, or the operand itself."""
    return re.findall(r"[^\s,{}]+", operand)


def _guard(one: Instruction) -> Value:
    read = _reader(one.guard.lstrip("!"), np.bool_)
    return (lambda group: ~read(group)) if one.guard[0] == "!" else read


def _branch(one: Instruction, target: int, place: int, end: int) -> Run:
    guard = _guard(one)

    def run(group: Group) -> int | None:
        taken = guard(group)
        if taken.all():
            return target
        if not taken.any():
            return None
        blocks = taken.reshape(len(group.blocks), -1)
        if (blocks.any(1) != blocks.all(1)).any():
            raise Fault(f"threads of a block part: {one.text}")
        group.machine.waiting += [group.part(blocks[:, 0], target), group.part(~blocks[:, 0], place + 1)]
        return end

    return run


def _barrier(one: Instruction) -> Run:
    if one.modifiers != ("sync",) or one.operands != ("0",):
        raise one.unknown
    return lambda group: group.compare()


# values, element by element


def _arithmetic(one: Instruction) -> Value:
    *modifiers, suffix = one.modifiers
    function, sources = FUNCTIONS.get(one.name), one.operands[1:]
    if one.name == "setp" and modifiers:
        function = COMPARISONS.get(modifiers.pop() + ("f" if suffix == "f32" else ""))
    if function is None or suffix not in KINDS or set(modifiers) - SAME_HERE - {"wide"}:
        raise one.unknown
    kinds = [KINDS[suffix]] * len(sources)
    if one.name in ("shl", "shr", "bfe"):
        kinds[1:] = [U32] * (len(kinds) - 1)
    if one.name == "selp":
        kinds[2] = np.bool_
    if "wide" in modifiers:
        wide = KINDS[suffix[0] + str(2 * int(suffix[1:]))]
        kinds[2:] = [wide] * (len(kinds) - 2)
        narrow, function = function, lambda x, y, *z: narrow(x.astype(wide), y.astype(wide), *z)
    reads = [_reader(source, kind) for source, kind in zip(sources, kinds, strict=True)]
    return lambda group: function(*[read(group) for read in reads])


def _divide(x: Any, y: Any) -> Any:
    """Integers toward zero; where a GPU may give anything, by zero, something."""
    if x.dtype == F32:
        return x / y
    quotient = np.abs(x.astype(np.int64)) // np.maximum(np.abs(y.astype(np.int64)), 1)
    return (quotient * np.sign(x) * np.sign(y)).astype(x.dtype)


def _multiply_add(x: Any, y: Any, z: Any) -> Any:
    """Floats are rounded once, for float64 holds the product exactly."""
    return (x.astype(np.float64) * y + z).astype(F32) if x.dtype == F32 else x * y + z


def _shift(shift: Callable[..., Any], x: Any, count: Any) -> Any:
    """Beyond the last bit there are zeros, or the sign if a signed number is shifted right."""
    bits = 8 * x.dtype.itemsize
    shifted = shift(x, np.minimum(count, bits - 1).astype(x.dtype))
    sign = shift is np.right_shift and x.dtype.kind == "i"
    return shifted if sign else np.where(count < bits, shifted, x.dtype.type(0))


def _extract(x: Any, first: Any, count: Any) -> Any:
    """`count` bits from `first` on; the highest is a signed result's sign."""
    return (x << (U32(32) - first - count).astype(x.dtype)) >> (U32(32) - count).astype(x.dtype)


def _permute(x: Any, y: Any, selector: Any) -> Any:
    """The bytes of x and y, 0 to 7, that the selector's four digits name."""
    if int(selector) & ~0x7777:
        raise Fault(f"prmt of other than four bytes: {int(selector):#x}")
    both = x.astype(U64) | y.astype(U64) << U64(32)
    bytes_ = (both >> U64(8 * (int(selector) >> 4 * i & 7)) & U64(255) for i in range(4))
    return sum(byte << U64(8 * i) for i, byte in enumerate(bytes_)).astype(U32)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _divide, "rem": lambda x, y: x - _divide(x, y) * y,
    "fma": _multiply_add, "mad": _multiply_add, "neg": np.negative, "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt,
    # the number if the other is NaN; the greater of two zeros is 0, not -0
    "min": lambda *x: functools.reduce(np.fmin, x), "max": lambda *x: functools.reduce(np.fmax, x) + x[0].dtype.type(0),
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "shl": functools.partial(_shift, np.left_shift), "shr": functools.partial(_shift, np.right_shift),
    "bfe": _extract, "prmt": _permute, "selp": lambda x, y, chosen: np.where(chosen, x, y),
}  # fmt: skip
# with NaN, all of floats are false but neu
COMPARISONS = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal}
COMPARISONS |= {f"{name}f": compare for name, compare in COMPARISONS.items()}
COMPARISONS |= {"ne": np.not_equal, "neuf": np.not_equal}


def _move(one: Instruction) -> Value:
    """Also of a register into its two halves, and back."""
    (target, source), kind = one.operands, KINDS[one.modifiers[-1]]
    if "{" not in target + source:
        return _reader(source, kind)
    half = BITS[np.dtype(kind).itemsize // 2]
    if "{" in source:
        low, high = (_reader(part, half) for part in _parts(source))
        return lambda group: _pair(low(group), high(group)).view(kind)
    whole = _reader(source, kind)
    return lambda group: whole(group).view(half).reshape(-1, 2).T


def _pair(low: Any, high: Any) -> Any:
    return np.stack([low, high], 1).ravel()


def _to_bfloat16(x: Any) -> Any:
    """To the nearest, of two the even."""
    bits = x.view(U32)
    rounded = (bits + U32(0x7FFF) + (bits >> U32(16) & U32(1))) >> U32(16)
    return np.where(np.isnan(x), U32(0x7FC0), rounded).astype(U16)


CONVERSIONS: dict[str, tuple[Any, Callable[[Any], Any]]] = {  # the kind of the source, and what is made of it
    "rn.f16.f32": (F32, lambda x: x.astype(np.float16).view(U16)),
    "rn.bf16.f32": (F32, _to_bfloat16),
    "f32.f16": (np.float16, lambda x: x.astype(F32)),
    "f32.bf16": (U16, lambda x: x.astype(U32) << U32(16)),
    "rn.f32.s32": (np.int32, lambda x: x.astype(F32)),
}


def _convert(one: Instruction) -> Value:
    name = ".".join(one.modifiers)
    if re.fullmatch(r"[us]\d\d\.[us]\d\d", name):
        kind, convert = KINDS[one.modifiers[1]], lambda x: x.astype(KINDS[one.modifiers[0]])
    elif name.replace("x2", "") in CONVERSIONS:
        kind, convert = CONVERSIONS[name.replace("x2", "")]
    else:
        raise one.unknown
    reads = [_reader(source, kind) for source in one.operands[1:]]
    if "x2" in name:  # the first source is the upper half
        return lambda group: _pair(convert(reads[1](group)), convert(reads[0](group)))
    return lambda group: convert(reads[0](group))


# values from other threads of the warp


def _shuffle(one: Instruction) -> Value:
    if one.modifiers != ("sync", "bfly", "b32"):
        raise one.unknown
    read, partner = _reader(one.operands[1], U32), np.arange(WARP) ^ int(one.operands[2])
    return lambda group: read(group).reshape(-1, WARP)[:, partner].ravel()


FACTORS: dict[tuple[str, str], Callable[[Any], Any]] = {  # the numbers that registers of `mma` hold
    ("m16n8k16", "f16"): lambda x: x.view(np.float16).astype(F32),
    ("m16n8k16", "bf16"): lambda x: (x.view(U16).astype(U32) << U32(16)).view(F32),
    ("m16n8k8", "tf32"): lambda x: (x & U32(0xFFFFE000)).view(F32),
}


def _product(one: Instruction) -> Value:
    """`mma`: a warp's product of 16 x K and K x 8 with float32 sums.

    All are made of matrices of 8 rows, of which the warp's threads have 4 a row: a thread has one or two elements.
    """
    numbers = FACTORS.get((one.modifiers[2], one.modifiers[-2]))
    if numbers is None or one.modifiers[3:5] != ("row", "col"):
        raise one.unknown
    a, b = ([_reader(register, U32) for register in _parts(operand)] for operand in one.operands[1:3])
    c = [_reader(register, F32) for register in _parts(one.operands[3])]

    def value(group: Group) -> list[Any]:
        warps = len(group.threads) // WARP
        a0, a1, a2, a3, b0, b1 = (numbers(read(group)).reshape(warps, 8, -1) for read in (*a, *b))
        rows = np.concatenate([np.concatenate([a0, a2], 2), np.concatenate([a1, a3], 2)], 1)
        product = (rows @ np.concatenate([b0, b1], 2).transpose(0, 2, 1)).reshape(warps, 2, 8, 4, 2)
        parts = [product[:, half, :, :, side].ravel() for half in (0, 1) for side in (0, 1)]
        return [part + read(group) for part, read in zip(parts, c, strict=True)]

    return value


# memory


def _address(operand: str) -> Value:
    found = re.fullmatch(r"\[ ?(%r|%rd|global_smem)(\d*) ?(?:\+ ?(-?\w+))? ?\]", operand)
    if not found:
        raise Fault(f"unknown address: {operand}")
    kind = U64 if found[1] == "%rd" else U32
    base, offset = _reader(found[1] + found[2], kind), _reader(found[3] or "0", kind)
    return lambda group: np.broadcast_to(base(group) + offset(group), len(group.threads))


def _shape(one: Instruction) -> tuple[str, Any, int]:
    """Space, kind and number of the elements of an `ld` or `st`."""
    space, *vector, suffix = one.modifiers
    if space not in ("shared", "global") or suffix not in KINDS or vector not in ([], ["v2"], ["v4"]):
        raise one.unknown
    return space, KINDS[suffix], int(vector[0][1:]) if vector else 1


def _load(one: Instruction) -> Value:
    if one.modifiers[0] == "param":
        return _reader(one.operands[1], KINDS[one.modifiers[1]])
    space, kind, count = _shape(one)
    old = [_reader(target, kind) for target in _parts(one.operands[0])]
    item, address, guard = np.dtype(kind).itemsize, _address(one.operands[1]), _guard(one)

    def value(group: Group) -> Any:
        loaded, numbers = group.load(space, address(group), item, count, guard(group), one.text)
        loaded = np.ascontiguousarray(loaded.T).view(kind)
        if len(numbers) < len(group.threads):
            whole = np.stack([read(group) for read in old])
            whole[:, numbers] = loaded
            loaded = whole
        return loaded if count > 1 else loaded[0]

    return value


def _store(one: Instruction) -> Run:
    space, kind, _ = _shape(one)
    address, guard, bits = _address(one.operands[0]), _guard(one), BITS[np.dtype(kind).itemsize]
    reads = [_reader(source, bits) for source in _parts(one.operands[1])]

    def run(group: Group) -> None:
        values = np.stack([np.broadcast_to(read(group), len(group.threads)) for read in reads], 1)
        group.store(space, address(group), values, guard(group), one.text)

    return run


def _matrices(one: Instruction, registers: str) -> tuple[int, Value]:
    """How many matrices of 8 x 8 halves are moved, and the threads that have the addresses of their rows."""
    count = len(_parts(registers))
    modifiers = ["sync", "aligned", "m8n8", f"x{count}", "shared", "b16"]
    if [modifier for modifier in one.modifiers if modifier != "trans"] != modifiers:
        raise one.unknown
    return count, lambda group: group.threads % WARP < 8 * count


def _transposed(matrices: Any) -> Any:
    return np.ascontiguousarray(np.ascontiguousarray(matrices).view(U16).swapaxes(-1, -2)).view(U32)


def _load_matrices(one: Instruction) -> Value:
    (count, chosen), address = _matrices(one, one.operands[0]), _address(one.operands[1])

    def value(group: Group) -> Any:
        words, numbers = group.load("shared", address(group), 4, 4, chosen(group), one.text)
        rows = np.zeros((len(group.threads), 4), U32)
        rows[numbers] = words
        matrices = rows.reshape(-1, 4, 8, 4).swapaxes(0, 1)[:count]
        matrices = (_transposed(matrices) if "trans" in one.modifiers else matrices).reshape(count, -1)
        return matrices if count > 1 else matrices[0]

    return value


def _store_matrices(one: Instruction) -> Run:
    (count, chosen), address = _matrices(one, one.operands[1]), _address(one.operands[0])
    reads = [_reader(source, U32) for source in _parts(one.operands[1])]

    def run(group: Group) -> None:
        rows = np.zeros((4, len(group.threads) // WARP, 8, 4), U32)
        rows[:count] = np.stack([read(group) for read in reads]).reshape(count, -1, 8, 4)
        rows = (_transposed(rows) if "trans" in one.modifiers else rows).swapaxes(0, 1).reshape(-1, 4)
        group.store("shared", address(group), rows, chosen(group), one.text)

    return run


def _copy(one: Instruction) -> Run:
    """`cp.async`, what ends a group of copies, and what waits for all but so many groups."""
    if one.modifiers == ("async", "commit_group"):
        return lambda group: group.copies.append([])
    if one.modifiers == ("async", "wait_group"):
        return lambda group: group.wait(int(one.operands[0]))
    if one.modifiers not in (("async", kind, "shared", "global") for kind in ("ca", "cg")):
        raise one.unknown
    target, source, guard = _address(one.operands[0]), _address(one.operands[1]), _guard(one)
    size, taken = int(one.operands[2], 0), _reader(one.operands[-1], U32)

    def run(group: Group) -> None:
        chosen, count = guard(group), np.broadcast_to(taken(group), len(group.threads))
        if not np.isin(count, (0, size)).all():
            raise Fault(f"part of a copy: {one.text}")
        values = np.zeros((len(group.threads), size // 4), U32)
        loaded, numbers = group.load("global", source(group), 4, size // 4, chosen & (count > 0), one.text)
        values[numbers] = loaded
        group.copy(target(group), values, chosen, one.text)

    return run


VALUES: dict[str, Callable[[Instruction], Value]] = {
    "mov": _move, "cvt": _convert, "shfl": _shuffle, "mma": _product, "ld": _load, "ldmatrix": _load_matrices,
}  # fmt: skip
EFFECTS: dict[str, Callable[[Instruction], Run]] = {
    "bar": _barrier, "st": _store, "stmatrix": _store_matrices, "cp": _copy,
}  # fmt: skip
