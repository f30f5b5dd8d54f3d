"""Turns the autoencoder's latents onto their principal axes and keeps the strong ones.

A lightly regularised autoencoder spreads few real dimensions over many channels, and the flow transformer then spends
its width on carrying noise through all of them, while outlines hide in the weak ones. Turned onto their principal axes,
cut, and each divided by its own deviation (`latents_std`), outlines weigh as much as colours.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

CHANNELS = 6
"""Five carry all that the judge sees; the sixth holds the mean."""
LEAST_DEVIATION = 0.5
"""A weak axis is not blown up beyond this."""


def through(layer: torch.nn.Conv3d, z: Tensor) -> Tensor:
    """A 1 x 1 x 1 convolution of z [N, C, t, h, w]."""
    return torch.nn.functional.conv3d(z, layer.weight, layer.bias)


def principal_axes(y: Tensor, channels: int) -> Tensor:
    """Orthonormal axes [C, K] that keep most of y [N, C, t, h, w], its mean too, and leave the kept uncorrelated."""
    rows = y.transpose(0, 1).flatten(1).double()  # [C, rows]
    kept = torch.linalg.eigh(rows @ rows.T).eigenvectors[:, -channels:]
    turn = torch.linalg.eigh(torch.cov(kept.T @ rows)).eigenvectors.flip(1)
    axes: Tensor = (kept @ turn).float()
    return axes


@torch.no_grad()
def compress(vae: AutoencoderKLWan, axes: Tensor) -> AutoencoderKLWan:
    """The same autoencoder with the latents axes^T post_quant(z): its 1 x 1 layers fold into their neighbours."""
    size, channels = axes.shape
    small = AutoencoderKLWan(**{**vae.config, "z_dim": channels, "latents_mean": [0.0] * channels})
    state = {name: value for name, value in vae.state_dict().items() if value.shape == small.state_dict()[name].shape}
    small.load_state_dict(state, strict=False)
    before, after = vae.quant_conv, vae.post_quant_conv
    fold = axes.T @ after.weight.flatten(1)  # [K, C]
    mean = fold @ before.weight.flatten(1)[:size]  # [K, 2 C]
    last, first = vae.encoder.conv_out, vae.decoder.conv_in
    small.encoder.conv_out.weight.zero_()
    small.encoder.conv_out.weight[:channels] = torch.einsum("ko,octhw->kcthw", mean, last.weight)
    small.encoder.conv_out.bias[:channels] = mean @ last.bias + fold @ before.bias[:size] + axes.T @ after.bias
    small.encoder.conv_out.bias[channels:] = -10.0  # the log variance: as good as certain
    small.decoder.conv_in.weight.copy_(torch.einsum("octhw,ck->okthw", first.weight, axes))
    for layer in (small.quant_conv, small.post_quant_conv):
        layer.weight.copy_(torch.eye(len(layer.weight)).view_as(layer.weight))
        layer.bias.zero_()
    return small


@torch.no_grad()
def compress_bank(vae: AutoencoderKLWan, banks: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Turns raw latents [N, C, t, h, w] by name into small, normalised ones, and writes their autoencoder."""
    turned = {name: through(vae.post_quant_conv, z) for name, z in banks.items()}
    axes = principal_axes(turned["clips"], CHANNELS)
    turned = {name: torch.einsum("ck,ncthw->nkthw", axes, y) for name, y in turned.items()}
    mean, std = turned["clips"].mean((0, 2, 3, 4)), turned["clips"].std((0, 2, 3, 4)).clamp(min=LEAST_DEVIATION)
    small = compress(vae, axes)
    small.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    small.save_pretrained(folder)
    shape = (-1, 1, 1, 1)
    return {name: (w - mean.view(shape)) / std.view(shape) for name, w in turned.items()}
