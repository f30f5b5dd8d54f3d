"""AutoencoderKLWan's encoder (Wan 2.1, and the residual one of Wan 2.2): frames to latents.

The attribute names are the keys of the diffusers checkpoint. A clip's first frame is encoded alone, the others in
chunks of whole latent frames; as in the decoder, `past` joins the chunks without a seam.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from sgld.models.components import ComponentLoader
from sgld.models.vae import (
    CHUNK_PIXELS,
    CausalConv3d,
    ChannelRMSNorm,
    MidBlock,
    Past,
    ResidualBlock,
    Tiling,
    Vae,
    WanVaeConfig,
    join_tiles,
    vae_config,
)
from sgld.nn.weights import Keeper, load_module, weight_files
from sgld.params import SamplingParams
from sgld.settings import Settings


class HalvingConv(CausalConv3d):
    """Every second frame, from it and its two neighbours before; a clip's first frame passes as it is."""

    def __init__(self, dim: int):
        super().__init__(dim, dim, 3, 1)

    def forward(self, x: Tensor, past: Past) -> Tensor:  # [T, C, H, W] -> [T/2, C, H, W]
        before = past.get(self)
        past[self] = x[-1:].clone()
        if before is None:
            return x
        x = torch.cat([before, x])
        x = torch.cat([x[:-2:2], x[1:-1:2], x[2::2]], 1)  # [T/2, 3C, H, W]
        return F.conv2d(x, self.weight.transpose(1, 2).flatten(1, 2), self.bias)


