"""The VAE: first whole, then its decoder alone, which lifts the quality without moving a latent.

At first its outer level only scales by 2, so that the inner ones can be trained on small pictures: the encoder's starts
as a 2 x 2 box filter, the decoder's as linear interpolation of what its last norm is given. A quarter of the pixels is
a quarter of the time; later the whole decoder learns to draw at full size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn import functional

from pocket import SIDE
from pocket.train import model
from pocket.train.recipe import Recipe
from pocket.train.runtime import DEVICE, Rates, Tensors, compiled, decibels, log, optimize

CARRIED = 4  # channels that the outer level passes on: RGB, and a constant 1 by which RMS norms keep the magnitude


def one_frame(vae: torch.nn.Module) -> None:
    """Let the causal convolutions skip the taps that see only the zeros before a single frame: a third of the work."""
    for module in _causal(vae):
        module.forward = partial(_last_tap, module)


def _causal(vae: torch.nn.Module) -> list[Any]:
    return [module for module in vae.modules() if type(module).__name__ == "QwenImageCausalConv3d"]


def _last_tap(conv: Any, x: torch.Tensor, _: object = None) -> torch.Tensor:
    y = functional.conv2d(x[:, :, 0], conv.weight[:, :, -1], conv.bias, conv.stride[1:], conv._padding[2])
    return y.unsqueeze(2)


def to_input(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (n, h, w, 3) to float (n, 3, 1, h, w) in [-1, 1] on the device."""
    return pixels.to(DEVICE).permute(0, 3, 1, 2).float().div(127.5).sub(1).unsqueeze(2)


def train_vae(recipe: Recipe, pictures: torch.Tensor) -> Tensors:
    """Train the inner levels on small pictures: reconstruction, with a faint pull to unit Gaussians.

    Source: Kingma and Welling, "Auto-Encoding Variational Bayes", 2014. Returns the weights.
    """
    torch.manual_seed(recipe.seed + 2)
    vae = model.vae()
    be_a_pyramid(vae)
    vae.to(DEVICE)
    one_frame(vae)
    small = torch.cat([functional.avg_pool2d(to_input(part).squeeze(2), 2) for part in torch.split(pictures, 256)])

    def forward(x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, logvar = encode_small(vae, x).chunk(2, 1)
        logvar = logvar.clamp(-30, 20)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return decode_small(vae, mean + (logvar / 2).exp() * noise), kl

    run = compiled(forward)
    side = SIDE // model.PATCH

    def loss() -> torch.Tensor:
        x = small[torch.randint(len(small), (recipe.vae_batch,))].unsqueeze(2)
        y, kl = run(x, torch.randn(len(x), model.CHANNELS, 1, side, side, device=DEVICE))
        total: torch.Tensor = _difference(y, x) + recipe.kl * kl
        return total

    optimize("vae", list(vae.parameters()), loss, recipe.vae_steps, Rates(recipe.vae_rate, decay=1e-4))
    _report(vae, pictures)
    return _state(vae)


def train_decoder(recipe: Recipe, weights: Tensors, pictures: torch.Tensor) -> Tensors:
    """Train the decoder on, with latents as noisy as the transformer's; the encoder stays."""
    torch.manual_seed(recipe.seed + 3)
    vae = load_vae(weights)
    spread = encode(vae, pictures[:512]).std()
    decoder = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    for parameter in decoder:
        parameter.requires_grad_(True)
    run = compiled(partial(decode, vae))

    def loss() -> torch.Tensor:
        x = pictures[torch.randint(len(pictures), (recipe.vae_batch,))]
        z = encode(vae, x).unsqueeze(2)
        strength = recipe.decoder_noise * spread * torch.rand(len(z), 1, 1, 1, 1, device=DEVICE)
        return _difference(run(z + strength * torch.randn_like(z)), to_input(x))

    optimize("decoder", decoder, loss, recipe.decoder_steps, Rates(recipe.decoder_rate, decay=1e-4))
    _report(vae, pictures)
    return _state(vae)


def _difference(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    error = y - x
    return error.abs().mean() + 2 * error.square().mean()


@torch.no_grad()
def _report(vae: Any, pictures: torch.Tensor) -> None:
    x = to_input(pictures[::37][:256])
    y = torch.cat([decode(vae, encode(vae, part).unsqueeze(2)) for part in torch.split(pictures[::37][:256], 32)])
    log(f"vae round trip {decibels(functional.mse_loss(y.clamp(-1, 1), x).item()):.2f} dB on training pictures")


@torch.no_grad()
def encode(vae: Any, pictures: torch.Tensor) -> torch.Tensor:
    """Means of the latents, (n, channels, h, w), of uint8 pictures."""
    parts = [vae.quant_conv(vae.encoder(to_input(part))).chunk(2, 1)[0][:, :, 0] for part in torch.split(pictures, 64)]
    return torch.cat(parts)


def decode(vae: Any, z: torch.Tensor) -> torch.Tensor:
    """Pictures (n, 3, 1, h, w) of latents (n, channels, 1, h/16, w/16), not clamped, so that gradients reach them."""
    pictures: torch.Tensor = vae.decoder(vae.post_quant_conv(z))
    return pictures


def load_vae(weights: Tensors) -> Any:
    """A frozen VAE with one-frame convolutions."""
    vae = model.vae()
    vae.load_state_dict(weights)
    one_frame(vae)
    return vae.to(DEVICE).requires_grad_(False)


def _state(vae: torch.nn.Module) -> Tensors:
    """The weights, with 0 where no single frame ever reads."""
    with torch.no_grad():
        for module in _causal(vae):
            module.weight[:, :, :-1] = 0
    return {name: value.detach().cpu().contiguous() for name, value in vae.state_dict().items()}


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
    linear = torch.tensor([0.25, 0.5, 0.25])
    _carry(decoder.up_blocks[-2].upsamplers[0].resample[1], torch.outer(linear, linear), CARRIED)
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
