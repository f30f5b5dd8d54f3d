"""The transformer of LTX-2 and LTX-2.3: two streams, video and audio, that attend to each other in every block.

LTX-2 (HaCohen et al. 2026, https://arxiv.org/abs/2601.03233). The attribute names are the keys of the diffusers
checkpoint. Below, x is of the video and y of the audio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgld.nn.attention import Attention, Backend
from sgld.nn.blocks import DiffusionTransformer, Embedder, FeedForward, TimestepEmbedder, gelu_tanh
from sgld.nn.parallel import Mesh
from sgld.nn.runner import StepContext
from sgld.nn.usp import SequenceAttention
from sgld.nn.weights import Architecture

TIME_CHANNELS = 256  # of the sinusoidal embedding of a time


@attrs.frozen
class LTX2Config(Architecture):
    """Architecture numbers, as in transformer/config.json."""

    supported: ClassVar[Mapping[str, object]] = {
        "activation_fn": "gelu-approximate", "qk_norm": "rms_norm_across_heads", "norm_elementwise_affine": False,
        "attention_bias": True, "attention_out_bias": True, "patch_size": 1, "patch_size_t": 1, "audio_patch_size": 1,
        "audio_patch_size_t": 1, "ff_bias": True, "audio_ff_bias": True, "use_prompt_adaln_single": True,
        "use_keyframes_abs_pos_embedding": False,
    }  # fmt: skip

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
        """Return the channels of a video token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def audio_dim(self) -> int:
        """Return the channels of an audio token."""
        return self.audio_num_attention_heads * self.audio_attention_head_dim

    @property
    def audio_rate(self) -> float:
        """Return the audio tokens a second."""
        return self.audio_sampling_rate / self.audio_hop_length / self.audio_scale_factor

    def fault(self) -> str | None:
        if self.rope_type not in ("split", "interleaved"):
            return f"rope_type is {self.rope_type!r}; only 'split' and 'interleaved' are supported"
        for name in ("num_attention_heads", "cross_attn_mod"):
            own, audio = getattr(self, name), getattr(self, f"audio_{name}")
            if own != audio:
                return f"{name} is {own} and audio_{name} {audio}; only equal ones are supported"
        return None


# ----------------------------------------------------------------------------------------- layout and positions


@attrs.frozen
class LatentLayout:
    """The order of latents [1, N]: video tokens, frame by frame, then audio tokens."""

    grid: tuple[int, int, int]  # of the video in time, height and width
    length: int  # of the audio
    channels: int
    audio_channels: int
    fps: float

    @property
    def tokens(self) -> int:
        """Count the tokens of the video."""
        return math.prod(self.grid)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split [k, N] into the video's and the audio's numbers."""
        n = self.tokens * self.channels
        return x[:, :n], x[:, n:]

    def streams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split [1, N] into video tokens [1, S, C] and audio tokens [1, A, C]."""
        video, audio = self.split(x)
        return video.view(1, -1, self.channels), audio.view(1, -1, self.audio_channels)

    def video(self, x: Tensor) -> Tensor:
        """Return the video's latents [1, C, T, h, w]."""
        return self.streams(x)[0].mT.reshape(1, self.channels, *self.grid)


@attrs.frozen
class LTX2Inputs:
    """The inputs of one guidance branch beside the noise."""

    text: Tensor  # [1, L, C], for the video
    audio_text: Tensor  # [1, L, C], for the audio
    layout: LatentLayout
    clean: int = 0  # so many of the first video tokens are a picture's
    perturbed: int | None = None  # the block that skips attention within each stream
    isolated: bool = False  # every block skips attention between the streams


@attrs.frozen
class StreamLayout:
    """The positions of one stream: rotations [S/n, H, D/2] of this rank's tokens, and the number of all tokens."""

    rope: Tensor
    across: Tensor  # towards the other stream, by time alone
    tokens: int