class Downsample(nn.Module):
    """Half the height and width, and with `in_time` half the frames but for the clip's first."""

    def __init__(self, dim: int, in_time: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = HalvingConv(dim) if in_time else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        y: Tensor = self.resample(x)
        return y if self.time_conv is None else self.time_conv(y, past)


class DownBlock(nn.Module):
    """The residual form: residual blocks, then the downsampling; averages of the input's pixels are added."""

    def __init__(self, dim_in: int, dim: int, blocks: int, down: bool, in_time: bool):
        super().__init__()
        dims = [dim_in, *[dim] * blocks]
        self.resnets = nn.ModuleList(ResidualBlock(a, b) for a, b in itertools.pairwise(dims))
        self.downsampler = Downsample(dim, in_time) if down else None
        self.dim, self.frames, self.side = dim, 2 if in_time else 1, 2 if down else 1

    def forward(self, x: Tensor, past: Past) -> Tensor:
        y = x
        for block in self.resnets:
            y = block(y, past)
        if self.downsampler is not None:
            y = self.downsampler(y, past)
        return y + self.average(x)

    def average(self, x: Tensor) -> Tensor:
        """Average the new pixels and frames to `dim` channels: [T, C, H, W] -> [T/f, dim, H/s, W/s]."""
        f, s = self.frames, self.side
        x = F.pad(x, (0, 0, 0, 0, 0, 0, -len(x) % f, 0))  # the clip's first frame comes alone
        T, C, H, W = x.shape
        x = x.view(T // f, f, C, H // s, s, W // s, s).permute(0, 2, 1, 4, 6, 3, 5)  # [T/f, C, f, s, s, H/s, W/s]
        return x.reshape(T // f, self.dim, -1, H // s, W // s).mean(2)


class Encoder(nn.Module):
    def __init__(self, c: WanVaeConfig):
        super().__init__()
        dims = [c.base_dim * m for m in (1, *c.dim_mult)]
        last = len(c.dim_mult) - 1
        in_time = [*c.temperal_downsample[:last], False]
        self.conv_in = CausalConv3d(3 * (c.patch_size or 1) ** 2, dims[0], 3, 3)
        self.down_blocks = nn.ModuleList()
        for i, (dim_in, dim) in enumerate(itertools.pairwise(dims)):
            if c.is_residual:
                self.down_blocks.append(DownBlock(dim_in, dim, c.num_res_blocks, i < last, in_time[i]))
                continue
            widths = itertools.pairwise([dim_in, *[dim] * c.num_res_blocks])
            self.down_blocks.extend(ResidualBlock(a, b) for a, b in widths)
            if i < last:
                self.down_blocks.append(Downsample(dim, in_time[i]))
        self.mid_block = MidBlock(dims[-1])
        self.norm_out = ChannelRMSNorm(dims[-1], 3)
        self.conv_out = CausalConv3d(dims[-1], 2 * c.z_dim, 3, 3)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = self.conv_in(x, past)
        for block in self.down_blocks:
            x = block(x, past)
        x = self.mid_block(x, past)
        y: Tensor = self.conv_out(F.silu(self.norm_out(x)), past)
        return y


class WanEncoder(nn.Module):
    """Pictures [N, 3, H, W] in [-1, 1] to latents [T, C, H/8, W/8]: the mode of the posterior."""

    def __init__(self, c: WanVaeConfig):
        super().__init__()
        self.config = c
        self.encoder = Encoder(c)
        self.quant_conv = CausalConv3d(2 * c.z_dim, 2 * c.z_dim, 1, 1)

    def forward(self, x: Tensor, raise_if_cancelled: Callable[[], None] = lambda: None) -> Tensor:
        """Encode chunk by chunk on the weights' device, with `raise_if_cancelled` before each."""
        past = Past()
        frames = self.config.scale_factor_temporal
        many = max(1, CHUNK_PIXELS // (x[0, 0].numel() * frames))  # latent frames
        chunks = (x[:1], *(torch.split(x[1:], many * frames) if len(x) > 1 else ()))
        parts = []
        for i, chunk in enumerate(chunks):
            raise_if_cancelled()
            past.last = i == len(chunks) - 1
            chunk = self.patch(chunk.to(self.quant_conv.weight)).contiguous(memory_format=torch.channels_last)
            parts.append(self.quant_conv(self.encoder(chunk, past), past))
        return torch.cat(parts)[:, : self.config.z_dim]  # the other half are log variances

    def patch(self, x: Tensor) -> Tensor:
        """Patch [N, 3, p*H, p*W] to [N, 3*p*p, H, W]."""
        p = self.config.patch_size
        if p is None or p == 1:
            return x
        N, C, H, W = x.shape
        x = x.view(N, C, H // p, p, W // p, p).permute(0, 1, 5, 3, 2, 4)  # [N, 3, pw, ph, H, W]
        return x.reshape(N, C * p**2, H // p, W // p)


class VaeEncoder:
    """The encoder of a checkpoint, with the mean and deviation of its latents."""

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        dtype: torch.dtype,
        device: torch.device,
        offload: Keeper | None = None,
    ):
        c = vae_config(folder / "config.json")
        self.spatial, self.temporal = c.scale_factor_spatial, c.scale_factor_temporal
        unused = "decoder.", "post_quant_conv."
        self.module = load_module(lambda: WanEncoder(c), folder, dtype, device, unused=unused, offload=offload)
        self.mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1).to(device) for v in (c.latents_mean, c.latents_std))
        self.precision = 1.0 / std
        self.tiling = Tiling.of(settings.memory.vae_config, self.spatial) if settings.memory.tiles() else None

    def encode(self, pictures: Tensor, raise_if_cancelled: Callable[[], None] = lambda: None) -> Tensor:
        """Encode pictures [N, 3, H, W] in [-1, 1], N = 4k+1, to latents float32 [1, C, k+1, H/8, W/8].

        They are the mode of the posterior, with mean 0 and deviation 1. `raise_if_cancelled` is called again and again.
        """
        assert (len(pictures) - 1) % self.temporal == 0
        height, width = pictures.shape[2:]
        tiled = self.tiling is not None and (height > self.tiling.height or width > self.tiling.width)
        z = (
            self.in_tiles(pictures, self.tiling, raise_if_cancelled)
            if self.tiling and tiled
            else self.module(pictures, raise_if_cancelled)
        )
        return (z.float().transpose(0, 1)[None] - self.mean) * self.precision

    def in_tiles(self, x: Tensor, t: Tiling, raise_if_cancelled: Callable[[], None] = lambda: None) -> Tensor:
        """Tile by tile, each faded into the ones above and to the left."""
        s = self.spatial
        H, W = x.shape[2:]
        rows: list[list[Tensor]] = []
        for i in range(0, H, t.stride_height):
            columns = range(0, W, t.stride_width)
            rows.append([self.module(x[..., i : i + t.height, j : j + t.width], raise_if_cancelled) for j in columns])
        return join_tiles(rows, t, s)[..., : H // s, : W // s]


class WanAutoencoder:
    """Wan's autoencoder of a model folder: its decoder, and its encoder, which is loaded when it is first used."""

    def __init__(self, parts: ComponentLoader):
        s, folder, keep = parts.settings, parts.path("vae"), parts.offloader
        parts.torch_only("vae", "its attention has a single head of many channels")
        dtype, device = parts.dtype("vae"), parts.mesh.device
        rows = parts.mesh.all if s.memory.parallel_decode else None
        self.decoder = Vae(folder, s, dtype, device, keep.keeper("vae"), rows)
        parts.loaded(self.decoder.module)
        d = self.decoder
        self.channels, self.spatial, self.temporal = d.channels, d.spatial, d.temporal
        self.can_encode = s.memory.vae_config.load_encoder and has_encoder(folder)
        self.encoder: VaeEncoder | None = None
        self._load_encoder = partial(VaeEncoder, folder, s, dtype, device, keep.keeper("vae_encoder"))
        self._offloader = keep

    def grid(self, params: SamplingParams) -> tuple[int, int, int]:
        """Return frames, rows and columns of an output's latents."""
        frames = (params.num_frames - 1) // self.temporal + 1
        return frames, params.height // self.spatial, params.width // self.spatial

    def encode(self, frames: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        """Encode frames [N, 3, H, W] in [-1, 1] to latents [1, C, T, h, w]; see `VaeEncoder.encode`."""
        encoder = self.load_encoder()
        self._offloader.need("vae_encoder")
        return encoder.encode(frames, raise_if_cancelled)

    def load_encoder(self) -> VaeEncoder:
        """Load the encoder unless it is loaded; most requests bring no picture."""
        if self.encoder is None:
            self.encoder = self._load_encoder()
        return self.encoder

    def decode(self, z: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        """Decode latents [1, C, T, h, w] to frames u8 [N, H, W, 3] on the CPU."""
        return self.decoder.decode(z, raise_if_cancelled)


def has_encoder(folder: Path) -> bool:
    """Read from the headers of the weights whether an autoencoder has its encoder."""
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            if any(name.startswith("encoder.") for name in tensors.keys()):  # noqa: SIM118 - not a dict
                return True
    return False
