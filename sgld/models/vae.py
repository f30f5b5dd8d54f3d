"""AutoencoderKLWan's decoder (Wan 2.1 and Qwen-Image, and the residual one of Wan 2.2): latents to frames.

The attribute names are the keys of the diffusers checkpoint. A clip is decoded in chunks of latent frames; every
causal convolution keeps the last two frames it saw in `past`, so the chunks join without a seam.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgld.errors import BadRequest, ModelError
from sgld.nn.parallel import Axis
from sgld.nn.weights import Keeper, load_module, pick, read_json
from sgld.settings import Settings, VaeConfig


class Past(dict[nn.Module, Tensor]):
    """What each layer remembers of the chunks before, and the ranks that share the rows of pictures [T, C, H, W].

    Of the `last` chunk nothing is remembered.
    """

    def __init__(self, rows: Axis | None = None):
        super().__init__()
        self.rows, self.last = rows or Axis(), False

    def pad(self, x: Tensor, side: int) -> Tensor:
        """Add the rows of other ranks above and below, for a convolution that reaches `side` (0 or 1) pixels."""
        return self.rows.with_halo(x, 2) if side and self.rows.size > 1 else x

    def padding(self, side: int) -> tuple[int, int]:
        """Return what the convolution itself pads."""
        return (0 if self.rows.size > 1 else side), side


CLASSES = ("AutoencoderKLWan", "AutoencoderKLQwenImage")  # of one architecture
CHUNK_PIXELS = 2**19  # pixels decoded at once, at most, unless one latent frame has more


@attrs.frozen
class WanVaeConfig:
    """Architecture numbers, as in vae/config.json."""

    z_dim: int
    base_dim: int
    latents_mean: list[float]
    latents_std: list[float]
    decoder_base_dim: int | None = None
    dim_mult: list[int] = attrs.field(factory=lambda: [1, 2, 4, 4])
    num_res_blocks: int = 2
    temperal_downsample: list[bool] = attrs.field(factory=lambda: [False, True, True])
    attn_scales: list[float] = attrs.field(factory=list)
    is_residual: bool = False
    input_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8


class CausalConv3d(nn.Module):
    """Convolution that sees this frame and the two before; zeros before the first.

    Its taps in time are laid side by side as channels: one convolution of frames, which a CPU does much faster.
    """

    def __init__(self, dim_in: int, dim: int, in_time: int, in_space: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim_in, in_time, in_space, in_space))
        self.bias = nn.Parameter(torch.empty(dim))
        self.back, self.side = in_time - 1, in_space // 2

    def forward(self, x: Tensor, past: Past) -> Tensor:  # [T, C, H, W]
        x = past.pad(x, self.side)
        weight: Tensor = self.weight
        if self.back:
            before = past.pop(self, None)
            if before is None and past.last and len(x) == 1:
                weight = weight[:, :, -1:]  # a picture: the other taps see zeros
            else:
                x = torch.cat([x.new_zeros(self.back, *x.shape[1:]) if before is None else before, x])
                if not past.last:
                    past[self] = x[-self.back :].clone()  # a view would keep the whole chunk
                x = torch.cat([x[i : len(x) - self.back + i] for i in range(self.back + 1)], 1)  # [T, taps*C, H, W]
        weight = weight.transpose(1, 2).flatten(1, 2)  # [out, taps*in, kh, kw]
        return F.conv2d(x, weight, self.bias, padding=past.padding(self.side))


class ChannelRMSNorm(nn.Module):
    """Each pixel's channels scaled to unit length, times sqrt(C) and gamma."""

    def __init__(self, dim: int, axes: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(dim, *[1] * axes))
        self.scale = dim**0.5

    def forward(self, x: Tensor) -> Tensor:  # [T, C, H, W]
        length = x.float().square().sum(1, keepdim=True).sqrt().clamp(min=1e-12)
        y: Tensor = (x / length).type_as(x) * (self.scale * self.gamma.view(-1, 1, 1))
        return y


class ResidualBlock(nn.Module):
    def __init__(self, dim_in: int, dim: int):
        super().__init__()
        self.norm1, self.conv1 = ChannelRMSNorm(dim_in, 3), CausalConv3d(dim_in, dim, 3, 3)
        self.norm2, self.conv2 = ChannelRMSNorm(dim, 3), CausalConv3d(dim, dim, 3, 3)
        self.conv_shortcut = CausalConv3d(dim_in, dim, 1, 1) if dim_in != dim else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)), past)
        y = self.conv2(F.silu(self.norm2(y)), past)
        z: Tensor = y + (x if self.conv_shortcut is None else self.conv_shortcut(x, past))
        return z


