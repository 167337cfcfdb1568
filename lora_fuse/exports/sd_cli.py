"""ggml's K types by stable-diffusion.cpp's own program: gguf-py reads them and does not make them.

Each matrix is given to the program alone, in float32, and only its blocks are taken. Of a whole file its converter
would make a GGUF without metadata, which ComfyUI-GGUF refuses, and on a model with an empty flag (`zero_cond_t`) it
dies of a division by zero.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from lora_fuse.checkpoint import Header
from lora_fuse.errors import BadCheckpoint, BadConfig
from lora_fuse.exports.making import octets

NAME = "transformer_blocks.0.attn.to_q.weight"  # of a matrix that the program quantises


def program(name: str) -> str:
    """The path of the program.

    Raises:
        BadConfig: there is none.
    """
    found = which(name)
    if found is None:
        raise BadConfig(
            f"export.sd_cli: there is no program {name!r}, and ggml's K types are made by stable-diffusion.cpp's "
            "sd-cli: put it on PATH, or take gguf_q8_0, which needs none"
        )
    return found


def quantise(sd_cli: str, kind: str, matrix: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """The blocks of a float32 matrix ``(N, K)`` in ggml's type `kind`, uint8 ``(N, bytes of a row)``.

    Raises:
        BadCheckpoint: the program fails, or makes something else.
    """
    import gguf

    with TemporaryDirectory(prefix="lora-fuse-") as folder:
        given = Path(folder, "in.safetensors")
        made = Path(folder, "out.gguf")
        entry = {"dtype": "F32", "shape": list(matrix.shape), "data_offsets": [0, matrix.nbytes]}
        with given.open("wb") as file:
            file.write(Header.pack({NAME: entry}, {}))
            file.write(octets(matrix))
        command = [sd_cli, "-M", "convert", "-m", str(given), "-o", str(made), "--type", kind.replace("Q", "q")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not made.exists():
            said = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise BadCheckpoint(f"{sd_cli} ended with {done.returncode} on {list(matrix.shape)} to {kind}: {said}")
        (tensor,) = gguf.GGUFReader(made).tensors
        if tensor.tensor_type.name != kind:
            raise BadCheckpoint(f"{sd_cli} made {tensor.tensor_type.name} of {list(matrix.shape)}, and not {kind}")
        return np.array(tensor.data)
