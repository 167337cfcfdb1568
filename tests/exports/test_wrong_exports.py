"""Wrong exports are files that load, and are wrong: each differs from the right one where it is said to."""

from pathlib import Path

import numpy as np
import pytest

from lora_fuse.exports import ExportOptions, export, read_export
from lora_fuse.exports.export_contents import as_merged
from tests.support.matrices import Float32s, matrix, qwen
from tests.support.wrong_exports import FLAG, WRONG, wrong_export

SILENT = {"missing flag"}  # all weights are right
# Energies of the error over a right export's, at least: what a gate has to tell apart.
WORSE = {
    "unscaled fp8": 1.3,
    "LoRA added to codes": 3.0,
    "quantised first, fused after": 1.2,
    "int8 under scaled_fp8": 3.0,
    "scale rounded to bf16": 1.03,
    "one scale doubled": 1000.0,
    "nibbles swapped": 50.0,
    "keep-list ignored": 1.01,
    "group size wrong": 1000.0,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_export_is_worse_than_the_right_one(tmp_path: Path, name: str) -> None:
    checkpoint = qwen(tmp_path / "t", zero_cond_t=True)
    merged = as_merged(checkpoint)

    def base(key: str) -> Float32s:
        values = merged(key)
        return values - matrix(shape=(values.shape[0], values.shape[1]), seed=77) * np.float32(0.04)

    path = wrong_export(name, checkpoint, tmp_path / "wrong", base=base, exact=merged)
    options = ExportOptions(matrix=merged)
    made = export(
        checkpoint,
        tmp_path / "right",
        [WRONG[name].format],
        name="wrong",
        metadata={},
        progress=lambda _: None,
        options=options,
    )
    (right,) = (tmp_path / "right" / place for place in made)
    shapes = {key: tensor.shape for key, tensor in checkpoint.tensors().items()}
    energies = [
        sum(float(np.square(values.astype(float) - merged(key)).sum()) for key, values in read_export(one, shapes))
        for one in (path, right)
    ]
    if name in SILENT:
        assert energies[0] == energies[1]
        assert FLAG.encode() in right.read_bytes()
        assert FLAG.encode() not in path.read_bytes()
    else:
        assert energies[0] > WORSE[name] * energies[1]
