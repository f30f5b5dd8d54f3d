"""The transformer of LTX-2 and LTX-2.3: two streams, video and audio, that attend to each other in every block.

LTX-2 (HaCohen et al. 2026, https://arxiv.org/abs/2601.03233). The attribute names are the keys of the diffusers
checkpoint. Below, x is of the video and y of the audio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgld.errors import ModelError
from sgld.nn.attention import Attention, Backend
from sgld.nn.blocks import Denoiser, Embedder, FeedForward, gelu_tanh, sinusoid
from sgld.nn.parallel import Mesh
from sgld.nn.usp import SequenceAttention
from sgld.nn.weights import pick, read_json, require

TIME_CHANNELS = 256  # of the sinusoidal embedding of a time
ONLY = {
    "activation_fn": "gelu-approximate", "qk_norm": "rms_norm_across_heads", "norm_elementwise_affine": False,
    "attention_bias": True, "attention_out_bias": True, "patch_size": 1, "patch_size_t": 1, "audio_patch_size": 1,
    "audio_patch_size_t": 1, "ff_bias": True, "audio_ff_bias": True, "use_prompt_adaln_single": True,
    "use_keyframes_abs_pos_embedding": False,
}  # fmt: skip


@attrs.frozen
class LTX2Config:
    """Architecture numbers, as in transformer/config.json."""

    num_attention_heads: int
    attention_head_dim: int
    cross_attention_dim: int
    in_channels: int
    out_channels: int
    num_layers: int
    audio_num_attention_heads: int
    audio_attention_head_dim: int
    audio_cross_attention_dim: int
    audio_in_channels: int
    audio_out_channels: int
    caption_channels: int = 3840
    vae_scale_factors: tuple[int, int, int] = attrs.field(default=(8, 32, 32), converter=tuple)
    pos_embed_max_pos: int = 20  # seconds
    base_height: int = 2048
    base_width: int = 2048
    audio_scale_factor: int = 4
    audio_pos_embed_max_pos: int = 20  # seconds
    audio_sampling_rate: int = 16000
    audio_hop_length: int = 160
    rope_type: str = "interleaved"
    rope_theta: float = 1e4
    rope_double_precision: bool = True
    causal_offset: int = 1
    timestep_scale_multiplier: int = 1000
    cross_attn_timestep_scale_multiplier: int = 1000
    norm_eps: float = 1e-6
    gated_attn: bool = False
    audio_gated_attn: bool = False
    cross_attn_mod: bool = False  # the time modulates the attention to the text too: LTX-2.3
    audio_cross_attn_mod: bool = False
    use_prompt_embeddings: bool = True
    perturbed_attn: bool = False

    @property
    def dim(self) -> int:
        """Channels of a video token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def audio_dim(self) -> int:
        """Channels of an audio token."""
        return self.audio_num_attention_heads * self.audio_attention_head_dim

    @property
    def audio_rate(self) -> float:
        """Audio tokens a second."""
        return self.audio_sampling_rate / self.audio_hop_length / self.audio_scale_factor


def ltx2_config(file: Path) -> LTX2Config:
    """The numbers of a transformer's config.json.

    Raises:
        ModelError: another architecture.
    """
    given = read_json(file)
    require(given, file, ONLY)
    config: LTX2Config = pick({key: value for key, value in given.items() if key not in ONLY}, LTX2Config, file)
    if config.rope_type not in ("split", "interleaved"):
        raise ModelError(f"{file}: rope_type is {config.rope_type!r}; only 'split' and 'interleaved' are supported")
    for name in ("num_attention_heads", "cross_attn_mod"):
        own, audio = getattr(config, name), getattr(config, f"audio_{name}")
        if own != audio:
            raise ModelError(f"{file}: {name} is {own} and audio_{name} {audio}; only equal ones are supported")
    return config


# ------------------------------------------------------------------------------------------------------ places


@attrs.frozen
class StreamLayout:
    """Where the tokens of one stream stand: rotations [S/n, H, D/2] of this rank's, and how many there are in all."""

    rope: Tensor
    across: Tensor  # towards the other stream, by time alone
    tokens: int


