"""The transformer's forward pass again, for training: the same numbers in about two thirds of the time on a CPU.

Elementwise work dominates a narrow model, so that normalisation, modulation and residuals stay in bf16 here, the three
projections of an attention are one matrix product, and texts come with one weighed pad instead of hundreds.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor


def rotations(model: WanTransformer3DModel, x: Tensor) -> Tensor:
    """The unit complex numbers that rotate q and k for latents x [B, C, t, h, w]: [S, 1, D/2]."""
    cos, sin = model.rope(x)  # [1, S, 1, D] each
    return torch.complex(cos[0, ..., 0::2].float(), sin[0, ..., 1::2].float())


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turns neighbouring channel pairs of x [B, S, H, D]."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


def project(x: Tensor, *layers: Any) -> tuple[Tensor, ...]:
    """Several linear layers of one input as one product."""
    weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
    return F.linear(x, weight, bias).chunk(len(layers), -1)


def rms_norm(norm: Any, x: Tensor) -> Tensor:
    """The module's RMS norm in x's precision; its mean square is accumulated in float32."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).pow(2) / x.shape[-1]
    scale: Tensor = (square + norm.eps).rsqrt().to(x.dtype) * norm.weight.to(x.dtype)
    return x * scale


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, C] to [B, S, H, D]."""
    return x.reshape(*x.shape[:2], heads, -1)


def attend(attn: Any, q: Tensor, k: Tensor, v: Tensor, turns: Tensor | None, bias: Tensor | None) -> Tensor:
    """Attention of q [B, S, C] over k and v [B, L, C], with a bias on the scores [B, 1, 1, L]."""
    q, k, v = (split_heads(t, attn.heads) for t in (rms_norm(attn.norm_q, q), rms_norm(attn.norm_k, k), v))
    if turns is not None:
        q, k = rotate(q, turns), rotate(k, turns)
    q, k, v = q.transpose(1, 2) * q.shape[-1] ** -0.5, k.permute(0, 2, 3, 1), v.transpose(1, 2)
    scores = q @ k  # [B, H, S, L]
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    out: Tensor = attn.to_out[0]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    return out


def layer_norm(x: Tensor) -> Tensor:
    """Layer norm without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def run_block(block: Any, h: Tensor, text: Tensor, time: Tensor, turns: Tensor, bias: Tensor) -> Tensor:
    """One transformer block: h [B, S, C], text [B, L, C], time [B, 6, C]."""
    parts = (block.scale_shift_table + time.float()).to(h.dtype).chunk(6, 1)
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = parts
    x = torch.addcmul(shift, layer_norm(h), 1 + scale)
    attn = block.attn1
    q, k, v = project(x, attn.to_q, attn.to_k, attn.to_v)
    h = torch.addcmul(h, attend(attn, q, k, v, turns, None), gate)
    attn = block.attn2
    x = F.layer_norm(h, h.shape[-1:], block.norm2.weight.to(h.dtype), block.norm2.bias.to(h.dtype), 1e-6)
    k, v = project(text, attn.to_k, attn.to_v)
    h = h + attend(attn, attn.to_q(x), k, v, None, bias)
    x = torch.addcmul(ffn_shift, layer_norm(h), 1 + ffn_scale)
    return torch.addcmul(h, block.ffn(x), ffn_gate)


def velocity(model: WanTransformer3DModel, x: Tensor, timestep: Tensor, text: Tensor, bias: Tensor) -> Tensor:
    """What `model(x, timestep, text)` gives for latents x [B, C, t, h, w] and text [B, L, D], in float32.

    `bias` [B, 1, 1, L] is added to the scores over the text.
    """
    size = [n // p for n, p in zip(x.shape[2:], model.config.patch_size, strict=True)]
    with torch.autocast("cpu", torch.bfloat16):
        turns = rotations(model, x)
        h = model.patch_embedding(x).flatten(2).transpose(1, 2).contiguous()
        temb, time, text, _ = model.condition_embedder(timestep, text)
        time = time.unflatten(1, (6, -1))
        for block in model.blocks:
            h = run_block(block, h, text, time, turns, bias)
        shift, scale = (model.scale_shift_table + temb.unsqueeze(1)).to(h.dtype).chunk(2, 1)
        out: Tensor = model.proj_out(torch.addcmul(shift, layer_norm(h), 1 + scale)).float()
    out = out.reshape(len(out), *size, *model.config.patch_size, -1)  # [B, t, h, w, pt, ph, pw, C]
    return out.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
