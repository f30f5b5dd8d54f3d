"""Stage `transformer`: rectified flow on the bank's latents, jointly with the text encoder."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from . import fastpass
from .bank import load_bank
from .compress import CHANNELS
from .runs import Run, cosine, set_rate
from .scenes import MOTIONS, SHAPES, Scene, caption
from .text import WIDTH

RATE = 1.5e-3
TEXT_RATE = 0.15 * RATE
WARM_UP = 100
CONSTANT = 0.4
"""The part of the steps before the cosine sets in."""
POLISH_RATE = 0.5
"""The rate's factor where the last steps, the polish, begin; a cosine follows."""
HARD_SHAPE, HARD_SHARE = "star", 0.6
"""What is hardest to draw, and the part of the twins of the polish that have one."""
NO_CAPTION = 0.1
MAX_WORDS = 22
SHIFT = 3.0
PADDED = (32, 128, 512, 512)
"""Lengths that the pipeline may pad a text to."""

CONFIG: dict[str, Any] = {
    "patch_size": (1, 3, 3),
    "num_attention_heads": 4,
    "attention_head_dim": 48,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": WIDTH,
    "freq_dim": 128,
    "ffn_dim": 768,
    "num_layers": 6,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 64,
}


def new_transformer() -> WanTransformer3DModel:
    """Builds the model with a zero output, even linear layers and gates that start a third open."""
    model = WanTransformer3DModel(**CONFIG)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        embedder = model.condition_embedder
        for layer in (embedder.time_embedder.linear_1, embedder.time_embedder.linear_2, embedder.time_proj):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(model.proj_out.weight)
        for block in model.blocks:
            block.scale_shift_table[:, [2, 5]] += 0.3
    return model


@dataclass(frozen=True)
class Bucket:
    """One kind of batch: how often, how many for each worker, and its latent frames; None means images."""

    share: float
    batch: int
    frames: int | None


BUCKETS = (
    Bucket(0.46, 20, 5),
    Bucket(0.06, 24, 4),
    Bucket(0.12, 32, 3),
    Bucket(0.06, 40, 2),
    Bucket(0.30, 64, None),
)