class FrameAttention(nn.Module):
    """Single-head attention among the pixels of each frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = ChannelRMSNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:  # [T, C, H, W]
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).mT[:, None].contiguous().chunk(3, -1)  # [T, 1, HW, C]
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.reshape(x.shape)
        z: Tensor = x + self.proj(y)
        return z


class MidBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])
        self.attentions = nn.ModuleList([FrameAttention(dim)])

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, past))
        y: Tensor = self.resnets[1](x, past)
        return y


class Upsample(nn.Module):
    """Twice the height and width, and with `in_time` twice the frames but for the clip's first."""

    def __init__(self, dim: int, dim_out: int, in_time: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(dim, dim_out, 3))
        self.time_conv = CausalConv3d(dim, 2 * dim, 3, 1) if in_time else None

    def forward(self, x: Tensor, past: Past, first: bool) -> Tensor:
        if self.time_conv is not None:
            x = torch.cat([x[:1], self.in_time(x[1:], past)]) if first else self.in_time(x, past)
        double, conv = self.resample
        assert isinstance(conv, nn.Conv2d)
        x = past.pad(double(x), 1)
        return F.conv2d(x, conv.weight, conv.bias, padding=past.padding(1))

    def in_time(self, x: Tensor, past: Past) -> Tensor:
        """Double the frames: [T, C, H, W] -> [2T, C, H, W]."""
        if self.time_conv is None or not len(x):
            return x
        y: Tensor = self.time_conv(x, past)
        return y.reshape(2 * len(x), *x.shape[1:])


