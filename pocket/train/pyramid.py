"""A VAE whose outer level only scales by 2 at first, so that the inner ones can be trained on small pictures.

The encoder's outer level starts as a 2 x 2 box filter, the decoder's as linear interpolation of what its last norm is
given. A quarter of the pixels is a quarter of the time; later the whole decoder learns to draw at full size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

CARRIED = 4  # channels that the outer level passes on: RGB, and a constant 1 by which RMS norms keep the magnitude


@torch.no_grad()
def be_a_pyramid(vae: Any) -> None:
    """Set the outer level of both halves, and let the attention of both add nothing at first."""
    encoder = vae.encoder
    decoder = vae.decoder
    for half in (encoder, decoder):
        for parameter in half.mid_block.attentions[0].proj.parameters():
            parameter.zero_()
    _carry(encoder.conv_in, torch.ones(1, 1), 3)
    encoder.conv_in.bias[3] = 1
    _add_nothing(encoder.down_blocks[0])
    _carry(encoder.down_blocks[1].resample[1], functional.pad(torch.full((2, 2), 0.25), (0, 1, 0, 1)), CARRIED)
    for residual in decoder.up_blocks[-1].resnets:
        _add_nothing(residual)
    _carry(
        decoder.up_blocks[-2].upsamplers[0].resample[1], torch.outer(*[torch.tensor([0.25, 0.5, 0.25])] * 2), CARRIED
    )
    weight = decoder.conv_out.weight
    centre = weight.sum((2, 3, 4))
    weight.zero_()
    weight[:, :, -1, 1, 1] = centre


def _carry(conv: Any, kernel: torch.Tensor, channels: int) -> None:
    """Make `conv` filter each of its first channels by `kernel`, centred, and drop the others."""
    conv.weight.zero_()
    conv.bias.zero_()
    plane = conv.weight if conv.weight.ndim == 4 else conv.weight[:, :, -1]
    pad = (plane.shape[-1] - kernel.shape[-1]) // 2
    for channel in range(channels):
        plane[channel, channel] = functional.pad(kernel, (pad, pad, pad, pad))


def _add_nothing(residual: Any) -> None:
    residual.conv2.weight.zero_()
    residual.conv2.bias.zero_()
    if residual.in_dim != residual.out_dim:
        _carry(residual.conv_shortcut, torch.ones(1, 1), CARRIED)


def encode_small(vae: Any, x: torch.Tensor) -> torch.Tensor:
    """Moments of the latents of pictures (n, 3, 1, h/2, w/2) that the outer level would have scaled down."""
    encoder = vae.encoder
    x = torch.cat([x, torch.ones_like(x[:, :1]), x.new_zeros(len(x), encoder.dim - CARRIED, *x.shape[2:])], 1)
    for layer in encoder.down_blocks[2:]:
        x = layer(x)
    x = encoder.nonlinearity(encoder.norm_out(encoder.mid_block(x, None, [0])))
    moments: torch.Tensor = vae.quant_conv(encoder.conv_out(x))
    return moments


def decode_small(vae: Any, z: torch.Tensor) -> torch.Tensor:
    """The pictures that the outer level would scale up."""
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(z)), None, [0])
    for block in decoder.up_blocks[:-2]:
        x = block(x)
    for residual in decoder.up_blocks[-2].resnets:
        x = residual(x)
    x = x[:, :CARRIED]
    x = torch.cat([x, x.new_zeros(len(x), decoder.dim - CARRIED, *x.shape[2:])], 1)
    pictures: torch.Tensor = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))
    return pictures