def video_positions(c: LTX2Config, grid: tuple[int, int, int], fps: float) -> Tensor:
    """Return the middle of each latent [S, 3] in seconds and pixels; the first frame is a latent by itself."""
    axes = []
    for length, scale in zip(grid, c.vae_scale_factors, strict=True):
        axes.append(torch.arange(length + 1, dtype=torch.float32) * scale)  # the bounds
    axes[0] = (axes[0] + c.causal_offset - c.vae_scale_factors[0]).clamp(min=0) / fps
    middles = [(bounds[:-1] + bounds[1:]) / 2 for bounds in axes]
    return torch.stack(torch.meshgrid(*middles, indexing="ij"), -1).flatten(0, 2)


def audio_positions(c: LTX2Config, length: int) -> Tensor:
    """Return the middle of each audio token [S, 1] in seconds."""
    bounds = torch.arange(length + 1, dtype=torch.float32) * c.audio_scale_factor
    bounds = (bounds + c.causal_offset - c.audio_scale_factor).clamp(min=0) * c.audio_hop_length / c.audio_sampling_rate
    return ((bounds[:-1] + bounds[1:]) / 2)[:, None]


def rotations(c: LTX2Config, positions: Tensor, most: Sequence[float], dim: int) -> Tensor:
    """Return complex numbers [S, H, dim/H/2] for positions [S, axes], of which `most` are the largest.

    Frequencies grow from pi/2 to theta pi/2 over all channels of all heads, their axes side by side; the channels
    left over do not turn. In float32, where the large angles are inexact, as the models were trained.
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
    """Turn pairs of one channel of a head's first half and one of its second; as `turn_neighbours`."""
    z = torch.complex(*x.float().chunk(2, -1)) * rope
    return torch.cat([z.real, z.imag], -1).type_as(x)


# ------------------------------------------------------------------------------------------------------- times


@attrs.frozen
class Moments:
    """The modulation of one stream: equal for every token, or one for clean tokens and one for the others."""

    rows: Tensor  # [1 or 2, P * C]
    which: Tensor | None  # [S/n], the row of each token; None: there is one

    def by(self, table: Tensor) -> tuple[Tensor, ...]:
        """Add a block's own table [P, C]: P tensors [1 or S/n, C]."""
        parts = (table + self.rows.view(len(self.rows), -1, table.shape[-1])).unbind(1)
        return parts if self.which is None else tuple(part[self.which] for part in parts)


@attrs.frozen
class LTX2Stream:
    """The inputs of a block for one of the two streams."""

    place: StreamLayout
    text: Tensor  # [1, L, C]
    own: Moments  # for itself: six parts, and three for its attention to the text
    prompt: Moments | None  # for the text
    cross: Moments  # for what the two streams exchange: four parts
    gate: Moments