def video_positions(c: LTX2Config, grid: tuple[int, int, int], fps: float) -> Tensor:
    """The middle of each latent pixel [S, 3] in seconds and pixels; the first frame of a clip is a latent by itself."""
    axes = []
    for length, scale in zip(grid, c.vae_scale_factors, strict=True):
        axes.append(torch.arange(length + 1, dtype=torch.float32) * scale)  # the bounds
    axes[0] = (axes[0] + c.causal_offset - c.vae_scale_factors[0]).clamp(min=0) / fps
    middles = [(bounds[:-1] + bounds[1:]) / 2 for bounds in axes]
    return torch.stack(torch.meshgrid(*middles, indexing="ij"), -1).flatten(0, 2)


def audio_positions(c: LTX2Config, length: int) -> Tensor:
    """The middle of each audio token [S, 1] in seconds."""
    bounds = torch.arange(length + 1, dtype=torch.float32) * c.audio_scale_factor
    bounds = (bounds + c.causal_offset - c.audio_scale_factor).clamp(min=0) * c.audio_hop_length / c.audio_sampling_rate
    return ((bounds[:-1] + bounds[1:]) / 2)[:, None]


def rotations(c: LTX2Config, positions: Tensor, most: Sequence[float], dim: int) -> Tensor:
    """Complex numbers [S, H, dim/H/2] for positions [S, axes] of which `most` are the largest.

    Frequencies grow from pi/2 to theta pi/2 over all channels of all heads, their axes side by side; what is left of
    the channels does not turn. In float32, where the large angles are inexact, as the models were trained.
    """
    count = dim // (2 * len(most))
    dtype = torch.float64 if c.rope_double_precision else torch.float32
    frequency = (c.rope_theta ** torch.linspace(0, 1, count, dtype=dtype) * math.pi / 2).float()
    places = torch.stack([p / m for p, m in zip(positions.T, most, strict=True)], -1)
    angle = ((2 * places - 1)[..., None] * frequency).mT.flatten(1)  # [S, count * axes]
    angle = F.pad(angle, (dim // 2 - angle.shape[1], 0))
    return torch.polar(torch.ones_like(angle), angle).view(len(angle), c.num_attention_heads, -1)


def turn_neighbours(x: Tensor, rope: Tensor) -> Tensor:
    """Turn pairs of neighbouring channels of x [B, S, H, D] by rope [S, H, D/2]."""
    z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(z * rope).flatten(-2).type_as(x)


def turn_halves(x: Tensor, rope: Tensor) -> Tensor:
    """Turn the pairs that a head's first and second half of channels make; as `turn_neighbours`."""
    z = torch.complex(*x.float().chunk(2, -1)) * rope
    return torch.cat([z.real, z.imag], -1).type_as(x)


# ------------------------------------------------------------------------------------------------------- times


@attrs.frozen
class Moments:
    """Modulation of one stream: of every token alike, or of those that are clean already and of the others."""

    rows: Tensor  # [1 or 2, P * C]
    which: Tensor | None  # [S/n], the row of each token; None: there is one

    def by(self, table: Tensor) -> tuple[Tensor, ...]:
        """With a block's own table [P, C]: P tensors [1 or S/n, C]."""
        parts = (table + self.rows.view(len(self.rows), -1, table.shape[-1])).unbind(1)
        return parts if self.which is None else tuple(part[self.which] for part in parts)


@attrs.frozen
class Stream:
    """What a block is told of one of the two streams."""

    place: StreamLayout
    text: Tensor  # [1, L, C]
    own: Moments  # for itself: six parts, and three for its attention to the text
    told: Moments | None  # of the text
    cross: Moments  # for what the two streams exchange: four parts
    gate: Moments


class TimeEmbedding(nn.Module):
    """Key `timestep_embedder`."""

    def __init__(self, dim: int):
        super().__init__()
        self.timestep_embedder = Embedder(TIME_CHANNELS, dim, F.silu)

    def forward(self, t: Tensor) -> Tensor:
        y: Tensor = self.timestep_embedder(sinusoid(t, TIME_CHANNELS).to(self.timestep_embedder.linear_1.weight.dtype))
        return y


class TimeModulation(nn.Module):
    """Times t [R] to embeddings [R, C] and modulations [R, P * C] (Chen et al. 2023, https://arxiv.org/abs/2310.00426)."""

    def __init__(self, dim: int, parts: int):
        super().__init__()
        self.emb = TimeEmbedding(dim)
        self.linear = nn.Linear(dim, parts * dim)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        emb: Tensor = self.emb(t)
        return emb, self.linear(F.silu(emb))

    def at(self, t: Tensor, which: Tensor | None = None) -> Moments:
        """The modulations at times t [R]."""
        return Moments(self(t)[1], which)


# ------------------------------------------------------------------------------------------------------ blocks


class LTX2Attention(nn.Module):
    """Queries from one sequence; keys and values from it, from the other stream or from the text."""

    def __init__(
        self, c: LTX2Config, dims: tuple[int, int, int], gated: bool, attend: Attention, among: SequenceAttention
    ):
        """`dims` are the channels of what asks, of what is asked, and of all heads."""
        super().__init__()
        asks, asked, inner = dims
        self.heads, self.attend, self.among = c.num_attention_heads, attend, among
        self.turn = turn_halves if c.rope_type == "split" else turn_neighbours
        self.to_q, self.to_k, self.to_v = nn.Linear(asks, inner), nn.Linear(asked, inner), nn.Linear(asked, inner)
        self.norm_q, self.norm_k = nn.RMSNorm(inner, 1e-6), nn.RMSNorm(inner, 1e-6)
        self.to_out = nn.ModuleList([nn.Linear(inner, asks)])
        self.to_gate_logits = nn.Linear(asks, self.heads) if gated else None

    def to_itself(self, x: Tensor, place: StreamLayout, perturbed: bool) -> Tensor:
        """`perturbed`: every token sees itself alone."""
        if perturbed:
            return self.join(self.split(self.to_v(x)), x)
        q, k, v = self.parts(x, x)
        return self.join(self.among(self.turn(q, place.rope), self.turn(k, place.rope), v, place.tokens), x)

    def to_text(self, x: Tensor, text: Tensor) -> Tensor:
        return self.join(self.attend(*self.parts(x, text), None), x)

    def to_other(self, x: Tensor, other: Tensor, place: StreamLayout, there: StreamLayout) -> Tensor:
        q, k, v = self.parts(x, other)
        q, k = self.turn(q, place.across), self.turn(k, there.across)
        return self.join(self.among.across(q, k, v, there.tokens), x)

    def parts(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(other))
        return self.split(q), self.split(k), self.split(self.to_v(other))

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1)  # [B, S, H, D]

    def join(self, y: Tensor, x: Tensor) -> Tensor:
        """The heads' outputs [B, S, H, D], each weighed by what asked."""
        if self.to_gate_logits is not None:
            y = y * (2 * torch.sigmoid(self.to_gate_logits(x)))[..., None]
        out: Tensor = self.to_out[0](y.flatten(2))
        return out


class LTX2Block(nn.Module):
    """Both streams: attention to itself, to the text and to the other, and a feed-forward layer."""

    def __init__(self, c: LTX2Config, attend: Attention, among: SequenceAttention):
        super().__init__()
        x, y = c.dim, c.audio_dim

        def attention(asks: int, asked: int, inner: int, gated: bool) -> LTX2Attention:
            return LTX2Attention(c, (asks, asked, inner), gated, attend, among)

        self.eps = c.norm_eps
        self.attn1 = attention(x, x, x, c.gated_attn)
        self.audio_attn1 = attention(y, y, y, c.audio_gated_attn)
        self.attn2 = attention(x, c.cross_attention_dim, x, c.gated_attn)
        self.audio_attn2 = attention(y, c.audio_cross_attention_dim, y, c.audio_gated_attn)
        self.audio_to_video_attn = attention(x, y, y, c.gated_attn)
        self.video_to_audio_attn = attention(y, x, y, c.audio_gated_attn)
        self.ff, self.audio_ff = FeedForward(x, 4 * x), FeedForward(y, 4 * y)
        parts = 9 if c.cross_attn_mod else 6
        self.scale_shift_table = nn.Parameter(torch.empty(parts, x))
        self.audio_scale_shift_table = nn.Parameter(torch.empty(parts, y))
        self.video_a2v_cross_attn_scale_shift_table = nn.Parameter(torch.empty(5, x))
        self.audio_a2v_cross_attn_scale_shift_table = nn.Parameter(torch.empty(5, y))
        self.modulates_text = c.cross_attn_mod
        if c.cross_attn_mod:
            self.prompt_scale_shift_table = nn.Parameter(torch.empty(2, x))
            self.audio_prompt_scale_shift_table = nn.Parameter(torch.empty(2, y))

    def forward(
        self, x: Tensor, y: Tensor, video: Stream, audio: Stream, perturbed: bool, isolated: bool
    ) -> tuple[Tensor, Tensor]:
        """x [1, S/n, C] and y [1, A/n, C]; `perturbed`: nothing attends to its own stream, `isolated`: to the other."""
        mod, sound = video.own.by(self.scale_shift_table), audio.own.by(self.audio_scale_shift_table)
        x = x + mod[2] * self.attn1.to_itself(self.modulate(x, *mod[:2]), video.place, perturbed)
        y = y + sound[2] * self.audio_attn1.to_itself(self.modulate(y, *sound[:2]), audio.place, perturbed)
        if self.modulates_text:
            x = x + self.ask(self.attn2, x, video, mod[6:], self.prompt_scale_shift_table)
            y = y + self.ask(self.audio_attn2, y, audio, sound[6:], self.audio_prompt_scale_shift_table)
        else:
            x = x + self.attn2.to_text(self.norm(x), video.text)
            y = y + self.audio_attn2.to_text(self.norm(y), audio.text)
        if not isolated:
            x, y = self.exchange(x, y, video, audio)
        x = x + mod[5] * self.ff(self.modulate(x, *mod[3:5]))
        y = y + sound[5] * self.audio_ff(self.modulate(y, *sound[3:5]))
        return x, y

    def ask(self, attention: LTX2Attention, x: Tensor, stream: Stream, mod: Sequence[Tensor], table: Tensor) -> Tensor:
        """Attention to the text, both sides modulated."""
        assert stream.told is not None
        shift, scale = stream.told.by(table)
        return mod[2] * attention.to_text(self.modulate(x, mod[0], mod[1]), stream.text * (1 + scale) + shift)

    def exchange(self, x: Tensor, y: Tensor, video: Stream, audio: Stream) -> tuple[Tensor, Tensor]:
        """Each stream attends to the other."""
        table, sound_table = self.video_a2v_cross_attn_scale_shift_table, self.audio_a2v_cross_attn_scale_shift_table
        mod, sound = video.cross.by(table[:4]), audio.cross.by(sound_table[:4])
        (gate,), (sound_gate,) = video.gate.by(table[4:]), audio.gate.by(sound_table[4:])
        u, v = self.norm(x), self.norm(y)
        to_video = self.audio_to_video_attn.to_other(
            scaled(u, *mod[:2]), scaled(v, *sound[:2]), video.place, audio.place
        )
        to_audio = self.video_to_audio_attn.to_other(
            scaled(v, *sound[2:]), scaled(u, *mod[2:]), audio.place, video.place
        )
        return x + gate * to_video, y + sound_gate * to_audio

    def norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)

    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return scaled(self.norm(x), scale, shift)


