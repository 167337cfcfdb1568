"""The float32 product of two factors on a CPU: in tiles that stay in AVX-512's registers, elsewhere by numpy's BLAS.

Where both factors are bfloat16 numbers, as those of most LoRAs are, an instruction of the CPU's takes two of their
products at a time: ``VDPBF16PS`` (Intel, "Intel 64 and IA-32 Architectures Software Developer's Manual", volume 2C).
Their products are exact in float32, and it rounds each sum to nearest; it takes numbers below 2**-126 for zero. Other
factors are rounded to float32, and each sum of a product is rounded once. So the error of a value is bounded as that of
any inner product in float32 is, see `lora_fuse.fusion.cpu_adder.Stacked`.

A tile has 12 rows and 32 columns, which are 24 registers; 3 others hold 32 values of the one factor and one of the
other. BLAS would do as well on a CPU that it knows, but for bfloat16, and it does not know each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from lora_fuse.checkpoint import dtypes
from lora_fuse.quantisation import compiled

ROWS = 12
LANES = 16  # numbers of 32 bits in a register: a float32, or two bfloat16
COLUMNS = 2 * LANES
WORD = 4  # bytes
BFLOAT16 = dtypes.SIXTEEN_BIT["BF16"]
MODERATE = 2.0**60  # a factor between it and its inverse is a normal float32, and so is its product with one

Float32s: TypeAlias = npt.NDArray[np.float32]
Float64s: TypeAlias = npt.NDArray[np.float64]
Words: TypeAlias = npt.NDArray[np.uint32]
# Writes rows of the product, from a number on, to (n, columns), whose n is a multiple of `ROWS`; or only those that the
# product has, and something behind them.
Multiply: TypeAlias = Callable[[int, Float32s], None]

llvm.initialize_native_asmparser()

WORDS = ir.VectorType(ir.IntType(32), LANES)
FLOATS = ir.VectorType(ir.FloatType(), LANES)
PLACE = ir.IntType(64)


@cache
def features() -> frozenset[str]:
    """LLVM's names of what the CPU has that is compiled for, each with a sign."""
    with global_compiler_lock:
        _, _, names = cpu_target.target_context.codegen().magic_tuple()
    return frozenset(names.split(","))


def multiplier(a: Float64s, b: Float64s, factor: float) -> Multiply:
    """Choose the fastest way to ``factor * a @ b`` in float32, for finite (rows, rank) and (rank, columns)."""
    if "+avx512f" not in features() or b.shape[1] % COLUMNS or not len(b):
        return _by_blas(a, b, factor)
    is_moderate = 1 / MODERATE <= abs(factor) <= MODERATE
    if "+avx512bf16" in features() and is_moderate and _are_bfloat16(a) and _are_bfloat16(b):
        return _in_tiles(multiply_bfloat16, _pairs(a.T).T, _pairs(b), factor)
    return _in_tiles(multiply_float32, _words(factor * a), _words(b), 1.0)


def _by_blas(a: Float64s, b: Float64s, factor: float) -> Multiply:
    left = (factor * a).astype(np.float32)
    right = b.astype(np.float32)

    def multiply(first: int, out: Float32s) -> None:
        rows = left[first : first + len(out)]
        np.matmul(rows, right, out=out[: len(rows)])

    return multiply


def _in_tiles(function: Callable[..., None], a: Words, b: Words, factor: float) -> Multiply:
    """Multiply words of `a` (rows, steps) and `b` (steps, columns)."""
    steps = len(b)
    padded = np.concatenate([a, np.zeros((ROWS, steps), np.uint32)])  # for a last tile that it does not fill
    panels = np.ascontiguousarray(b.reshape(steps, -1, COLUMNS).transpose(1, 0, 2))
    return lambda first, out: function(padded, panels, np.float32(factor), first, out)


def _words(values: Float64s) -> Words:
    return values.astype(np.float32).view(np.uint32)


def _are_bfloat16(values: Float64s) -> bool:
    """True where no number has more digits than bfloat16 has; one that is too small for it counts as zero."""
    bits = np.bitwise_or.reduce(np.ascontiguousarray(values).view(np.uint64), axis=None)
    return bool(bits << np.uint64(64 - 53 + BFLOAT16.precision) == 0)


def _pairs(values: Float64s) -> Words:
    """Two rows in one, of words that have a bfloat16 of each; a last one gets zeros beside it."""
    words = _words(values)
    pairs: Words = words[::2] >> np.uint32(16)
    pairs[: len(words) // 2] |= words[1::2] & 0xFFFF0000
    return pairs


def _load(builder: Any, place: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(place, kind.as_pointer()), align=WORD)


def _broadcast(builder: Any, value: Any, kind: Any) -> Any:
    """A register that has a value in each lane."""
    nothing = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.IntType(32)(0))
    return builder.shuffle_vector(first, nothing, ir.Constant(WORDS, [0] * LANES))