class LTX2Modulation(nn.Module):
    """Embeds times for all blocks at once (Chen et al. 2023, https://arxiv.org/abs/2310.00426)."""

    def __init__(self, dim: int, parts: int):
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": TimestepEmbedder(TIME_CHANNELS, dim)})
        self.linear = nn.Linear(dim, parts * dim)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Embed times t [R] as [R, C], and as modulations [R, P * C]."""
        emb: Tensor = self.emb["timestep_embedder"](t)
        return emb, self.linear(F.silu(emb))

    def at(self, t: Tensor, which: Tensor | None = None) -> Moments:
        """Return the modulations at times t [R]."""
        return Moments(self(t)[1], which)


# ------------------------------------------------------------------------------------------------------ blocks


class LTX2Attention(nn.Module):
    """Queries from one sequence; keys and values from it, from the other stream or from the text."""

    def __init__(
        self, c: LTX2Config, dims: tuple[int, int, int], gated: bool, attend: Attention, among: SequenceAttention
    ):
        """Build for `dims`: the channels of queries' inputs, of keys' and values' inputs, and of all heads."""
        super().__init__()
        asks, asked, inner = dims
        self.heads, self.attend, self.among = c.num_attention_heads, attend, among
        self.turn = turn_halves if c.rope_type == "split" else turn_neighbours
        self.to_q, self.to_k, self.to_v = nn.Linear(asks, inner), nn.Linear(asked, inner), nn.Linear(asked, inner)
        self.norm_q, self.norm_k = nn.RMSNorm(inner, 1e-6), nn.RMSNorm(inner, 1e-6)
        self.to_out = nn.ModuleList([nn.Linear(inner, asks)])
        self.to_gate_logits = nn.Linear(asks, self.heads) if gated else None

    def to_itself(self, x: Tensor, place: StreamLayout, perturbed: bool) -> Tensor:
        """Attend within the stream; `perturbed`: every token to itself alone."""
        if perturbed:
            return self.join(self.split(self.to_v(x)), x)
        q, k, v = self.parts(x, x)
        return self.join(self.among(self.turn(q, place.rope), self.turn(k, place.rope), v, place.tokens), x)

    def to_text(self, x: Tensor, text: Tensor) -> Tensor:
        """Attend from x [1, S, C] to text [1, L, C]."""
        return self.join(self.attend(*self.parts(x, text), None), x)

    def to_other(self, x: Tensor, other: Tensor, place: StreamLayout, there: StreamLayout) -> Tensor:
        """Attend from one stream to the other."""
        q, k, v = self.parts(x, other)
        q, k = self.turn(q, place.across), self.turn(k, there.across)
        return self.join(self.among.across(q, k, v, there.tokens), x)

    def parts(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project to queries, keys and values [B, S, H, D]."""
        q, k = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(other))
        return self.split(q), self.split(k), self.split(self.to_v(other))

    def split(self, x: Tensor) -> Tensor:
        """Split channels into heads [B, S, H, D]."""
        return x.view(*x.shape[:-1], self.heads, -1)

    def join(self, y: Tensor, x: Tensor) -> Tensor:
        """Join the heads' outputs [B, S, H, D], each gated by the query's input x."""
        if self.to_gate_logits is not None:
            y = y * (2 * torch.sigmoid(self.to_gate_logits(x)))[..., None]
        return self.to_out[0](y.flatten(2))  # type: ignore[no-any-return]


class LTX2Block(nn.Module):
    """Both streams: attention to itself, to the text and to the other, and a feed-forward layer."""

    def __init__(self, c: LTX2Config, index: int, attend: Attention, among: SequenceAttention):
        super().__init__()
        self.index = index
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
        self, x: Tensor, y: Tensor, video: LTX2Stream, audio: LTX2Stream, perturbed: bool, isolated: bool
    ) -> tuple[Tensor, Tensor]:
        """Apply to x [1, S/n, C] and y [1, A/n, C]; `perturbed`: no attention in a stream, `isolated`: none between."""
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

    def ask(
        self, attention: LTX2Attention, x: Tensor, stream: LTX2Stream, mod: Sequence[Tensor], table: Tensor
    ) -> Tensor:
        """Attend to the text, both sides modulated."""
        assert stream.prompt is not None
        shift, scale = stream.prompt.by(table)
        return mod[2] * attention.to_text(self.modulate(x, mod[0], mod[1]), stream.text * (1 + scale) + shift)

    def exchange(self, x: Tensor, y: Tensor, video: LTX2Stream, audio: LTX2Stream) -> tuple[Tensor, Tensor]:
        """Attend from each stream to the other."""
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
        """Normalize without weights."""
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)

    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Normalize, scale and shift."""
        return scaled(self.norm(x), scale, shift)


def scaled(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return (1 + scale) x + shift."""
    return x * (1 + scale) + shift


# ------------------------------------------------------------------------------------------------- transformer


class LTX2Transformer(DiffusionTransformer):
    """Predicts the velocities of video and audio tokens."""

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
        self.time_embed, self.audio_time_embed = LTX2Modulation(x, parts), LTX2Modulation(y, parts)
        self.av_cross_attn_video_scale_shift = LTX2Modulation(x, 4)
        self.av_cross_attn_audio_scale_shift = LTX2Modulation(y, 4)
        self.av_cross_attn_video_a2v_gate = LTX2Modulation(x, 1)
        self.av_cross_attn_audio_v2a_gate = LTX2Modulation(y, 1)
        if c.cross_attn_mod:
            self.prompt_adaln, self.audio_prompt_adaln = LTX2Modulation(x, 2), LTX2Modulation(y, 2)
        among, attend = SequenceAttention(mesh, backend), (cross or backend).attend
        self.transformer_blocks = nn.ModuleList(LTX2Block(c, i, attend, among) for i in range(c.num_layers))
        self.scale_shift_table = nn.Parameter(torch.empty(2, x))
        self.audio_scale_shift_table = nn.Parameter(torch.empty(2, y))
        self.proj_out, self.audio_proj_out = nn.Linear(x, c.out_channels), nn.Linear(y, c.audio_out_channels)

    def places(self, layout: LatentLayout) -> tuple[StreamLayout, StreamLayout]:
        """Return the positions of video and audio tokens."""
        c = self.config
        video, audio = video_positions(c, layout.grid, layout.fps), audio_positions(c, layout.length)
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

    def forward(self, x: Tensor, y: Tensor, t: Tensor, inputs: LTX2Inputs, step: StepContext) -> tuple[Tensor, Tensor]:
        """Predict for video tokens x [1, S, C] and audio tokens y [1, A, C]; t in [0, 1000], 0 for clean tokens."""
        if "places" not in step.store:
            step.store["places"] = self.places(inputs.layout)
        places, clean = step.store["places"], inputs.clean
        split = self.mesh.tokens
        t = t.view(1).to(x.device)
        which = split.shard((torch.arange(x.shape[1], device=x.device) >= clean).long(), 0) if clean else None
        times = torch.cat([torch.zeros_like(t), t]) if clean else t
        emb, mod = self.time_embed(times)
        sound_emb, sound_mod = self.audio_time_embed(t)
        video, audio = self._streams(times, t, inputs, places, Moments(mod, which), Moments(sound_mod, None))
        h = split.shard(self.proj_in(x.to(self.compute_dtype)), 1)  # [1, S/n, C]
        g = split.shard(self.audio_proj_in(y.to(self.compute_dtype)), 1)  # [1, A/n, C]

        def call(block: nn.Module, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return block(*hidden, video, audio, block.index == inputs.perturbed, inputs.isolated)  # type: ignore[no-any-return]

        h, g = self.runner.run(self.transformer_blocks, (h, g), call, step)
        h = self._out(h, self.scale_shift_table, Moments(emb.repeat(1, 2), which), self.proj_out)
        g = self._out(g, self.audio_scale_shift_table, Moments(sound_emb.repeat(1, 2), None), self.audio_proj_out)
        return split.gather(h, 1, x.shape[1]), split.gather(g, 1, y.shape[1])

    def _streams(
        self,
        times: Tensor,
        t: Tensor,
        inputs: LTX2Inputs,
        places: tuple[StreamLayout, StreamLayout],
        own: Moments,
        sound: Moments,
    ) -> tuple[LTX2Stream, LTX2Stream]:
        """Return the inputs of all blocks. In LTX-2.3 the other stream's time modulates what the streams exchange."""
        c, which = self.config, own.which
        text, audio_text = inputs.text.to(self.compute_dtype), inputs.audio_text.to(self.compute_dtype)
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
            LTX2Stream(places[0], text, own, prompt, cross, gate),
            LTX2Stream(places[1], audio_text, sound, audio_prompt, audio_cross, audio_gate),
        )

    def _out(self, h: Tensor, table: Tensor, moments: Moments, project: Callable[[Tensor], Tensor]) -> Tensor:
        shift, scale = moments.by(table)
        return project(scaled(F.layer_norm(h, h.shape[-1:], eps=1e-6), scale, shift))