class UpBlock(nn.Module):
    """Residual blocks, then the upsampling; in the residual form a plain copy of the input is added."""

    def __init__(self, dim_in: int, dim: int, blocks: int, up: bool, in_time: bool, residual: bool):
        super().__init__()
        dims = [dim_in, *[dim] * (blocks + 1)]
        self.resnets = nn.ModuleList(ResidualBlock(a, b) for a, b in itertools.pairwise(dims))
        self.upsampler = Upsample(dim, dim, in_time) if up and residual else None
        self.upsamplers = nn.ModuleList([Upsample(dim, dim // 2, in_time)]) if up and not residual else None
        self.dim, self.shortcut, self.frames = dim, up and residual, 2 if in_time else 1

    def forward(self, x: Tensor, past: Past, first: bool) -> Tensor:
        y = x
        for block in self.resnets:
            y = block(y, past)
        up = self.upsampler if self.upsamplers is None else self.upsamplers[0]
        if up is not None:
            y = up(y, past, first)
        return y + self.copy(x, first) if self.shortcut else y

    def copy(self, x: Tensor, first: bool) -> Tensor:
        """Spread channels over the new pixels and frames: [T, C, H, W] -> [f*T, dim, 2H, 2W]."""
        f, (T, C, H, W) = self.frames, x.shape
        x = x.repeat_interleave(self.dim * f * 4 // C, dim=1).reshape(T, self.dim, f, 2, 2, H, W)
        x = x.permute(0, 2, 1, 5, 3, 6, 4).reshape(T * f, self.dim, 2 * H, 2 * W)
        return x[f - 1 :] if first else x


class WanDecoderBlocks(nn.Module):
    """The decoder behind `post_quant_conv`."""

    def __init__(self, c: WanVaeConfig):
        super().__init__()
        dims = [(c.decoder_base_dim or c.base_dim) * m for m in (c.dim_mult[-1], *reversed(c.dim_mult))]
        in_time = [*reversed(c.temperal_downsample), False]
        last = len(c.dim_mult) - 1
        self.conv_in = CausalConv3d(c.z_dim, dims[0], 3, 3)
        self.mid_block = MidBlock(dims[0])
        self.up_blocks = nn.ModuleList(
            UpBlock(
                dims[i] if c.is_residual or i == 0 else dims[i] // 2,
                dims[i + 1], c.num_res_blocks, i < last, in_time[i], c.is_residual,
            )
            for i in range(last + 1)
        )  # fmt: skip
        self.norm_out = ChannelRMSNorm(dims[-1], 3)
        self.conv_out = CausalConv3d(dims[-1], c.out_channels, 3, 3)

    def forward(self, x: Tensor, past: Past, own: Past, first: bool) -> Tensor:
        """Decode the rows of `own`. The first layers see whole pictures: attention joins all pixels."""
        x = self.mid_block(self.conv_in(x, past), past)
        x = own.rows.share(x, 2)
        for block in self.up_blocks:
            x = block(x, own, first)
        y: Tensor = self.conv_out(F.silu(self.norm_out(x)), own)
        return y


class WanDecoder(nn.Module):
    """Latents [T, C, H, W] to pictures [N, 3, 8H, 8W], mostly in [-1, 1]."""

    def __init__(self, c: WanVaeConfig):
        super().__init__()
        self.config = c
        self.post_quant_conv = CausalConv3d(c.z_dim, c.z_dim, 1, 1)
        self.decoder = WanDecoderBlocks(c)

    def forward(
        self, z: Tensor, raise_if_cancelled: Callable[[], None] = lambda: None, rows: Axis | None = None
    ) -> Tensor:
        """Decode chunk by chunk, with `raise_if_cancelled` before each. With `rows`, each rank decodes its share."""
        past, own = Past(), Past(rows)
        pixels = z[0, 0].numel() * self.config.scale_factor_spatial**2 * self.config.scale_factor_temporal
        chunks = torch.split(z, max(1, CHUNK_PIXELS // pixels))
        parts = []
        for i, chunk in enumerate(chunks):
            raise_if_cancelled()
            past.last = own.last = i == len(chunks) - 1
            parts.append(self.decoder(self.post_quant_conv(chunk, past), past, own, first=i == 0))
        return self.unpatch(torch.cat(parts))

    def unpatch(self, x: Tensor) -> Tensor:
        """Unpatch [N, 3*p*p, H, W] to [N, 3, p*H, p*W]."""
        p = self.config.patch_size
        if p is None or p == 1:
            return x
        N, C, H, W = x.shape
        x = x.view(N, C // p**2, p, p, H, W)  # [N, 3, pw, ph, H, W]
        return x.permute(0, 1, 4, 3, 5, 2).reshape(N, C // p**2, p * H, p * W)


@attrs.frozen
class Tiling:
    """Tiles in pixels, and the distance from one to the next; neighbours are blended where they overlap."""

    height: int = 256
    width: int = 256
    stride_height: int = 192
    stride_width: int = 192

    @classmethod
    def of(cls, c: VaeConfig, multiple: int) -> Tiling:
        """Build from the settings. Sizes are multiples of a latent pixel. Raises BadRequest."""
        given = (
            c.tile_sample_min_height, c.tile_sample_min_width, c.tile_sample_stride_height, c.tile_sample_stride_width
        )  # fmt: skip
        t = cls(*(g or d for g, d in zip(given, attrs.astuple(cls()), strict=True)))
        for side in ("height", "width"):
            size, stride = getattr(t, side), getattr(t, f"stride_{side}")
            if size % multiple or stride % multiple or stride > size:
                raise BadRequest(
                    f"vae_config.tile_sample_stride_{side}: tiles of {size} every {stride} pixels cannot be joined; "
                    f"both must be multiples of {multiple}, and the stride at most the tile",
                    f"vae_config.tile_sample_stride_{side}",
                )
        return t


class Vae:
    """The decoder of a checkpoint, with the mean and deviation of its latents."""

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        dtype: torch.dtype,
        device: torch.device,
        offload: Keeper | None = None,
        rows: Axis | None = None,
    ):
        if not settings.memory.vae_config.load_decoder:
            raise BadRequest("vae_config.load_decoder: this model cannot work without the decoder", "load_decoder")
        if (mode := settings.memory.vae_config.parallel_decode_mode) == "tiled":
            path = "vae_config.parallel_decode_mode"
            raise BadRequest(f"{mode!r}: this model's decode is shared row by row; use auto or spatial", field=path)
        c = vae_config(folder / "config.json")
        self.config = c
        self.channels, self.spatial, self.temporal = c.z_dim, c.scale_factor_spatial, c.scale_factor_temporal
        unused = "encoder.", "quant_conv."
        self.module = load_module(lambda: WanDecoder(c), folder, dtype, device, unused=unused, offload=offload)
        self.mean, std = (torch.tensor(v).view(-1, 1, 1).to(device, dtype) for v in (c.latents_mean, c.latents_std))
        self.precision = 1.0 / std
        self.tiling = Tiling.of(settings.memory.vae_config, self.spatial) if settings.memory.tiles() else None
        self.rows = rows or Axis()

    def decode(self, x: Tensor, raise_if_cancelled: Callable[[], None] = lambda: None) -> Tensor:
        """Decode latents [1, C, T, H, W] to frames u8 [N, 8H, 8W, 3] on the CPU.

        Ranks that share the rows all call it, and the first of them has the frames.
        """
        z = x[0].transpose(0, 1).to(self.mean, memory_format=torch.channels_last) / self.precision + self.mean
        tiled = self.tiling is not None and self.is_large(z, self.tiling)
        t = self.tiling if tiled else None
        video = (
            self.whole(z, raise_if_cancelled, levels) if t is None else levels(self.in_tiles(z, t, raise_if_cancelled))
        )
        return video.permute(0, 2, 3, 1).cpu()

    def whole(
        self,
        z: Tensor,
        raise_if_cancelled: Callable[[], None],
        finish: Callable[[Tensor], Tensor] = lambda video: video,
    ) -> Tensor:
        """Decode latents, or one tile, to pictures [N, 3, 8H, 8W]. Each rank sends its rows as `finish` makes them."""
        rows = self.rows if z.shape[2] >= self.rows.size else Axis()
        return rows.join(finish(self.module(z, raise_if_cancelled, rows)), 2, z.shape[2])

    @property
    def chunk_pixel_bytes(self) -> int:
        """Return the bytes of activations and past frames for each pixel of a chunk.

        Sixteen copies of its widest level, measured on the embedded model and on tiny twins (12 to 15).
        """
        c = self.config
        dims = [(c.decoder_base_dim or c.base_dim) * m / 4**level for level, m in enumerate(c.dim_mult)]
        return int(16 * max(dims) * self.mean.element_size() / (c.patch_size or 1) ** 2)

    def is_large(self, z: Tensor, t: Tiling) -> bool:
        """Return true if a tile is smaller than the picture."""
        return z.shape[2] > t.height // self.spatial or z.shape[3] > t.width // self.spatial

    def in_tiles(self, z: Tensor, t: Tiling, raise_if_cancelled: Callable[[], None] = lambda: None) -> Tensor:
        """Tile by tile, each faded into the ones above and to the left."""
        s = self.spatial
        H, W = z.shape[2:]
        rows: list[list[Tensor]] = []
        for i in range(0, H, t.stride_height // s):
            columns = range(0, W, t.stride_width // s)
            rows.append(
                [self.whole(z[..., i : i + t.height // s, j : j + t.width // s], raise_if_cancelled) for j in columns]
            )
        if self.rows.index:
            return rows[0][0]  # the first rank joins them
        return join_tiles(rows, t)[..., : H * s, : W * s]


def join_tiles(rows: list[list[Tensor]], t: Tiling, shrunk: int = 1) -> Tensor:
    """Join rows of tiles, each faded into the tiles above and to the left. `shrunk` is pixels for each cell.

    The tiles are changed.
    """
    height, width = t.stride_height // shrunk, t.stride_width // shrunk  # of what is kept of a tile
    joined = []
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            if i:
                fade(rows[i - 1][j], tile, t.height // shrunk - height, -2)
            if j:
                fade(row[j - 1], tile, t.width // shrunk - width, -1)
        joined.append(torch.cat([tile[..., :height, :width] for tile in row], -1))
    return torch.cat(joined, -2)


def levels(video: Tensor) -> Tensor:
    """Convert pictures in [-1, 1] to u8."""
    return video.float().mul_(0.5).add_(0.5).clamp_(0, 1).mul_(255).round_().to(torch.uint8)  # this is the peak


def fade(a: Tensor, b: Tensor, extent: int, dim: int) -> None:
    """Blend the end of `a` into the start of `b`, in place, over `extent` pixels along `dim`."""
    n = min(a.shape[dim], b.shape[dim], extent)
    if n < 1:
        return
    shape = [1] * a.ndim
    shape[dim] = n
    weight = torch.arange(n, device=b.device, dtype=b.dtype).div(n).view(shape)
    start = b.narrow(dim, 0, n)
    start.copy_(torch.lerp(a.narrow(dim, a.shape[dim] - n, n), start, weight))


def vae_config(file: Path) -> WanVaeConfig:
    """Read the numbers of a config.json.

    Raises:
        ModelError: another autoencoder, or a form that no checkpoint has.
    """
    config = read_json(file)
    if (name := config.get("_class_name")) not in CLASSES:
        raise ModelError(f"{file}: _class_name is {name!r}; only {' and '.join(CLASSES)} are supported")
    c: WanVaeConfig = pick(config, WanVaeConfig, file)
    if c.attn_scales:
        raise ModelError(f"{file}: attn_scales: {c.attn_scales} is not supported; only []")
    if c.input_channels != 3:
        raise ModelError(f"{file}: input_channels: {c.input_channels} is not supported; only 3")
    return c
