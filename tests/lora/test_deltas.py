"""Laws of the updates: every algorithm is its formula, in every dtype."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.support.algorithms import ALGORITHMS, Tensors, X, convolutions
from tests.support.key_styles import merged


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
