"""Laws of the sums that are handed on in float32: the exact sum, rounded once, whatever base and update are."""

import math
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from lora_fuse.checkpoint.dtypes import FLOAT32
from lora_fuse.checkpoint.shards import open_checkpoint
from lora_fuse.errors import BadCheckpoint
from lora_fuse.fusion import exact_sums
from lora_fuse.fusion.adder import ExactSums, read_deltas
from lora_fuse.fusion.plan import Plan, make_plan
from lora_fuse.lora.deltas import Decomposed, LowRank
from lora_fuse.lora.exact import nearest
from lora_fuse.lora.inputs import LoraInput
from tests.support import tiny
from tests.support.key_styles import ALGORITHMS, Tensors, convolutions, update_of

STORED = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
ROOTS = [name for name in ALGORITHMS if name.startswith("DoRA")]


def plan_with(folder: Path, base: Tensors, *loras: tuple[Tensors, float]) -> Plan:
    save_file(base, folder / "base.safetensors")
    inputs = []
    for number, (tensors, scale) in enumerate(loras):
        save_file(tensors, folder / f"{number}.safetensors")
        inputs.append(LoraInput(str(number), folder / f"{number}.safetensors", scale))
    return make_plan(open_checkpoint(folder / "base.safetensors"), inputs)


def planned(folder: Path, name: str, stored: npt.DTypeLike, *scales: float) -> tuple[Plan, str]:
    """A plan with an update of one kind, at each scale, and the parameter that it is of."""
    target, parts, _ = update_of(name)
    lora = {f"{target.rpartition('.')[0]}.{end}": np.asarray(part) for end, part in parts.items()}
    wide = {key: tensor.astype(np.float64) + 1e-9 for key, tensor in convolutions().items()}  # of no narrow dtype
    base = {key: tensor.astype(stored) for key, tensor in wide.items()}
    return plan_with(folder, base, *((lora, scale) for scale in scales)), target


def in_fractions(plan: Plan, name: str) -> npt.NDArray[np.float32]:
    """The oracle: every value of a target by itself, in fractions, rounded once."""
    target = plan.targets[name]
    data = np.fromfile(target.shard.path, np.uint8)[target.tensor.start : target.tensor.end]
    base = data.view(STORED[target.tensor.dtype]).astype(np.float64).reshape(target.tensor.shape[0], -1)
    deltas = read_deltas(target)
    made = np.empty(base.shape, np.float32)
    for row, column in np.ndindex(base.shape):
        total = sum((delta.exact(row, column) for delta in deltas), Fraction(float(base[row, column])))
        made[row, column] = nearest(total, FLOAT32)
    return made.reshape(target.tensor.shape)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", sorted(ALGORITHMS.keys() - set(ROOTS)))
def test_a_target_is_the_exact_sum_rounded_once(tmp_path: Path, name: str, stored: str) -> None:
    plan, target = planned(tmp_path, name, STORED[stored], 0.7, -0.3)
    made = exact_sums(plan).matrix(target)
    assert made.dtype == np.float32
    assert made.shape == plan.targets[target].tensor.shape
    np.testing.assert_array_equal(made, in_fractions(plan, target), strict=True)
    other = next(name for name in plan.checkpoint.tensors() if name not in plan.targets)
    data = np.fromfile(plan.checkpoint.root, np.uint8)
    place = plan.checkpoint.tensors()[other]
    if stored != "F64":
        widened = data[place.start : place.end].view(STORED[stored]).astype(np.float32)
        np.testing.assert_array_equal(exact_sums(plan).matrix(other).reshape(-1), widened)


def halved(values: list[float]) -> float:
    while len(values) > 1:
        half = len(values) // 2
        values = [a + b for a, b in zip(values[:half], values[half : 2 * half], strict=True)] + values[2 * half :]
    return values[0]


def in_order(plan: Plan, name: str) -> npt.NDArray[np.float32]:
    """The oracle for DoRA: one operation of Python's floats after another."""
    target = plan.targets[name]
    data = np.fromfile(target.shard.path, np.uint8)[target.tensor.start : target.tensor.end]
    weight = data.view(STORED[target.tensor.dtype]).astype(np.float64).reshape(target.tensor.shape[0], -1)
    total = weight.tolist()
    for delta in read_deltas(target):
        assert isinstance(delta, Decomposed)
        assert isinstance(delta.inner, LowRank)
        assert delta.inner.matrix.b is not None
        a, b = delta.inner.matrix.a.tolist(), delta.inner.matrix.b.tolist()
        moved = weight.tolist()
        for i, j in np.ndindex(weight.shape):
            product = a[i][0] * b[0][j]
            for k in range(1, len(b)):
                product += a[i][k] * b[k][j]
            moved[i][j] += product * delta.inner.factor
        if delta.by_column:
            groups = np.array(moved).reshape(len(moved), len(delta.magnitude), -1).transpose(1, 2, 0).tolist()
            lengths = [math.sqrt(halved([halved([x * x for x in one]) for one in group])) for group in groups]
        else:
            lengths = [math.sqrt(halved([x * x for x in row])) for row in moved]
        share = len(moved[0]) // len(delta.magnitude) if delta.by_column else 1
        for i, j in np.ndindex(weight.shape):
            group = j // share if delta.by_column else i
            new = moved[i][j] * (delta.magnitude[group] / lengths[group])
            total[i][j] += (new - weight[i, j]) * delta.scale
    return np.array(total).astype(np.float32).reshape(target.tensor.shape)


