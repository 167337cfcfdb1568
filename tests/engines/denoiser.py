"""One denoiser call of Qwen-Image, the same in every engine.

Grids are even and input pictures not larger than the picture: of odd grids and larger ones the engines place the
tokens each in their own way. The time step is a bfloat16, since diffusers rounds it to the compute type.
"""

import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

SIGMA = 0.75
CHANNELS = 16
TEXT = (20, 3584)  # tokens, width
PATCH = 2
TIME_STEPS = 1000


@dataclass(frozen=True, slots=True)
class Case:
    """A picture and its input pictures, in latents: (height, width) of each, the picture first."""

    sizes: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        return " + ".join(f"{height}x{width}" for height, width in self.sizes)

    def latents(self) -> list[torch.Tensor]:
        """Random latents of every size: (CHANNELS, height, width)."""
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(CHANNELS, *size, generator=generator) for size in self.sizes]

    def text(self) -> torch.Tensor:
        """Random states of the text encoder: (tokens, width)."""
        return torch.randn(*TEXT, generator=torch.Generator().manual_seed(1))


PICTURE = Case(((32, 32),))
EDIT = Case(((32, 32), (32, 32)))
CASES = (PICTURE, EDIT)


def by_diffusers(model: torch.nn.Module, case: Case, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The answer of diffusers' transformer: (CHANNELS, height, width) of the picture, float32."""
    packed = [_packed(latents) for latents in case.latents()]
    grids = [(1, height // PATCH, width // PATCH) for height, width in case.sizes]
    with torch.no_grad():
        answer = model(
            hidden_states=torch.cat(packed)[None].to(dtype),
            encoder_hidden_states=case.text()[None].to(dtype),
            timestep=torch.tensor([SIGMA]),
            img_shapes=[grids],
            return_dict=False,
        )[0]
    return _unpacked(answer[0, : len(packed[0])].float(), *case.sizes[0])


def _packed(latents: torch.Tensor) -> torch.Tensor:
    """One token for a patch: (tokens, CHANNELS * PATCH * PATCH)."""
    return torch.nn.functional.pixel_unshuffle(latents, PATCH).flatten(1).T.contiguous()


def _unpacked(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    grid = tokens.T.reshape(-1, height // PATCH, width // PATCH)
    return torch.nn.functional.pixel_shuffle(grid, PATCH)


def by_stable_diffusion_cpp(file: Path, case: Case, *, widened: bool = False) -> tuple[torch.Tensor, str]:
    """The answer of stable-diffusion.cpp from a file, with its log; `widened`, all weights as float32.

    Raises:
        subprocess.CalledProcessError: it refused the file; its log is `stderr`.
    """
    given = file.with_suffix(".in")
    answer = file.with_suffix(".out")
    step = torch.tensor([SIGMA * TIME_STEPS])
    picture, *inputs = [latents[None] for latents in case.latents()]
    given.write_bytes(b"".join(map(_stored, [picture, step, case.text()[None], *inputs])))
    program = Path(sys.executable).parent / "denoise"
    try:
        command: list[str | Path] = [program, file, given, answer, *(["f32"] if widened else [])]
        run = subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
        values = np.fromfile(answer, np.float32).reshape(CHANNELS, *case.sizes[0])
    finally:
        given.unlink()
        answer.unlink(missing_ok=True)
    return torch.from_numpy(values), run.stderr


def by_comfyui(folder: Path, file: Path, case: Case) -> tuple[torch.Tensor | None, str]:
    """The answer of a ComfyUI in a folder in float32, None if it refuses, and its log.

    COMFYUI_PYTHON is the Python that has its libraries.
    """
    given = file.with_suffix(".in")
    answer = file.with_suffix(".out")
    torch.save({"sigma": SIGMA, "latents": case.latents(), "text": case.text()}, given)
    script = Path(__file__).with_name("comfyui.py")
    try:
        python = os.environ.get("COMFYUI_PYTHON", sys.executable)
        command: list[str | Path] = [python, script, folder, file, given, answer]
        run = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
        return (torch.load(answer, weights_only=True) if run.returncode == 0 else None), run.stderr
    finally:
        given.unlink()
        answer.unlink(missing_ok=True)


def _stored(tensor: torch.Tensor) -> bytes:
    """A tensor as denoise.cpp reads it."""
    shape = tensor.shape[::-1]
    return struct.pack(f"<{1 + len(shape)}q", len(shape), *shape) + tensor.numpy().tobytes()


@contextmanager
def text_positions_of_sdcpp(model: Any) -> Iterator[None]:
    """Diffusers with the text's places of stable-diffusion.cpp 0.4.7 (src/rope.hpp, `gen_qwen_image_ids`).

    There the text begins at the longer side of the picture's grid, diffusers at half of it; and of n tokens each is
    n / (n - 1) after the one before, not 1.
    """
    embedding = model.pos_embed
    original: Callable[..., Any] = embedding.forward

    def forward(video_fhw: Sequence[Any], *args: Any, max_txt_seq_len: int, **named: Any) -> tuple[Any, Any]:
        pictures, _ = original(video_fhw, *args, max_txt_seq_len=max_txt_seq_len, **named)
        grids = video_fhw[0] if isinstance(video_fhw[0], list) else video_fhw
        start = max(grids[0][1:])
        places = torch.linspace(start, start + max_txt_seq_len, max_txt_seq_len)
        parts = [embedding.rope_params(places, width, embedding.theta) for width in embedding.axes_dim]
        return pictures, torch.cat(parts, dim=1)

    embedding.forward = forward
    try:
        yield
    finally:
        del embedding.forward