def _add_float32(builder: Any, value: Any, column: Any, total: Any) -> Any:
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    insert: Any = cgutils.get_or_insert_function
    return builder.call(insert(builder.module, kind, f"llvm.fma.v{LANES}f32"), [value, column, total])


def _add_bfloat16(builder: Any, value: Any, column: Any, total: Any) -> Any:
    kind = ir.FunctionType(FLOATS, [WORDS, WORDS, FLOATS])
    instruction = ir.InlineAsm(kind, "vdpbf16ps $2, $1, $0", "=v,v,v,0", side_effect=False)
    return builder.call(instruction, [value, column, total])


def _sums(builder: Any, kind: Any, add: Callable[[Any, Any, Any, Any], Any], a: Any, b: Any, steps: Any) -> list[Any]:
    """The registers of a tile: a loop over the steps, which adds the products of words of `a` and `b` (addresses)."""
    entry = builder.block
    loop = builder.append_basic_block("step")
    end = builder.append_basic_block("end")
    row_bytes = builder.mul(steps, PLACE(WORD))
    rows = [builder.add(a, builder.mul(row_bytes, PLACE(row))) for row in range(ROWS)]
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(PLACE)
    before = [builder.phi(FLOATS) for _ in range(2 * ROWS)]
    panel = builder.add(b, builder.mul(step, PLACE(COLUMNS * WORD)))
    columns = [_load(builder, builder.add(panel, PLACE(half * LANES * WORD)), kind) for half in range(2)]
    after: list[Any] = []
    for row in rows:
        word = _load(builder, builder.add(row, builder.mul(step, PLACE(WORD))), kind.element)
        value = _broadcast(builder, word, kind)
        after += [add(builder, value, column, before[len(after) + half]) for half, column in enumerate(columns)]
    following = builder.add(step, PLACE(1))
    step.add_incoming(PLACE(0), entry)
    step.add_incoming(following, loop)
    for phi, total in zip(before, after, strict=True):
        phi.add_incoming(FLOATS(None), entry)  # zeros
        phi.add_incoming(total, loop)
    builder.cbranch(builder.icmp_unsigned("<", following, steps), loop, end)
    builder.position_at_end(end)
    return after


def _tile(kind: Any, add: Callable[[Any, Any, Any, Any], Any]) -> Any:
    """A function for compiled code that makes a tile, times a factor, of words of a kind of register.

    It takes the addresses of the first row of `a`, of a panel of `b` and of a place in the result, whose rows are
    `width` bytes apart.
    """

    @intrinsic
    def tile(_: Any, a: Any, b: Any, steps: Any, factor: Any, out: Any, width: Any) -> Any:  # noqa: ARG001 - types
        places = types.intp, types.intp, types.intp
        signature = types.void(*places, types.float32, types.intp, types.intp)

        def generate(context: Any, builder: Any, _: Any, given: Any) -> Any:
            a, b, steps, factor, out, width = given
            totals = _sums(builder, kind, add, a, b, steps)
            factors = _broadcast(builder, factor, FLOATS)
            for number, total in enumerate(totals):
                row, half = divmod(number, 2)
                place = builder.add(builder.add(out, builder.mul(width, PLACE(row))), PLACE(half * LANES * WORD))
                pointer = builder.inttoptr(place, FLOATS.as_pointer())
                builder.store(builder.fmul(total, factors), pointer, align=WORD)
            return context.get_dummy_value()

        return signature, generate

    return tile


tile_float32 = _tile(FLOATS, _add_float32)
tile_bfloat16 = _tile(WORDS, _add_bfloat16)


# Both: `a` (rows, steps), `b` (panels, steps, COLUMNS), and `out` as `Multiply` takes it.
@compiled()
def multiply_float32(a: Words, b: Words, factor: np.float32, first: int, out: Float32s) -> None:
    """Write ``factor * a @ b``, of words that are float32."""
    steps = a.shape[1]
    for row in range(0, out.shape[0], ROWS):
        for panel in range(b.shape[0]):
            of_a = a.ctypes.data + (first + row) * steps * WORD
            of_b = b.ctypes.data + panel * steps * COLUMNS * WORD
            to = out.ctypes.data + (row * out.shape[1] + panel * COLUMNS) * WORD
            tile_float32(of_a, of_b, steps, factor, to, out.shape[1] * WORD)


@compiled()
def multiply_bfloat16(a: Words, b: Words, factor: np.float32, first: int, out: Float32s) -> None:
    """Write ``factor * a @ b``, of words that are two bfloat16 each."""
    steps = a.shape[1]
    for row in range(0, out.shape[0], ROWS):
        for panel in range(b.shape[0]):
            of_a = a.ctypes.data + (first + row) * steps * WORD
            of_b = b.ctypes.data + panel * steps * COLUMNS * WORD
            to = out.ctypes.data + (row * out.shape[1] + panel * COLUMNS) * WORD
            tile_bfloat16(of_a, of_b, steps, factor, to, out.shape[1] * WORD)
