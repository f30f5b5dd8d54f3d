"""Z-Image and Z-Image-Turbo (Z-Image Team 2025, https://arxiv.org/abs/2511.22699).

S3-DiT: some blocks refine the picture and some the text, then blocks see both as one sequence. The attribute names of
the transformer are the keys of the diffusers checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, ClassVar

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgld.errors import ModelError, NotBuilt
from sgld.models import names
from sgld.models.base import DiffusionModel, EncodedText, EncodeRequest, Schedule
from sgld.models.components import NO_TRUE_CFG, Component, ComponentLoader
from sgld.models.hf_components import Autoencoder, text_encoder, tokenizer
from sgld.nn.attention import Backend
from sgld.nn.blocks import ComputeModule, DiffusionTransformer, sinusoid
from sgld.nn.parallel import Mesh
from sgld.nn.rope import rope_at, rotate
from sgld.nn.runner import StepContext
from sgld.nn.usp import SequenceAttention
from sgld.nn.weights import Architecture
from sgld.params import Memory, ModelInfo, PictureRule, SamplingParams

# ---------------------------------------------------------------------------------------------- transformer

MULTIPLE = 32  # learned tokens fill picture and text up to a multiple of this; attention sees them
TIME_DIM, TIME_HIDDEN = 256, 1024
NORM_EPS = 1e-5  # of queries and keys

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [1, S, H, D] to [1, S, H, D]


@attrs.frozen
class ZImageConfig(Architecture):
    """Architecture numbers, as in transformer/config.json."""

    supported: ClassVar[Mapping[str, object]] = {"qk_norm": True}

    dim: int
    n_layers: int
    n_refiner_layers: int
    n_heads: int
    in_channels: int
    cap_feat_dim: int
    axes_dims: list[int]
    axes_lens: list[int]
    n_kv_heads: int | None = None
    all_patch_size: list[int] = attrs.field(factory=lambda: [2])
    all_f_patch_size: list[int] = attrs.field(factory=lambda: [1])
    norm_eps: float = 1e-5
    qk_norm: bool = True
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    siglip_feat_dim: int | None = None

    @property
    def num_attention_heads(self) -> int:
        return self.n_heads

    @property
    def attention_head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def patch(self) -> int:
        """Return the side of a token, in latents."""
        return self.all_patch_size[0]

    @property
    def time_dim(self) -> int:
        """Return the channels of the time embedding."""
        return min(self.dim, TIME_DIM)

    @property
    def hidden(self) -> int:
        """Return the hidden channels of the feed-forward layers."""
        return int(self.dim / 3 * 8)

    @property
    def max_text(self) -> int:
        """Return the most text tokens, filled up, that leave the picture room on the first axis."""
        return (self.axes_lens[0] - 2) // MULTIPLE * MULTIPLE

    def fault(self) -> str | None:
        if len(self.all_patch_size) != 1 or self.all_f_patch_size != [1]:
            return "all_patch_size and all_f_patch_size must hold one size each, the latter 1"
        if self.n_kv_heads not in (None, self.n_heads):
            return f"n_kv_heads is {self.n_kv_heads!r}; only {self.n_heads!r} is supported"
        if self.dim % self.n_heads or sum(self.axes_dims) != self.attention_head_dim:
            channels = f"the {self.dim} / {self.n_heads} channels of a head"
            return f"axes_dims: {self.axes_dims} do not add up to {channels}"
        return None


class ZImageAttention(nn.Module):
    """Attention of tokens to each other, with rotated and normalized queries and keys."""

    def __init__(self, c: ZImageConfig):
        super().__init__()
        self.heads = c.n_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(c.dim, c.dim, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(c.dim, c.dim, bias=False)])
        self.norm_q, self.norm_k = (nn.RMSNorm(c.dim // c.n_heads, NORM_EPS) for _ in range(2))

    def forward(self, x: Tensor, rope: Tensor, attend: Attend) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.to_q, self.to_k, self.to_v))
        y = attend(rotate(self.norm_q(q), rope), rotate(self.norm_k(k), rope), v)
        return self.to_out[0](y.flatten(2))  # type: ignore[no-any-return]


class GatedFeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # type: ignore[no-any-return]


class ZImageBlock(nn.Module):
    """Attention and a feed-forward layer between norms; where `modulated`, the time scales and gates both."""

    def __init__(self, c: ZImageConfig, modulated: bool = True):
        super().__init__()
        self.attention = ZImageAttention(c)
        self.feed_forward = GatedFeedForward(c.dim, c.hidden)
        self.attention_norm1, self.attention_norm2 = nn.RMSNorm(c.dim, c.norm_eps), nn.RMSNorm(c.dim, c.norm_eps)
        self.ffn_norm1, self.ffn_norm2 = nn.RMSNorm(c.dim, c.norm_eps), nn.RMSNorm(c.dim, c.norm_eps)
        self.adaLN_modulation = nn.ModuleList([nn.Linear(c.time_dim, 4 * c.dim)]) if modulated else None

    def forward(self, x: Tensor, rope: Tensor, attend: Attend, emb: Tensor | None = None) -> Tensor:
        """Return x [1, S, C] after both; emb [1, E]."""
        scale, gate, ff_scale, ff_gate = self.modulation(emb)
        x = x + gate * self.attention_norm2(self.attention(self.attention_norm1(x) * scale, rope, attend))
        return x + ff_gate * self.ffn_norm2(self.feed_forward(self.ffn_norm1(x) * ff_scale))  # type: ignore[no-any-return]

    def modulation(self, emb: Tensor | None) -> tuple[Tensor | float, ...]:
        """Return scale and gate [1, 1, C] of the attention, and of the feed-forward layer."""
        if self.adaLN_modulation is None:
            return 1.0, 1.0, 1.0, 1.0
        scale, gate, ff_scale, ff_gate = self.adaLN_modulation[0](emb)[:, None].chunk(4, -1)
        return 1 + scale, gate.tanh(), 1 + ff_scale, ff_gate.tanh()


class ZImageTimeEmbedder(ComputeModule):
    """The embedding [1, E] of a time."""

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_DIM, TIME_HIDDEN), nn.SiLU(), nn.Linear(TIME_HIDDEN, dim))

    def forward(self, t: Tensor) -> Tensor:
        """Embed t [1] in [0, 1000]."""
        return self.mlp(sinusoid(t, TIME_DIM).to(self.compute_dtype))  # type: ignore[no-any-return]


class ZImageFinalLayer(nn.Module):
    """Layer norm without weights, scaled by the time, and the way back to patches."""

    def __init__(self, c: ZImageConfig):
        super().__init__()
        self.linear = nn.Linear(c.dim, c.patch**2 * c.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.time_dim, c.dim))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return self.linear(normed * (1 + self.adaLN_modulation(emb)[:, None]))  # type: ignore[no-any-return]


class ZImageTransformer(DiffusionTransformer):
    """Predicts the flow from noise to the picture."""

    def __init__(self, c: ZImageConfig, mesh: Mesh, backend: Backend):
        super().__init__()
        self.config, self.mesh = c, mesh
        self.among, self.backend = SequenceAttention(mesh, backend), backend
        self.kind = f"{c.patch}-1"
        self.all_x_embedder = nn.ModuleDict({self.kind: nn.Linear(c.patch**2 * c.in_channels, c.dim)})
        self.all_final_layer = nn.ModuleDict({self.kind: ZImageFinalLayer(c)})
        self.t_embedder = ZImageTimeEmbedder(c.time_dim)
        self.cap_embedder = nn.Sequential(nn.RMSNorm(c.cap_feat_dim, c.norm_eps), nn.Linear(c.cap_feat_dim, c.dim))
        self.x_pad_token, self.cap_pad_token = (nn.Parameter(torch.empty(1, c.dim)) for _ in range(2))
        self.noise_refiner = nn.ModuleList(ZImageBlock(c) for _ in range(c.n_refiner_layers))
        self.context_refiner = nn.ModuleList(ZImageBlock(c, modulated=False) for _ in range(c.n_refiner_layers))
        self.layers = nn.ModuleList(ZImageBlock(c) for _ in range(c.n_layers))

    def refine_text(self, text: Tensor) -> Tensor:
        """Refine text [1, n, C] to [1, L, C], filled up to a multiple of 32 tokens; no step changes it."""
        h = filled(self.cap_embedder(text.to(self.compute_dtype)), self.cap_pad_token)
        rope, _ = self._ropes(h.shape[1], (0, 0), h.device)
        for block in self.context_refiner:
            h = block(h, rope, self._alone)
        return h

    def forward(self, x: Tensor, t: Tensor, text: Tensor, step: StepContext) -> Tensor:
        """Predict for latents x [1, C, 1, h, w] and refined text [1, L, C]; t is 0 for noise and 1 for the picture."""
        p, split = self.config.patch, self.mesh.tokens
        grid = x.shape[-2] // p, x.shape[-1] // p
        text_rope, rope = self._ropes(text.shape[1], grid, x.device)
        emb = self.t_embedder(t.view(1).to(x.device) * self.config.t_scale)
        h = filled(self.all_x_embedder[self.kind](patches(x.to(self.compute_dtype), p)), self.x_pad_token)
        tokens = h.shape[1]
        h, rope = split.shard(h, 1), split.shard(rope, 0)
        own = h.shape[1]
        h = self._run(self.noise_refiner, h, rope, partial(self.among, tokens=tokens), emb, step)
        attend = self._alone if split.size == 1 else partial(self._joined, own=own, tokens=tokens)
        h = self._run(self.layers, torch.cat([h, text], 1), torch.cat([rope, text_rope]), attend, emb, step)
        h = split.gather(self.all_final_layer[self.kind](h[:, :own], emb), 1, tokens)
        return picture(h[:, : grid[0] * grid[1]], grid, p)

    def _run(
        self, blocks: nn.ModuleList, h: Tensor, rope: Tensor, attend: Attend, emb: Tensor, step: StepContext
    ) -> Tensor:
        return self.runner.run(blocks, h, lambda block, hidden: block(hidden, rope, attend, emb), step)

    def _alone(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend among tokens that are all on this rank."""
        return self.backend.attend(q, k, v, None)

    def _joined(self, q: Tensor, k: Tensor, v: Tensor, own: int, tokens: int) -> Tensor:
        """Attend from `own` of the picture's `tokens`, and after them the text's, which every rank has."""
        text = q[:, own:], k[:, own:], v[:, own:]
        return torch.cat(self.among.joint(q[:, :own], k[:, :own], v[:, :own], tokens, text), 1)

    def _ropes(self, text: int, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        return ropes(text, grid, tuple(self.config.axes_dims), self.config.rope_theta, device)


def filled(x: Tensor, token: Tensor) -> Tensor:
    """Fill x [1, S, C] up with `token` [1, C] to a multiple of 32 tokens."""
    return torch.cat([x, token.expand(1, -x.shape[1] % MULTIPLE, -1)], 1)


@lru_cache(maxsize=4)
def ropes(
    text: int, grid: tuple[int, int], dims: tuple[int, ...], theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return rotations [L, D/2] of the text, which goes along the first axis, and [S, D/2] of the picture behind it.

    Tokens that fill the picture up stand at the origin.
    """
    steps = torch.arange(1, text + 1, device=device)
    row, column = (torch.arange(n, device=device) for n in grid)
    place = torch.cartesian_prod(torch.tensor([text + 1], device=device), row, column)
    place = F.pad(place, (0, 0, 0, -len(place) % MULTIPLE))
    return rope_at(F.pad(steps[:, None], (0, 2)), dims, theta), rope_at(place, dims, theta)


def patches(x: Tensor, p: int) -> Tensor:
    """Cut latents [1, C, 1, h, w] into tokens [1, h/p * w/p, p*p*C]."""
    _, C, _, h, w = x.shape
    return x.view(C, h // p, p, w // p, p).permute(1, 3, 2, 4, 0).reshape(1, -1, p * p * C)


def picture(h: Tensor, grid: tuple[int, int], p: int) -> Tensor:
    """Join tokens to latents, as `patches` cut them."""
    rows, columns = grid
    x = h.view(rows, columns, p, p, -1).permute(4, 0, 2, 1, 3)
    return x.reshape(1, -1, 1, rows * p, columns * p)


# --------------------------------------------------------------------------------------------- text encoder


@attrs.frozen
class ZImageText:
    """Qwen3's states [1, n, C] of a prompt in its chat template, as they go into the last layer."""

    tokenizer: Any
    module: Any
    component = "text_encoder"

    @classmethod
    def load(cls, parts: ComponentLoader) -> ZImageText:
        """Load text_encoder and tokenizer."""
        from transformers import Qwen3Model

        words = tokenizer(parts, "tokenizer")
        if not words.chat_template:
            raise ModelError(f"{parts.path('tokenizer')}: the tokenizer has no chat_template")
        return cls(words, text_encoder(parts, cls.component, Qwen3Model, "layers", states_before_last))

    def encode(self, name: str, prompt: str, request: EncodeRequest) -> EncodedText:
        """Encode a prompt without padding, which changes nothing: the encoder is causal."""
        messages = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        ids, length = self.tokenizer(text).input_ids, request.params.max_sequence_length
        if len(ids) > length:
            allowed = f"{length} tokens, the most this request allows"
            request.notes.append(f"{name.replace('_', ' ')} cut from {len(ids)} to {allowed}")
        cut = torch.tensor([ids[:length]], device=self.module.device)
        states = self.module(input_ids=cut, use_cache=False).last_hidden_state
        return EncodedText(states, states.shape[1])


def states_before_last(encoder: Any) -> nn.Module:
    """Remove the last layer and the norm of a text encoder."""
    encoder.layers, encoder.norm = encoder.layers[:-1], nn.Identity()
    return encoder  # type: ignore[no-any-return]


# -------------------------------------------------------------------------------------------------- family

TASKS = ("text-to-image", "image-to-image")
TEXT_TOKENS = 512
TURBO_SHIFT = 3.0  # the base model's schedule is shifted by 6

COMMON = {"negative_prompt": "", "max_sequence_length": TEXT_TOKENS}
BASE = COMMON | {
    "width": 1280, "height": 720, "num_inference_steps": 50, "guidance_scale": 5.0, "cfg_normalization": 1.0,
}  # fmt: skip
TURBO = COMMON | {"width": 1024, "height": 1024, "num_inference_steps": 9, "guidance_scale": 0.0}


class ZImage(DiffusionModel):
    """ZImagePipeline checkpoints. Pictures are where denoising begins; the transformer reads none."""

    architecture = Component(
        ZImageTransformer,
        ZImageConfig,
        ("noise_refiner", "layers"),  # the text is refined once for all steps
        crosses=False,
    )
    lora_names = names.Z_IMAGE

    config: ZImageConfig
    vae: Autoencoder

    def known_defaults(self) -> Mapping[str, Any]:
        return TURBO if self.scheduler.get("shift") == TURBO_SHIFT else BASE

    def load_components(self) -> None:
        from diffusers import AutoencoderKL

        if self.config.siglip_feat_dim is not None:
            file = self.parts.path("transformer") / "config.json"
            raise NotBuilt(f"{file}: siglip_feat_dim: a transformer that looks at pictures (Omni) is not built yet")
        self.text = ZImageText.load(self.parts)
        self.text_encoders = (self.text,)
        levels = len(self.parts.config("vae").get("block_out_channels", [0]))
        self.vae = Autoencoder(self.parts, AutoencoderKL, 2 ** (levels - 1))
        self.scale: float = self.vae.module.config.scaling_factor
        self.shift: float = self.vae.module.config.shift_factor or 0.0

    def widths(self) -> tuple[tuple[int, int], Sequence[tuple[int, int]]]:
        c = self.config
        return (c.in_channels, self.vae.config["latent_channels"]), (
            (c.cap_feat_dim, self.text.module.config.hidden_size),
        )

    @property
    def patch(self) -> Sequence[int]:
        return 1, self.config.patch, self.config.patch

    def latent_shape(self, params: SamplingParams) -> tuple[int, ...]:
        side = self.vae.spatial
        return 1, self.config.in_channels, 1, params.height // side, params.width // side

    def encode_frames(self, frames: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        self.parts.offloader.need("vae")
        raise_if_cancelled()
        return ((self.vae.encode(frames).float() - self.shift) * self.scale)[:, :, None]

    def branch(self, texts: Sequence[EncodedText], pictures: None, params: SamplingParams) -> Tensor:
        return texts[0].states

    def schedule(self, params: SamplingParams, x: Tensor) -> Schedule:
        return self.shifted_by_length(params, self.latent_tokens(params))

    def guidance_scale(self, params: SamplingParams) -> float:
        return 1 + params.guidance_scale  # this model's counts from the prompt's prediction: p + g (p - n)

    def forward(self, x: Tensor, t: Tensor, branch: Tensor, step: StepContext) -> Tensor:
        name = f"refined text {step.branch}"
        if name not in step.store:
            step.store[name] = self.transformer.refine_text(branch)
        return -self.transformer(x, (1000 - t) / 1000, step.store[name], step)  # type: ignore[no-any-return]

    def guide(self, positive: Tensor, negative: Tensor, scale: float, params: SamplingParams) -> Tensor:
        """Guide, and bound the norm of the guided velocity by a multiple of the prompt's."""
        v = super().guide(positive, negative, scale, params)
        if params.cfg_normalization:
            bound = params.cfg_normalization * torch.linalg.vector_norm(positive.float())
            v = v * (bound / torch.linalg.vector_norm(v)).clamp(max=1)
        return v

    def decode_latents(self, x: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        return self.vae.decode(x[:, :, 0].to(self.vae.dtype) / self.scale + self.shift, raise_if_cancelled)

    def describe(self) -> ModelInfo:
        takes_pictures = self.parts.settings.memory.vae_config.load_encoder
        return self.model_info(
            kind="image",
            defaults=self.defaults,
            size_multiple=self.vae.spatial * self.config.patch,
            frame_multiple=1,
            unguided=0.0,
            pictures=PictureRule(max=int(takes_pictures)),
            unsupported=NO_TRUE_CFG,
            tasks=TASKS if takes_pictures else TASKS[:1],
            max_tokens=self.config.max_text,
            memory=self.memory(),
        )

    def memory(self) -> Memory:
        """Estimate: 12 copies of the latents; 6 numbers a pixel while the picture is made, and its 3 bytes."""
        c, text = self.config, self.text.module
        block = self.parts.token_bytes(c.dim, c.hidden, self.transformer.compute_dtype)
        return self.parts.memory(
            self.vae.tiling,
            base=2**26 + TEXT_TOKENS * block,
            text_pair=4 * text.config.num_attention_heads * text.dtype.itemsize,
            token=block + 48 * c.in_channels * c.patch**2,
            pixel=27,
            chunk_pixel=self.vae.pixel_bytes,
        )
