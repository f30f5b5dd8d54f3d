"""Z-Image and Z-Image-Turbo (Z-Image Team 2025, https://arxiv.org/abs/2511.22699).

S3-DiT: some blocks refine the picture and some the text, then blocks see both as one sequence. The attribute names of
the transformer are the keys of the diffusers checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Generator, Tensor, nn

from sgld.errors import ModelError, NotBuilt
from sgld.messages import Load
from sgld.models.base import Conditioning, NativeModel, Schedule
from sgld.models.components import NO_TRUE_CFG, ComponentLoader
from sgld.models.hf_components import Autoencoder, text_encoder, tokenizer
from sgld.nn.attention import Backend
from sgld.nn.blocks import Denoiser, sinusoid
from sgld.nn.lora_formats import Renames
from sgld.nn.parallel import Mesh
from sgld.nn.rope import rope_at, rotate
from sgld.nn.usp import SequenceAttention
from sgld.nn.weights import pick, read_json
from sgld.params import Memory, ModelInfo, PictureRule, SamplingParams
from sgld.platform import Platform

# ---------------------------------------------------------------------------------------------- transformer

MULTIPLE = 32  # learned tokens fill picture and text up to a multiple of this; attention sees them
TIME_DIM, TIME_HIDDEN = 256, 1024
NORM_EPS = 1e-5  # of queries and keys

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [1, S, H, D] to [1, S, H, D]


@attrs.frozen
class ZImageConfig:
    """Architecture numbers, as in transformer/config.json."""

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
    def patch(self) -> int:
        """Side of a token, in latent pixels."""
        return self.all_patch_size[0]

    @property
    def time_dim(self) -> int:
        """Channels of the embedding of the time."""
        return min(self.dim, TIME_DIM)

    @property
    def hidden(self) -> int:
        """Hidden channels of the feed-forward layers."""
        return int(self.dim / 3 * 8)

    @property
    def max_text(self) -> int:
        """Text tokens, filled up, that leave the picture a place on the first axis."""
        return (self.axes_lens[0] - 2) // MULTIPLE * MULTIPLE


class SelfAttention(nn.Module):
    def __init__(self, c: ZImageConfig):
        super().__init__()
        self.heads = c.n_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(c.dim, c.dim, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(c.dim, c.dim, bias=False)])
        self.norm_q, self.norm_k = (nn.RMSNorm(c.dim // c.n_heads, NORM_EPS) for _ in range(2))

    def forward(self, x: Tensor, rope: Tensor, attend: Attend) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.to_q, self.to_k, self.to_v))
        y = attend(rotate(self.norm_q(q), rope), rotate(self.norm_k(k), rope), v)
        z: Tensor = self.to_out[0](y.flatten(2))
        return z


class GatedFeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return y


class Block(nn.Module):
    """Attention and a feed-forward layer between norms; where `modulated`, the time scales and gates both."""

    def __init__(self, c: ZImageConfig, modulated: bool = True):
        super().__init__()
        self.attention = SelfAttention(c)
        self.feed_forward = GatedFeedForward(c.dim, c.hidden)
        self.attention_norm1, self.attention_norm2 = nn.RMSNorm(c.dim, c.norm_eps), nn.RMSNorm(c.dim, c.norm_eps)
        self.ffn_norm1, self.ffn_norm2 = nn.RMSNorm(c.dim, c.norm_eps), nn.RMSNorm(c.dim, c.norm_eps)
        self.adaLN_modulation = nn.ModuleList([nn.Linear(c.time_dim, 4 * c.dim)]) if modulated else None

    def forward(self, x: Tensor, rope: Tensor, attend: Attend, emb: Tensor | None = None) -> Tensor:
        """x [1, S, C], emb [1, E]"""
        scale, gate, ff_scale, ff_gate = self.modulation(emb)
        x = x + gate * self.attention_norm2(self.attention(self.attention_norm1(x) * scale, rope, attend))
        y: Tensor = x + ff_gate * self.ffn_norm2(self.feed_forward(self.ffn_norm1(x) * ff_scale))
        return y

    def modulation(self, emb: Tensor | None) -> tuple[Tensor | float, ...]:
        """Scale and gate [1, 1, C] of the attention, and of the feed-forward layer."""
        if self.adaLN_modulation is None:
            return 1.0, 1.0, 1.0, 1.0
        scale, gate, ff_scale, ff_gate = self.adaLN_modulation[0](emb)[:, None].chunk(4, -1)
        return 1 + scale, gate.tanh(), 1 + ff_scale, ff_gate.tanh()


class TimeEmbedder(nn.Module):
    """Times [1] to [1, E]."""

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_DIM, TIME_HIDDEN), nn.SiLU(), nn.Linear(TIME_HIDDEN, dim))

    def forward(self, t: Tensor) -> Tensor:
        y: Tensor = self.mlp(sinusoid(t, TIME_DIM).to(next(self.parameters()).dtype))
        return y


class FinalLayer(nn.Module):
    """Layer norm without weights, scaled by the time, and the way back to patches."""

    def __init__(self, c: ZImageConfig):
        super().__init__()
        self.linear = nn.Linear(c.dim, c.patch**2 * c.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.time_dim, c.dim))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        y: Tensor = self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + self.adaLN_modulation(emb)[:, None]))
        return y


class ZImageTransformer(Denoiser):
    """The flow from noise to the picture at latents x [1, C, 1, h, w], told by text that `read` has refined."""

    def __init__(self, c: ZImageConfig, mesh: Mesh, backend: Backend):
        super().__init__()
        self.config, self.mesh = c, mesh
        self.among, self.backend = SequenceAttention(mesh, backend), backend
        self.kind = f"{c.patch}-1"
        self.all_x_embedder = nn.ModuleDict({self.kind: nn.Linear(c.patch**2 * c.in_channels, c.dim)})
        self.all_final_layer = nn.ModuleDict({self.kind: FinalLayer(c)})
        self.t_embedder = TimeEmbedder(c.time_dim)
        self.cap_embedder = nn.Sequential(nn.RMSNorm(c.cap_feat_dim, c.norm_eps), nn.Linear(c.cap_feat_dim, c.dim))
        self.x_pad_token, self.cap_pad_token = (nn.Parameter(torch.empty(1, c.dim)) for _ in range(2))
        self.noise_refiner = nn.ModuleList(Block(c) for _ in range(c.n_refiner_layers))
        self.context_refiner = nn.ModuleList(Block(c, modulated=False) for _ in range(c.n_refiner_layers))
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layers))

    def read(self, text: Tensor) -> Tensor:
        """Text [1, n, C] to as many tokens as the blocks see, [1, L, C]: the same at every step."""
        h = filled(self.cap_embedder(text.to(self.dtype)), self.cap_pad_token)
        rope, _ = self._ropes(h.shape[1], (0, 0), h.device)
        for block in self.context_refiner:
            h = block(h, rope, self._alone)
        return h

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """t is 0 for noise and 1 for the picture; text [1, L, C]."""
        p, split = self.config.patch, self.mesh.tokens
        grid = x.shape[-2] // p, x.shape[-1] // p
        text_rope, rope = self._ropes(text.shape[1], grid, x.device)
        emb = self.t_embedder(t.view(1).to(x.device) * self.config.t_scale)
        h = filled(self.all_x_embedder[self.kind](patches(x.to(self.dtype), p)), self.x_pad_token)
        tokens = h.shape[1]
        h, rope = split.shard(h, 1), split.shard(rope, 0)
        own = h.shape[1]
        attend: Attend = partial(self.among, tokens=tokens)
        for i, block in enumerate(self.walk([*self.noise_refiner, *self.layers])):
            if i == len(self.noise_refiner):
                h, rope = torch.cat([h, text], 1), torch.cat([rope, text_rope])
                attend = self._alone if split.size == 1 else partial(self._joined, own=own, tokens=tokens)
            h = block(h, rope, attend, emb)
        h = split.gather(self.all_final_layer[self.kind](h[:, :own], emb), 1, tokens)
        return picture(h[:, : grid[0] * grid[1]], grid, p)

    def _alone(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of tokens that are all here."""
        return self.backend.attend(q, k, v, None)

    def _joined(self, q: Tensor, k: Tensor, v: Tensor, own: int, tokens: int) -> Tensor:
        """Attention of `own` of the picture's `tokens`, and after them the text's, which every rank has."""
        text = q[:, own:], k[:, own:], v[:, own:]
        return torch.cat(self.among.joint(q[:, :own], k[:, :own], v[:, :own], tokens, text), 1)

    def _ropes(self, text: int, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        return ropes(text, grid, tuple(self.config.axes_dims), self.config.rope_theta, device)


def filled(x: Tensor, token: Tensor) -> Tensor:
    """x [1, S, C] with as many of `token` [1, C] at its end as make a multiple of 32."""
    return torch.cat([x, token.expand(1, -x.shape[1] % MULTIPLE, -1)], 1)


@lru_cache(maxsize=4)
def ropes(
    text: int, grid: tuple[int, int], dims: tuple[int, ...], theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rotations [L, D/2] of the text, which goes along the first axis, and [S, D/2] of the picture behind it.

    What fills the picture up stands at the origin.
    """
    steps = torch.arange(1, text + 1, device=device)
    row, column = (torch.arange(n, device=device) for n in grid)
    place = torch.cartesian_prod(torch.tensor([text + 1], device=device), row, column)
    place = F.pad(place, (0, 0, 0, -len(place) % MULTIPLE))
    return rope_at(F.pad(steps[:, None], (0, 2)), dims, theta), rope_at(place, dims, theta)


def patches(x: Tensor, p: int) -> Tensor:
    """[1, C, 1, h, w] to [1, h/p * w/p, p*p*C]"""
    _, C, _, h, w = x.shape
    return x.view(C, h // p, p, w // p, p).permute(1, 3, 2, 4, 0).reshape(1, -1, p * p * C)


def picture(h: Tensor, grid: tuple[int, int], p: int) -> Tensor:
    """The way back."""
    rows, columns = grid
    x = h.view(rows, columns, p, p, -1).permute(4, 0, 2, 1, 3)
    return x.reshape(1, -1, 1, rows * p, columns * p)


# -------------------------------------------------------------------------------------------------- family

TEXT_TOKENS = 512
TURBO_SHIFT = 3.0  # the base model's schedule is shifted by 6

COMMON = {"negative_prompt": "", "max_sequence_length": TEXT_TOKENS}
BASE = COMMON | {
    "width": 1280, "height": 720, "num_inference_steps": 50, "guidance_scale": 5.0, "cfg_normalization": 1.0,
}  # fmt: skip
TURBO = COMMON | {"width": 1024, "height": 1024, "num_inference_steps": 9, "guidance_scale": 0.0}

Z_IMAGE_ORIGINAL: Renames = (  # from our layers' names, which are diffusers', to those of ComfyUI's files
    (r"^(.*)\.attention\.to_q$", r"\1.attention.qkv#0|\g<0>"),  # some files fuse the three, some only rename the last
    (r"^(.*)\.attention\.to_k$", r"\1.attention.qkv#1|\g<0>"),
    (r"^(.*)\.attention\.to_v$", r"\1.attention.qkv#2|\g<0>"),
    (r"\.attention\.to_out\.0$", ".attention.out"),
    (r"\.attention\.norm_([qk])$", r".attention.\1_norm"),
    (r"^all_x_embedder\.\d+-1$", "x_embedder"),
    (r"^all_final_layer\.\d+-1\.", "final_layer."),
)


@attrs.define(eq=False)
class BranchInputs:
    """What one branch is told: the text encoder's states [1, n, C], and the same refined, from the first step on."""

    text: Tensor
    refined: Tensor | None = None


class ZImage(NativeModel):
    """ZImagePipeline checkpoints. Pictures are where denoising begins; the transformer reads none."""

    def __init__(self, load: Load, mesh: Mesh, platform: Platform, progress: Callable[[int, int], None]):
        from diffusers import AutoencoderKL
        from transformers import Qwen3Model

        self.parts = parts = ComponentLoader(load, mesh, platform, progress)
        self.scheduler = parts.scheduler
        self._config = c = z_image_config(parts.path("transformer") / "config.json")
        self._defaults = parts.defaults(TURBO if parts.scheduler.get("shift") == TURBO_SHIFT else BASE)
        guided = self._defaults.get("guidance_scale", SamplingParams().guidance_scale) > 0
        mesh = parts.share(c.n_heads, guided)
        self._check_widths()
        self._tokenizer = tokenizer(parts, "tokenizer")
        if not self._tokenizer.chat_template:
            raise ModelError(f"{parts.path('tokenizer')}: the tokenizer has no chat_template")
        self._text = text_encoder(parts, "text_encoder", Qwen3Model, "layers", states_before_last)
        self._transformer = parts.transformer(
            "transformer",
            partial(ZImageTransformer, c, mesh),
            c.dim // c.n_heads,
            ("noise_refiner", "layers"),  # the text is refined once for all steps
            crosses=False,
        )
        self.lora = parts.lora({"transformer": self._transformer}, Z_IMAGE_ORIGINAL)
        levels = len(parts.config("vae").get("block_out_channels", [0]))
        self._vae = Autoencoder(parts, AutoencoderKL, 2 ** (levels - 1))
        self._scale: float = self._vae.module.config.scaling_factor
        self._shift: float = self._vae.module.config.shift_factor or 0.0
        self.parallel_decode = load.settings.parallel_decode
        self._takes_pictures = load.settings.vae_config.load_encoder
        mesh.barrier()  # until all ranks have loaded, memory is not what it will be
        self.info = self._describe()

    def _check_widths(self) -> None:
        """Raise `ModelError` for components that do not fit, or of another kind."""
        text, vae = (self.parts.config(name) for name in ("text_encoder", "vae"))
        if text.get("model_type") != "qwen3":
            file = self.parts.path("text_encoder") / "config.json"
            raise ModelError(f"{file}: model_type is {text.get('model_type')!r}; only 'qwen3' is supported")
        self.parts.needs_euler()
        made, taken = (vae.get("latent_channels"), text.get("hidden_size")), self._config
        if made != (taken.in_channels, taken.cap_feat_dim):
            raise ModelError(
                f"the components do not fit: the transformer takes {taken.in_channels} latent channels and text of "
                f"{taken.cap_feat_dim}, the vae has {made[0]} channels, the text encoder makes {made[1]}"
            )

    def encode(
        self, params: SamplingParams, pictures: Sequence[Image], raise_if_cancelled: Callable[[], None] = lambda: None
    ) -> tuple[Conditioning, list[str]]:
        self.parts.offloader.need("text_encoder")
        positive, note = self._read(params.prompt, params.max_sequence_length)
        notes: list[str | None] = [note]
        negative = None
        if params.guidance_scale > 0:
            raise_if_cancelled()
            negative, note = self._read(params.negative_prompt or "", params.max_sequence_length)
            notes.append(note and f"negative {note}")
        else:
            notes += self.unguided(params)
        counts: dict[str, Any] = {"prompt_tokens": positive.text.shape[1], "latent_tokens": self._tokens(params)}
        return Conditioning(positive, negative, **counts), [n for n in notes if n]

    def _read(self, prompt: str, length: int) -> tuple[BranchInputs, str | None]:
        """The states before the last layer, and a warning when the prompt was cut.

        Padding, which the pipeline masks and then leaves out, changes nothing: the encoder looks back only.
        """
        messages = [{"role": "user", "content": prompt}]
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        tokens: list[int] = self._tokenizer(text).input_ids
        note = None
        if len(tokens) > length:
            note = f"prompt cut from {len(tokens)} to {length} tokens, the most this request allows"
        ids = torch.tensor([tokens[:length]], device=self.mesh.device)
        return BranchInputs(self._text(input_ids=ids, use_cache=False).last_hidden_state), note

    def noise(self, params: SamplingParams, generator: Generator) -> Tensor:
        side = self._vae.spatial
        shape = (1, self._config.in_channels, 1, params.height // side, params.width // side)
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(self.mesh.device)

    def encode_frames(self, frames: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        self.parts.offloader.need("vae")
        raise_if_cancelled()
        z = self._vae.encode(frames.to(self.mesh.device))
        return ((z.float() - self._shift) * self._scale)[:, :, None]

    def schedule(self, params: SamplingParams, x: Tensor) -> Schedule:
        return self.shifted_by_length(params, self._tokens(params))

    def predict(self, x: Tensor, t: Tensor, told: BranchInputs) -> Tensor:
        self.parts.offloader.need("transformer")
        if told.refined is None:
            told.refined = self._transformer.read(told.text)
        y: Tensor = self._transformer(x, (1000 - t) / 1000, told.refined)
        return -y

    def guidance(self, t: Tensor, params: SamplingParams) -> float:
        return 1 + params.guidance_scale  # this model's counts from the prompt's prediction: p + g (p - n)

    def guide(self, positive: Tensor, negative: Tensor, scale: float, params: SamplingParams) -> Tensor:
        v = super().guide(positive, negative, scale, params)
        if params.cfg_normalization:
            bound = params.cfg_normalization * torch.linalg.vector_norm(positive.float())
            v = v * (bound / torch.linalg.vector_norm(v)).clamp(max=1)
        return v

    def decode_latents(self, x: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        return self._vae.decode(x[:, :, 0].to(self._vae.dtype) / self._scale + self._shift, raise_if_cancelled)

    def _tokens(self, params: SamplingParams) -> int:
        """Patches of one picture."""
        side = self._vae.spatial * self._config.patch
        return (params.height // side) * (params.width // side)

    def _describe(self) -> ModelInfo:
        return self.model_info(
            kind="image",
            defaults=self._defaults,
            size_multiple=self._vae.spatial * self._config.patch,
            frame_multiple=1,
            unguided=0.0,
            pictures=PictureRule(max=int(self._takes_pictures)),
            unsupported=NO_TRUE_CFG,
            tasks=("text-to-image", *(["image-to-image"] if self._takes_pictures else [])),
            max_tokens=self._config.max_text,
            memory=self._memory(),
        )

    def _memory(self) -> Memory:
        """12 copies of the latents; 6 numbers a pixel while the picture is made, and its 3 bytes."""
        c = self._config
        block = self.parts.token_bytes(c.dim, c.hidden, self._transformer.dtype)
        return self.parts.memory(
            self._vae.tiling,
            base=2**26 + TEXT_TOKENS * block,
            text_pair=4 * self._text.config.num_attention_heads * self._text.dtype.itemsize,
            token=block + 48 * c.in_channels * c.patch**2,
            pixel=27,
            chunk_pixel=self._vae.pixel_bytes,
        )


def z_image_config(file: Path) -> ZImageConfig:
    """The numbers of a transformer's config.json.

    Raises:
        ModelError, NotBuilt: another architecture.
    """
    c: ZImageConfig = pick(read_json(file), ZImageConfig, file)
    if c.siglip_feat_dim is not None:
        raise NotBuilt(f"{file}: siglip_feat_dim: a transformer that looks at pictures (Omni) is not built yet")
    if len(c.all_patch_size) != 1 or c.all_f_patch_size != [1]:
        raise ModelError(f"{file}: all_patch_size and all_f_patch_size must hold one size each, the latter 1")
    for name, value, needed in (("qk_norm", c.qk_norm, True), ("n_kv_heads", c.n_kv_heads or c.n_heads, c.n_heads)):
        if value != needed:
            raise ModelError(f"{file}: {name} is {value!r}; only {needed!r} is supported")
    if c.dim % c.n_heads or sum(c.axes_dims) != c.dim // c.n_heads:
        raise ModelError(
            f"{file}: axes_dims: {c.axes_dims} do not add up to the {c.dim} / {c.n_heads} channels of a head"
        )
    return c


def states_before_last(encoder: Any) -> nn.Module:
    """A text encoder whose last states are those that go into its last layer."""
    encoder.layers, encoder.norm = encoder.layers[:-1], nn.Identity()
    found: nn.Module = encoder
    return found
