"""Print comfy-kitchen's codes of the matrices of `tests/quantisation`, as JSON.

It is no dependency: ``pip install --no-deps comfy-kitchen==0.2.40``, 68 MB; its eager code runs on a CPU.
"""

from __future__ import annotations

import json
import sys
from hashlib import sha256

import numpy as np
import torch

from lora_fuse.machine import interrupts
from tests.support.matrices import matrix


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def codes(kind: str) -> dict[str, dict[str, object]]:
    """Codes and scales of each format for one matrix."""
    from comfy_kitchen.backends.eager import quantization as eager

    from lora_fuse.quantisation import FORMATS, Fp8Options

    values = torch.from_numpy(matrix(kind))
    scale = torch.from_numpy(
        FORMATS["fp8_scaled"].encode(matrix(kind), Fp8Options())["weight_scale"].astype(np.float32)
    )
    int8, int8_scale = eager.quantize_int8_convrot_weight(values.clone(), 256)
    mx, mx_scale = eager.quantize_mxfp8(values.clone(), pad_32x=True)
    of_all = torch.amax(values.abs()) / (448.0 * 6.0)
    nv, nv_scale = eager.quantize_nvfp4(values.clone(), of_all)
    return {
        f"int8_convrot {kind}": {
            "first rows": int8[:2].numpy().tobytes().hex(),
            "weight_scale": int8_scale.ravel().tolist(),
        },
        f"fp8_scaled {kind}": {"weight": digest(eager.quantize_per_tensor_fp8(values.clone(), scale))},
        f"mxfp8 {kind}": {"weight": digest(mx), "weight_scale": digest(mx_scale)},
        f"nvfp4 {kind}": {"weight": digest(nv), "weight_scale": digest(nv_scale), "weight_scale_2": digest(of_all)},
    }


def main() -> None:
    """Run the command line."""
    print(json.dumps({**codes("normal"), **codes("outliers")}, indent=1))


if __name__ == "__main__":
    sys.exit(interrupts.guarded(main))