@pytest.mark.parametrize("stored", ["BF16", "F32"])
@pytest.mark.parametrize("name", ROOTS)
def test_a_sum_with_a_root_in_it_has_the_bits_of_one_order(tmp_path: Path, name: str, stored: str) -> None:
    plan, target = planned(tmp_path, name, STORED[stored], 0.7, -0.3)
    np.testing.assert_array_equal(exact_sums(plan).matrix(target), in_order(plan, target), strict=True)


X = "transformer_blocks.0.attn.to_q"
# By a weight, and the products that are added to it: beside a tie of float32, on it, and where float64 falls on the
# wrong side of it; the sum that is right, and the one that float64 gives where it is another.
TIES = [
    ((1.0, 2.0**-24), 1.0, None),
    ((1.0, 2.0**-24, 2.0**-60), 1 + 2.0**-23, 1.0),
    ((1.0, 2.0**-24, -(2.0**-90)), 1.0, None),
    ((1 + 2.0**-7, 2.0**-24), 1 + 2.0**-7, None),
    ((1 + 2.0**-7, 3 * 2.0**-24), 1 + 2.0**-7 + 2.0**-22, None),
    ((1 + 2.0**-7, 3 * 2.0**-24, -(2.0**-70)), 1 + 2.0**-7 + 2.0**-23, 1 + 2.0**-7 + 2.0**-22),
    ((2.0**-126, -(2.0**-126), 2.0**-150), 0.0, None),
    ((2.0**-126, -(2.0**-126), 3 * 2.0**-150), 2.0**-148, None),
    ((-1.0, -(2.0**-24), -(2.0**-60)), -1 - 2.0**-23, -1.0),
]


@pytest.mark.parametrize(("parts", "right", "by_float64"), TIES)
def test_a_tie_is_decided_by_what_lies_beyond_float64(
    tmp_path: Path, parts: tuple[float, ...], right: float, by_float64: float | None
) -> None:
    base = tiny.weights()
    base[f"{X}.weight"] = np.full((24, 16), parts[0], tiny.BF16)
    up = np.zeros((24, len(parts)), np.float32)
    up[:, 1:] = [np.ldexp(part, 20) for part in parts[1:]]
    down = np.full((len(parts), 16), 2.0**-20, np.float32)
    plan = plan_with(tmp_path, base, ({f"{X}.lora_up.weight": up, f"{X}.lora_down.weight": down}, 1.0))
    assert exact_sums(plan).matrix(f"{X}.weight").tolist() == np.full((24, 16), right).tolist()
    plain = np.float32(sum(parts))  # the bad input for this law: the sum that is rounded twice
    assert plain == (right if by_float64 is None else by_float64)


def test_many_threads_get_what_one_gets(tmp_path: Path) -> None:
    plan, _ = planned(tmp_path, "LoRA", tiny.BF16, 1.0)
    sums = exact_sums(plan)
    names = list(plan.checkpoint.tensors()) * 4
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(sums.matrix, names))
    for name, made in zip(names, together, strict=True):
        np.testing.assert_array_equal(made, ExactSums(plan).matrix(name))


def test_stored_values_are_widened_or_refused(tmp_path: Path) -> None:
    base = tiny.weights() | {
        "codes": np.arange(-100, 100, dtype=np.int8),
        "small": np.arange(200, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn),
        "flag": np.zeros((0,), tiny.BF16),
        "steps": np.array([3, 2**24], np.int64),
        "wide": np.array([1.0, 1 + 2.0**-30]),
        "many": np.array([2**24 + 1]),
    }
    lora = {f"{X}.lora_up.weight": np.ones((24, 2), np.float32), f"{X}.lora_down.weight": np.ones((2, 16), np.float32)}
    sums = exact_sums(plan_with(tmp_path, base, (lora, 1.0)))
    for name in ("codes", "small", "flag", "steps"):
        np.testing.assert_array_equal(sums.matrix(name), base[name].astype(np.float32), strict=True)
    for name in ("wide", "many"):
        with pytest.raises(BadCheckpoint, match=f"{name}.*float32 has not all of its values"):
            sums.matrix(name)
    with pytest.raises(KeyError):
        sums.matrix("nothing")


@pytest.mark.parametrize(("weight", "scale", "said"), [(np.nan, 1.0, "NaN"), (1.0, 3e38, "too large for")])
def test_a_target_that_is_not_finite_is_refused(tmp_path: Path, weight: float, scale: float, said: str) -> None:
    base = tiny.weights()
    base[f"{X}.weight"] = np.full((24, 16), weight, tiny.BF16)
    lora = {f"{X}.lora_up.weight": np.ones((24, 2), np.float32), f"{X}.lora_down.weight": np.ones((2, 16), np.float32)}
    with pytest.raises(BadCheckpoint, match=rf"base\.safetensors.*{X}\.weight.*{said}"):
        exact_sums(plan_with(tmp_path, base, (lora, scale))).matrix(f"{X}.weight")