def scaled(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(1 + scale) x + shift"""
    return x * (1 + scale) + shift


# ------------------------------------------------------------------------------------------------- transformer


@attrs.frozen
class BranchInputs:
    """Text [1, L, C] for the video and for the audio; and where the tokens of both stand."""

    text: Tensor
    audio_text: Tensor
    video: StreamLayout
    audio: StreamLayout


class LTX2Transformer(Denoiser):
    """Velocities of video tokens x [1, S, C] and audio tokens y [1, A, C] at one time."""

    def __init__(self, c: LTX2Config, mesh: Mesh, backend: Backend, cross: Backend | None = None):
        super().__init__()
        self.config, self.mesh = c, mesh
        x, y = c.dim, c.audio_dim
        self.proj_in, self.audio_proj_in = nn.Linear(c.in_channels, x), nn.Linear(c.audio_in_channels, y)
        self.caption_projection = self.audio_caption_projection = None
        if c.use_prompt_embeddings:
            self.caption_projection = Embedder(c.caption_channels, x, gelu_tanh)
            self.audio_caption_projection = Embedder(c.caption_channels, y, gelu_tanh)
        parts = 9 if c.cross_attn_mod else 6
        self.time_embed, self.audio_time_embed = TimeModulation(x, parts), TimeModulation(y, parts)
        self.av_cross_attn_video_scale_shift = TimeModulation(x, 4)
        self.av_cross_attn_audio_scale_shift = TimeModulation(y, 4)
        self.av_cross_attn_video_a2v_gate = TimeModulation(x, 1)
        self.av_cross_attn_audio_v2a_gate = TimeModulation(y, 1)
        if c.cross_attn_mod:
            self.prompt_adaln, self.audio_prompt_adaln = TimeModulation(x, 2), TimeModulation(y, 2)
        among, attend = SequenceAttention(mesh, backend), (cross or backend).attend
        self.transformer_blocks = nn.ModuleList(LTX2Block(c, attend, among) for _ in range(c.num_layers))
        self.scale_shift_table = nn.Parameter(torch.empty(2, x))
        self.audio_scale_shift_table = nn.Parameter(torch.empty(2, y))
        self.proj_out, self.audio_proj_out = nn.Linear(x, c.out_channels), nn.Linear(y, c.audio_out_channels)

    def places(self, grid: tuple[int, int, int], length: int, fps: float) -> tuple[StreamLayout, StreamLayout]:
        """Of a video of `grid` latents in time, height and width, and of so many audio tokens."""
        c = self.config
        video, audio = video_positions(c, grid, fps), audio_positions(c, length)
        seconds = max(c.pos_embed_max_pos, c.audio_pos_embed_max_pos)
        most = (c.pos_embed_max_pos, c.base_height, c.base_width)
        return (
            self._place(rotations(c, video, most, c.dim), rotations(c, video[:, :1], [seconds], c.audio_dim)),
            self._place(
                rotations(c, audio, [c.audio_pos_embed_max_pos], c.audio_dim),
                rotations(c, audio, [seconds], c.audio_dim),
            ),
        )

    def _place(self, *ropes: Tensor) -> StreamLayout:
        rope, across = (self.mesh.tokens.shard(rope.to(self.mesh.device), 0) for rope in ropes)
        return StreamLayout(rope, across, len(ropes[0]))

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        t: Tensor,
        told: BranchInputs,
        clean: int = 0,
        perturbed: int | None = None,
        isolated: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """t in [0, 1000]; the first `clean` video tokens are at time 0, `perturbed` is the number of a block."""
        split = self.mesh.tokens
        t = t.view(1).to(x.device)
        which = split.shard((torch.arange(told.video.tokens, device=x.device) >= clean).long(), 0) if clean else None
        times = torch.cat([torch.zeros_like(t), t]) if clean else t
        emb, mod = self.time_embed(times)
        sound_emb, sound_mod = self.audio_time_embed(t)
        video, audio = self._streams(times, t, told, Moments(mod, which), Moments(sound_mod, None))
        h = split.shard(self.proj_in(x.to(self.dtype)), 1)  # [1, S/n, C]
        g = split.shard(self.audio_proj_in(y.to(self.dtype)), 1)  # [1, A/n, C]
        for i, block in enumerate(self._blocks):
            h, g = block(h, g, video, audio, i == perturbed, isolated)
        h = self._out(h, self.scale_shift_table, Moments(emb.repeat(1, 2), which), self.proj_out)
        g = self._out(g, self.audio_scale_shift_table, Moments(sound_emb.repeat(1, 2), None), self.audio_proj_out)
        return split.gather(h, 1, told.video.tokens), split.gather(g, 1, told.audio.tokens)

    def _streams(
        self, times: Tensor, t: Tensor, told: BranchInputs, own: Moments, sound: Moments
    ) -> tuple[Stream, Stream]:
        """What all blocks are told. In LTX-2.3 what the streams exchange is modulated by the time of the other."""
        c, which = self.config, own.which
        text, audio_text = told.text.to(self.dtype), told.audio_text.to(self.dtype)
        if self.caption_projection is not None and self.audio_caption_projection is not None:
            text, audio_text = self.caption_projection(text), self.audio_caption_projection(audio_text)
        prompt = audio_prompt = None
        if c.cross_attn_mod:
            times, which = t, None
            prompt, audio_prompt = self.prompt_adaln.at(t), self.audio_prompt_adaln.at(t)
        ratio = c.cross_attn_timestep_scale_multiplier / c.timestep_scale_multiplier
        cross = self.av_cross_attn_video_scale_shift.at(times, which)
        gate = self.av_cross_attn_video_a2v_gate.at(times * ratio, which)
        audio_cross = self.av_cross_attn_audio_scale_shift.at(t)
        audio_gate = self.av_cross_attn_audio_v2a_gate.at(t * ratio)
        return (
            Stream(told.video, text, own, prompt, cross, gate),
            Stream(told.audio, audio_text, sound, audio_prompt, audio_cross, audio_gate),
        )

    def _out(self, h: Tensor, table: Tensor, moments: Moments, project: Callable[[Tensor], Tensor]) -> Tensor:
        shift, scale = moments.by(table)
        return project(scaled(F.layer_norm(h, h.shape[-1:], eps=1e-6), scale, shift))

    @property
    def _blocks(self) -> Iterator[LTX2Block]:
        return self.walk(self.transformer_blocks)  # type: ignore[return-value]
