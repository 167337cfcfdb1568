"""Every kind of low-rank update with its formula, as plain numpy on small random matrices."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.support import tiny

Array = npt.NDArray[Any]
Tensors = dict[str, Array]
Example = tuple[str, Tensors, Callable[[Tensors, Array, float], Any]]  # a parameter, what the file holds, the formula

RNG = np.random.default_rng(5)


def random(*shape: int) -> Array:
    return (RNG.standard_normal(shape) / 4).astype(np.float32)


X = "transformer_blocks.0.attn.to_q"  # 24 x 16, with a bias
CONV = "conv_in"  # 6 x 4 x 3 x 3
POINT = "conv_out"  # 8 x 6 x 1 x 1


def convolutions() -> Tensors:
    return tiny.weights() | {
        f"{CONV}.weight": random(6, 4, 3, 3).astype(tiny.BF16),
        f"{CONV}.bias": random(6).astype(tiny.BF16),
        f"{POINT}.weight": random(8, 6, 1, 1).astype(tiny.BF16),
    }


def _lora() -> Example:
    t: Tensors = {"lora_down.weight": random(3, 16), "lora_up.weight": random(24, 3), "alpha": np.array(2, np.float32)}
    return f"{X}.weight", t, lambda t, w, s: w + s * 2 / 3 * t["lora_up.weight"] @ t["lora_down.weight"]


def _lora_conv() -> Example:
    t: Tensors = {
        "lora_down.weight": random(3, 4, 3, 3),
        "lora_up.weight": random(6, 3, 1, 1),
        "alpha": np.array(2, np.float32),
    }
    return (
        f"{CONV}.weight",
        t,
        lambda t, w, s: (
            w + s * 2 / 3 * np.einsum("or,rihw->oihw", t["lora_up.weight"][..., 0, 0], t["lora_down.weight"])
        ),
    )


def _lora_tucker() -> Example:
    t: Tensors = {
        "lora_down.weight": random(3, 4, 1, 1),
        "lora_mid.weight": random(3, 3, 3, 3),
        "lora_up.weight": random(6, 3, 1, 1),
    }
    return (
        f"{CONV}.weight",
        t,
        lambda t, w, s: (
            w
            + s
            * np.einsum(
                "pi,ijhw,jr->prhw",
                t["lora_up.weight"][..., 0, 0],
                t["lora_mid.weight"],
                t["lora_down.weight"][..., 0, 0],
            )
        ),
    )


def _point() -> Example:
    t: Tensors = {"lora_down.weight": random(2, 6), "lora_up.weight": random(8, 2)}
    return f"{POINT}.weight", t, lambda t, w, s: w + s * (t["lora_up.weight"] @ t["lora_down.weight"])[..., None, None]


def _loha() -> Example:
    t: Tensors = {
        "hada_w1_a": random(24, 3), "hada_w1_b": random(3, 16),
        "hada_w2_a": random(24, 3), "hada_w2_b": random(3, 16), "alpha": np.array(1.5, np.float32),
    }  # fmt: skip
    return (
        f"{X}.weight",
        t,
        lambda t, w, s: w + s * 0.5 * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]),
    )


def _loha_tucker() -> Example:
    t: Tensors = {
        "hada_w1_a": random(3, 6), "hada_w1_b": random(3, 4), "hada_t1": random(3, 3, 3, 3),
        "hada_w2_a": random(3, 6), "hada_w2_b": random(3, 4), "hada_t2": random(3, 3, 3, 3),
    }  # fmt: skip

    def side(t: Tensors, n: int) -> Any:
        return np.einsum("ijkl,jr,ip->prkl", t[f"hada_t{n}"], t[f"hada_w{n}_b"], t[f"hada_w{n}_a"])

    return f"{CONV}.weight", t, lambda t, w, s: w + s * side(t, 1) * side(t, 2)


def _lokr_full() -> Example:
    t: Tensors = {
        "lokr_w1": random(4, 2),
        "lokr_w2": random(6, 8),
        "alpha": np.array(64, np.float32),
    }  # alpha does not count here
    return f"{X}.weight", t, lambda t, w, s: w + s * np.kron(t["lokr_w1"], t["lokr_w2"])


def _lokr_factored() -> Example:
    t: Tensors = {
        "lokr_w1": random(4, 2),
        "lokr_w2_a": random(6, 3),
        "lokr_w2_b": random(3, 8),
        "alpha": np.array(2, np.float32),
    }
    return f"{X}.weight", t, lambda t, w, s: w + s * 2 / 3 * np.kron(t["lokr_w1"], t["lokr_w2_a"] @ t["lokr_w2_b"])


def _lokr_both() -> Example:
    t: Tensors = {
        "lokr_w1_a": random(4, 2),
        "lokr_w1_b": random(2, 2),
        "lokr_w2_a": random(6, 2),
        "lokr_w2_b": random(2, 8),
    }
    return (
        f"{X}.weight",
        t,
        lambda t, w, s: w + s * np.kron(t["lokr_w1_a"] @ t["lokr_w1_b"], t["lokr_w2_a"] @ t["lokr_w2_b"]),
    )


def _lokr_conv() -> Example:
    t: Tensors = {
        "lokr_w1": random(2, 2),
        "lokr_w2_a": random(3, 3),
        "lokr_w2_b": random(3, 2),
        "lokr_t2": random(3, 3, 3, 3),
    }

    def whole(t: Tensors) -> Any:
        w2 = np.einsum("ijkl,jr,ip->prkl", t["lokr_t2"], t["lokr_w2_b"], t["lokr_w2_a"])
        return np.einsum("ab,cdkl->acbdkl", t["lokr_w1"], w2).reshape(6, 4, 3, 3)

    return f"{CONV}.weight", t, lambda t, w, s: w + s * whole(t)


def _diff() -> Example:
    return f"{X}.weight", {"diff": random(24, 16)}, lambda t, w, s: w + s * t["diff"]


def _diff_b() -> Example:
    return f"{X}.bias", {"diff_b": random(24)}, lambda t, w, s: w + s * t["diff_b"]


def _lora_bias() -> Example:
    t: Tensors = {
        "lora_A.weight": random(4, 16),
        "lora_B.weight": random(24, 4),
        "lora_B.bias": random(24),
        "alpha": np.array(2, np.float32),
    }
    return f"{X}.bias", t, lambda t, w, s: w + s * 0.5 * t["lora_B.bias"]


def _dora_peft() -> Example:
    t: Tensors = {
        "lora_A.weight": random(4, 16), "lora_B.weight": random(24, 4),
        "lora_magnitude_vector.weight": np.abs(random(24)) + 1, "alpha": np.array(2, np.float32),
    }  # fmt: skip

    def formula(t: Tensors, w: Array, s: float) -> Any:
        moved = w + s * 0.5 * t["lora_B.weight"] @ t["lora_A.weight"]
        return t["lora_magnitude_vector.weight"][:, None] * moved / np.linalg.norm(moved, axis=1, keepdims=True)

    return f"{X}.weight", t, formula


def _dora_scale(axis: int) -> Example:
    t: Tensors = {
        "lora_down.weight": random(4, 16), "lora_up.weight": random(24, 4),
        "dora_scale": np.abs(random(24, 1) if axis == 1 else random(1, 16)) + 1, "alpha": np.array(2, np.float32),
    }  # fmt: skip

    def formula(t: Tensors, w: Array, s: float) -> Any:
        moved = w + 0.5 * t["lora_up.weight"] @ t["lora_down.weight"]
        return w + s * (t["dora_scale"] * moved / np.linalg.norm(moved, axis=axis, keepdims=True) - w)

    return f"{X}.weight", t, formula


def _dora_scale_conv() -> Example:
    t: Tensors = {
        "lora_down.weight": random(3, 4, 3, 3), "lora_up.weight": random(6, 3, 1, 1),
        "dora_scale": np.abs(random(1, 4, 1, 1)) + 1,
    }  # fmt: skip

    def formula(t: Tensors, w: Array, s: float) -> Any:
        moved = w + np.einsum("or,rihw->oihw", t["lora_up.weight"][..., 0, 0], t["lora_down.weight"])
        return w + s * (t["dora_scale"] * moved / np.sqrt((moved**2).sum((0, 2, 3), keepdims=True)) - w)

    return f"{CONV}.weight", t, formula


ALGORITHMS = {
    "LoRA": _lora, "LoRA, convolution": _lora_conv, "LoRA, Tucker": _lora_tucker, "LoRA, 1x1 as linear": _point,
    "LoHa": _loha, "LoHa, Tucker": _loha_tucker,
    "LoKr, whole": _lokr_full, "LoKr, one factored": _lokr_factored, "LoKr, both": _lokr_both, "LoKr, conv": _lokr_conv,
    "diff": _diff, "diff_b": _diff_b, "lora_B.bias": _lora_bias,
    "DoRA, PEFT": _dora_peft, "DoRA, by row": lambda: _dora_scale(1), "DoRA, by column": lambda: _dora_scale(0),
    "DoRA, by column, conv": _dora_scale_conv,
}  # fmt: skip
