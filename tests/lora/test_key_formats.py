"""Laws of formats and algorithms: every way to write an update gives the same bytes, by the formula of its source."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from safetensors import safe_open

from lora_fuse.checkpoint.shards import open_checkpoint
from lora_fuse.errors import BadLora, ShapeMismatch
from lora_fuse.fusion.merge import write_merged
from lora_fuse.fusion.plan import make_plan
from lora_fuse.lora.key_formats import FLAT_PREFIXES, FORMATS, PREFIXES
from lora_fuse.lora.lora_file import open_lora
from lora_fuse.lora.updates import LoraInput
from lora_fuse.verification.rederivation import Expectation, verify_merge
from tests import tiny

Array = npt.NDArray[Any]
Tensors = dict[str, Array]
Example = tuple[str, Tensors, Callable[[Tensors, Array, float], Any]]  # a parameter, what the file holds, the formula
RNG = np.random.default_rng(5)

# The key styles that FORMATS and PREFIXES make, as people meet them: down, up, and the alpha's module.
STYLES = {
    "lightning": ("{}.lora_down.weight", "{}.lora_up.weight"),
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
    "bare": ("{}.lora_A.weight", "{}.lora_B.weight"),
    "diffsynth": ("{}.lora_A.default.weight", "{}.lora_B.default.weight"),
    "diffsynth, transformer": ("transformer.{}.lora_A.default.weight", "transformer.{}.lora_B.default.weight"),
    "named adapter": ("transformer.{}.lora_A.adapter_0.weight", "transformer.{}.lora_B.adapter_0.weight"),
    "ai-toolkit": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight"),
    "comfyui": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight"),
    "model.diffusion_model": ("model.diffusion_model.{}.lora_A.weight", "model.diffusion_model.{}.lora_B.weight"),
    "transformer, down": ("transformer.{}.lora_down.weight", "transformer.{}.lora_up.weight"),
    "kohya": ("lora_unet_{_}.lora_down.weight", "lora_unet_{_}.lora_up.weight"),
    "onetrainer": ("lora_transformer_{_}.lora_down.weight", "lora_transformer_{_}.lora_up.weight"),
    "lycoris": ("lycoris_{_}.lora_down.weight", "lycoris_{_}.lora_up.weight"),
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    "peft, transformer": (
        "base_model.model.transformer.{}.lora_A.weight",
        "base_model.model.transformer.{}.lora_B.weight",
    ),
    "old diffusers": ("transformer.{}.lora.down.weight", "transformer.{}.lora.up.weight"),
    "linear layer": ("transformer.{}.lora_linear_layer.down.weight", "transformer.{}.lora_linear_layer.up.weight"),
    "without .weight": ("{}.lora_A", "{}.lora_B"),
}


def restyled(style: str, alpha: float | None) -> Tensors:
    """The tiny LoRA of `tiny.lora_tensors` under other keys."""
    made: Tensors = {}
    for key, tensor in tiny.lora_tensors(alpha=alpha).items():
        module, _, end = key.partition(".lora_") if ".lora_" in key else key.rpartition(".")
        down, up = STYLES[style]
        template = {"down.weight": down, "up.weight": up}.get(end, down.split(".lora")[0] + ".alpha")
        made[template.replace("{_}", module.replace(".", "_")).replace("{}", module)] = tensor
    return made


def merged(folder: Path, tensors: Tensors, scale: float = 1.0, base: Tensors | None = None, **how: str) -> Tensors:
    """Fuse a file into the tiny base, verify every row, and give the weights."""
    root = tiny.write_component(folder / "base", base or tiny.weights())
    lora = LoraInput("l", tiny.write_lora(folder / "l.safetensors", tensors, how or None), scale)
    out = folder / "out"
    write_merged(
        make_plan(open_checkpoint(root), [lora]), out, device="cpu", generated={}, known={}, progress=lambda _: None
    )
    found = verify_merge(out, root, [lora], component="", rows=None, expected=Expectation())
    assert found.problems == []
    wrong = verify_merge(
        out, root, [LoraInput("l", lora.path, scale + 0.5)], component="", rows=None, expected=Expectation()
    )
    assert not wrong.passed
    made: Tensors = {}
    for file in sorted(out.glob("*.safetensors")):
        with safe_open(file, framework="np") as handle:
            made |= {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    return made


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(one[key].tobytes() == other[key].tobytes() for key in one)


def test_the_styles_cover_every_format_and_prefix() -> None:
    loras = {row.name for row in FORMATS if row.algorithm == "LoRA"}
    assert loras == {format_of(style) for style in STYLES}
    starts = {down.partition("{")[0] for down, _ in STYLES.values()}
    assert starts == {*PREFIXES, *FLAT_PREFIXES}


def format_of(style: str) -> str:
    from lora_fuse.lora.key_formats import read_key

    read = read_key(STYLES[style][0].replace("{_}", "x").replace("{}", "x"))
    assert read is not None
    assert read[1] is not None
    return read[1].name


@pytest.mark.parametrize("alpha", [None, 2.0], ids=["no alpha", "alpha"])
@pytest.mark.parametrize("style", STYLES)
def test_every_key_style_merges_to_the_same_bytes(tmp_path: Path, style: str, alpha: float | None) -> None:
    ours = merged(tmp_path / "a", restyled(style, alpha))
    assert same(ours, merged(tmp_path / "b", tiny.lora_tensors(alpha=alpha)))
    assert not same(ours, tiny.weights())


def test_a_flattened_name_that_two_modules_share_is_refused(tmp_path: Path) -> None:
    base = tiny.weights() | {"transformer_blocks.0.attn_to.q.weight": np.zeros((24, 16), tiny.BF16)}
    with pytest.raises(
        BadLora, match=r"could mean 'transformer_blocks\.0\.attn\.to_q' or 'transformer_blocks\.0\.attn_to\.q'"
    ):
        merged(tmp_path, restyled("kohya", None), base=base)


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    both = restyled("named adapter", None) | restyled("diffsynth, transformer", None)
    with pytest.raises(BadLora, match="one adapter only"):
        merged(tmp_path, both)


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


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16], ids=["F32", "BF16", "F16"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_is_its_formula(tmp_path: Path, name: str, dtype: type, scale: float) -> None:
    target, parts, formula = ALGORITHMS[name]()
    base: Tensors = {key: tensor.astype(dtype) for key, tensor in convolutions().items()}
    module = target.rpartition(".")[0]
    ours = merged(tmp_path, {f"{module}.{end}": np.asarray(part) for end, part in parts.items()}, scale, base)
    wide = {end: np.asarray(part).astype(np.float64) for end, part in parts.items()}
    expected = formula(wide, base[target].astype(np.float64), scale)
    unit = float(ml_dtypes.finfo(dtype).eps) / 2
    np.testing.assert_allclose(ours[target].astype(np.float64), expected, rtol=unit * 1.001, atol=1e-7)
    changed = {key for key in base if ours[key].tobytes() != base[key].tobytes()}
    assert changed == ({target} if name != "lora_B.bias" else {f"{X}.weight", target})


@pytest.mark.parametrize("extra", [{}, {"use_rslora": True}, {"alpha_pattern": {"attn.to_q": 12}}])
def test_a_peft_configuration_scales_as_peft_does(tmp_path: Path, extra: dict[str, object]) -> None:
    folder = tmp_path / "peft"
    tiny.write_lora(folder / "adapter_model.safetensors", tiny.lora_tensors("peft", alpha=None))
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 6, **extra}))
    factors = {
        u.module.removeprefix("base_model.model.transformer_blocks.0."): u.factor for u in open_lora(folder).updates
    }
    usual = 6 / 2 if extra.get("use_rslora") else 6 / 4
    assert factors["img_mlp.net.0.proj"] == usual
    assert factors["attn.to_q"] == (3.0 if "alpha_pattern" in extra else usual)


def test_a_rank_that_the_configuration_denies_is_refused(tmp_path: Path) -> None:
    tiny.write_lora(tmp_path / "adapter_model.safetensors", tiny.lora_tensors("peft", alpha=None))
    config: dict[str, object] = {"r": 8, "lora_alpha": 6}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ShapeMismatch, match=r"have rank 4, and .* says 8"):
        open_lora(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {"attn.to_q|to_out.0|proj": 4}}))
    assert {update.rank for update in open_lora(tmp_path).updates} == {4}


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"[" * 100_000, b"7", b'{"r": "x"}'], ids=["binary", "deep", "7", "text"]
)
def test_a_broken_peft_configuration_is_refused(tmp_path: Path, content: bytes) -> None:
    tiny.write_lora(tmp_path / "adapter_model.safetensors", tiny.lora_tensors("peft", alpha=None))
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(BadLora, match=r"adapter_config\.json (is not a PEFT configuration|cannot be read): "):
        open_lora(tmp_path)


def test_an_alpha_in_the_file_is_not_multiplied_by_the_headers(tmp_path: Path) -> None:
    plain = merged(tmp_path / "a", tiny.lora_tensors(alpha=2.0))
    header = json.dumps({"transformer.lora_alpha": 12, "transformer.r": 4})
    assert same(plain, merged(tmp_path / "b", tiny.lora_tensors(alpha=2.0), lora_adapter_metadata=header))
    assert not same(plain, merged(tmp_path / "c", tiny.lora_tensors(alpha=None), lora_adapter_metadata=header))