@dataclass
class Model:
    """The two networks that train together, and what turns captions into the transformer's conditions."""

    tokenizer: PreTrainedTokenizerFast
    text: UMT5EncoderModel
    flow: WanTransformer3DModel

    def parameters(self) -> list[nn.Parameter]:
        """All trainable parameters, the transformer's first."""
        return [*self.flow.parameters(), *self.text.parameters()]

    def encode_text(self, captions: Sequence[str], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Text states [B, L, D], zero at pads, and the attention bias [B, 1, 1, L] that weighs the pads.

        The pipeline pads to `lengths` with zeros and never masks them. A few zeros that each count log(missing / few)
        more give the same softmax at a twentieth of the length.
        """
        tokens = self.tokenizer(
            list(captions), padding=True, truncation=True, max_length=MAX_WORDS, return_tensors="pt"
        )
        ids, mask = F.pad(tokens.input_ids, (0, 1)), F.pad(tokens.attention_mask, (0, 1))
        states = self.text(ids, mask).last_hidden_state * mask[..., None]
        words = mask.sum(1, keepdim=True)
        weight = (torch.tensor(lengths)[:, None] - words) / (ids.shape[1] - words)
        return states, torch.where(mask > 0, 0.0, weight.log())[:, None, None, :]

    def velocity(self, x: Tensor, sigma: Tensor, captions: Sequence[str], lengths: Sequence[int]) -> Tensor:
        """Predicts noise minus data for noisy latents x [B, C, t, h, w] at sigma [B]."""
        states, bias = self.encode_text(captions, lengths)
        return fastpass.velocity(self.flow, x, 1000 * sigma, states, bias)


def new_model(run: Run) -> Model:
    """A fresh transformer beside the text encoder that stage `text` trained."""
    torch.manual_seed(run.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run.folder("tokenizer"))
    return Model(tokenizer, UMT5EncoderModel.from_pretrained(run.folder("text_encoder")), new_transformer())


def noisy(data: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The straight path of rectified flow (Liu et al., 2022), from data at sigma 0 to noise at 1."""
    s = sigma[:, None, None, None, None]
    return (1 - s) * data + s * noise


def draw_sigma(count: int) -> Tensor:
    """Logit-normal times, a fifth of them uniform, shifted towards noise: [B] in 0..1."""
    u = torch.where(torch.rand(count) < 0.2, torch.rand(count), torch.sigmoid(1.1 * torch.randn(count)))
    return (SHIFT * u / (1 + (SHIFT - 1) * u)).clamp(1e-3, 1)


Bank = dict[str, tuple[list[Scene], Tensor]]
"""Scenes, twin beside twin, and latents of `clips` and `images`."""


def draw_pairs(scenes: Sequence[Scene], count: int, rng: random.Random, hard_share: float) -> list[int]:
    """Numbers of pairs of twins, some of them drawn from those with the hardest shape alone."""
    hard = [i for i in range(len(scenes) // 2) if HARD_SHAPE in (scenes[2 * i].shape, scenes[2 * i + 1].shape)]
    return [
        rng.choice(hard) if hard_share and hard and rng.random() < hard_share else rng.randrange(len(scenes) // 2)
        for _ in range(count)
    ]


def flow_loss(model: Model, bank: Bank, bucket: Bucket, rng: random.Random, hard_share: float = 0.0) -> Tensor:
    """The flow-matching loss on one batch of a bucket, with captions said anew.

    Twins, which differ in nothing but the shape, share their noise and their time: what is left of the loss between
    them is the shape's doing, and so the gradient says more of it than over twice as many strangers.
    """
    scenes, latents = bank["images" if bucket.frames is None else "clips"]
    pairs = draw_pairs(scenes, bucket.batch // 2, rng, hard_share)
    rows = [2 * pair + twin for pair in pairs for twin in (0, 1)]
    data = latents[rows, :, : bucket.frames].float()
    captions: list[str] = []
    for pair in pairs:
        silent, state = rng.random() < NO_CAPTION, rng.getstate()
        for twin in (0, 1):
            rng.setstate(state)
            captions.append("" if silent else caption(scenes[2 * pair + twin], rng))
    lengths = [length for length in rng.choices(PADDED, k=len(pairs)) for _ in (0, 1)]
    sigma = draw_sigma(len(pairs)).repeat_interleave(2)
    noise = torch.randn_like(data[::2]).repeat_interleave(2, 0)
    return F.mse_loss(model.velocity(noisy(data, noise, sigma), sigma, captions, lengths), noise - data)


def _next(values: Sequence[str], value: str, by: int) -> str:
    return values[(values.index(value) + by) % len(values)]


LIES: dict[str, Callable[[Scene], Scene]] = {
    "swap": Scene.swapped,
    "shape": lambda scene: replace(scene, shape=_next(SHAPES, scene.shape, 1)),
    "motion": lambda scene: replace(scene, motion=_next(MOTIONS, scene.motion, 2)),
}


@torch.no_grad()
def probe(model: Model, bank: Bank, sigma: float = 0.9) -> str:
    """The loss with right captions, and how much a lie about colours, shape or motion adds to it."""
    rng, generator = random.Random(5), torch.Generator().manual_seed(1)
    scenes, latents = bank["clips"]
    rows = [rng.randrange(len(scenes)) for _ in range(32)]
    data = latents[rows].float()
    noise, sigmas = torch.randn(data.shape, generator=generator), torch.full((len(rows),), sigma)

    def loss(lie: Callable[[Scene], Scene]) -> float:
        captions = [caption(lie(scenes[row])) for row in rows]
        v = model.velocity(noisy(data, noise, sigmas), sigmas, captions, [512] * len(rows))
        return F.mse_loss(v, noise - data).item()

    right = loss(lambda scene: scene)
    gaps = " ".join(f"{name} {loss(lie) - right:+.4f}" for name, lie in LIES.items())
    return f"right {right:.4f} {gaps}"


def new_optimizers(model: Model) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the blocks' matrices, AdamW for the rest and, slower, for the text encoder."""
    matrices = [p for p in model.flow.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.flow.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=RATE, weight_decay=0.02, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
        torch.optim.AdamW(model.text.parameters(), lr=TEXT_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def rate_at(step: int, steps: int, polish: int) -> float:
    """The learning rate's factor: a warm-up, a plateau, a cosine; then a smaller warm-up and cosine."""
    if step >= steps:
        return POLISH_RATE * min(1, (step - steps + 1) / WARM_UP) * cosine((step - steps) / polish)
    part = (step / steps - CONSTANT) / (1 - CONSTANT)
    return min(1, (step + 1) / WARM_UP) * (cosine(part) if part > 0 else 1.0)


class Average(nn.Module):
    """An exponential average of parameters."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.values = nn.ParameterList([nn.Parameter(p.detach().clone(), requires_grad=False) for p in parameters])

    @torch.no_grad()
    def update(self, parameters: Sequence[nn.Parameter], step: int) -> None:
        """Moves towards the parameters, faster in the first steps."""
        torch._foreach_lerp_(list(self.values), list(parameters), 1 - min(0.998, (1 + step) / (20 + step)))

    @torch.no_grad()
    def write(self, parameters: Sequence[nn.Parameter]) -> None:
        """Overwrites the parameters with the average."""
        for parameter, value in zip(parameters, self.values, strict=True):
            parameter.copy_(value)


def train_transformer(run: Run, steps: int, polish: int) -> None:
    """Trains for `steps` steps and `polish` more, resuming where a checkpoint lies."""
    model, bank = new_model(run), load_bank(run.workdir)
    parameters, optimizers = model.parameters(), new_optimizers(model)
    rates, average = [RATE, RATE, TEXT_RATE], Average(parameters)
    parts = {"flow": model.flow, "text": model.text, "average": average}
    parts |= {f"optimizer{i}": optimizer for i, optimizer in enumerate(optimizers)}
    step, began, losses = run.resume("transformer", **parts), time.monotonic(), []
    while step < steps + polish:
        for optimizer, rate in zip(optimizers, rates, strict=True):
            set_rate(optimizer, rate * rate_at(step, steps, polish))
            optimizer.zero_grad()
        bucket = run.shared_rng("transformer", step).choices(BUCKETS, [b.share for b in BUCKETS])[0]
        hard_share = HARD_SHARE if step >= steps else 0.0
        loss = flow_loss(model, bank, bucket, run.own_rng("transformer", step), hard_share)
        torch.autograd.backward(loss)
        run.average(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        average.update(parameters, step)
        step += 1
        losses.append(loss.item())
        if step % 100 == 0 or step == steps + polish:
            gaps = probe(model, bank) if step % 300 == 0 and not run.rank else ""
            minutes = (time.monotonic() - began) / 60
            run.log(f"transformer {step} loss {sum(losses[-100:]) / 100:.4f} {gaps} {minutes:.1f} min")
        if step % 250 == 0 or step in (steps, steps + polish):
            run.save("transformer", step, **parts)
