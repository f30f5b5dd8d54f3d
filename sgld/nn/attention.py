"""Attention over [B, S, H, D], by the kernel chosen once."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from sgld.errors import NotBuilt
from sgld.nn.parallel import Mesh

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v through torch; q [B, S, H, D], k and v [B, L, H, D], bias [B, 1, 1, L]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, S, D]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def choose(name: str | None) -> Attention:
    """The kernel that `attention_backend` names.

    Raises:
        NotBuilt: a kernel that does not stand yet.
    """
    if name in (None, "torch_sdpa"):
        return sdpa
    raise NotBuilt(
        f"attention_backend: {name} is not built yet in this version of sgld; use torch_sdpa", "attention_backend"
    )


def ulysses(mesh: Mesh, attend: Attention) -> Attention:
    """`attend` over the tokens of all ranks; in and out each rank holds its own tokens (see `nn.parallel`)."""
    if mesh.world == 1:
        return attend

    def attend_all(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (mesh.tokens_to_heads(x) for x in (q, k, v))
        return mesh.heads_to_tokens(attend(q, k, v, bias))

    return attend_all
