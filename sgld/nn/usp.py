"""USP: attention among tokens that several ranks hold (Fang and Zhao 2024, https://arxiv.org/abs/2405.07719).

Ulysses (Jacobs et al. 2023, https://arxiv.org/abs/2309.14509): an all-to-all trades tokens for heads, so that each
rank attends over all tokens with some heads. Ring (Liu et al. 2023, https://arxiv.org/abs/2310.01889): keys and values
go round, and what each part of them contributes is merged by its log-sum-exp.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sgld.nn.attention import Backend
from sgld.nn.parallel import Mesh

Joint = tuple[Tensor, Tensor, Tensor]  # queries, keys and values of tokens that every rank has, such as a text's


class SequenceAttention:
    """Attention of a sequence to itself, of which each rank holds as many tokens as `Axis.shard` gives it."""

    def __init__(self, mesh: Mesh, backend: Backend):
        self._ulysses, self._ring = mesh.ulysses, mesh.ring
        assert backend.attend_lse is not None or self._ring.size == 1, f"{backend.name} was chosen for a ring"
        self._attend, self._attend_lse = backend.attend, backend.attend_lse

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, tokens: int) -> Tensor:
        """Attend with q, k and v [B, S/n, H, D] of a sequence of `tokens`; return [B, S/n, H, D]."""
        if self._ulysses.size == self._ring.size == 1:
            return self._attend(q, k, v, None)
        q, k, v = self._heads(q, k, v)
        return self._tokens(self._around(q, k, v, tokens, None))

    def across(self, q: Tensor, k: Tensor, v: Tensor, tokens: int) -> Tensor:
        """Attend from q [B, S/n, H, D] to k and v [B, L/n, H, D] of another sequence; return [B, S/n, H, D]."""
        if self._ulysses.size == self._ring.size == 1:
            return self._attend(q, k, v, None)
        (q,) = self._heads(q)
        k, v = self._heads(k, v)
        return self._tokens(self._around(q, k, v, tokens, None))

    def joint(self, q: Tensor, k: Tensor, v: Tensor, tokens: int, text: Joint) -> tuple[Tensor, Tensor]:
        """Attend with `text`'s q, k, v [B, L, H, D] beside: every token attends to all of both.

        Returns:
            [B, S/n, H, D] and [B, L, H, D], the latter the same on every rank.
        """
        length = text[0].shape[1]
        u = self._ulysses
        if u.size > 1:
            q, k, v = self._heads(q, k, v)
            each = text[0].shape[2] // u.size
            tq, tk, tv = (x.narrow(2, u.index * each, each) for x in text)
            text = tq, tk, tv
        y = self._around(torch.cat([q, text[0]], 1), k, v, tokens, text)
        own = y.shape[1] - length
        return self._tokens(y[:, :own]), u.gather(y[:, own:], 2)

    def _around(self, q: Tensor, k: Tensor, v: Tensor, tokens: int, text: Joint | None) -> Tensor:
        """Attend from q to the keys of all ranks of the ring, without padding, and to the text's once."""
        ring, each = self._ring, k.shape[1]
        kv = torch.stack([k, v]) if ring.size > 1 else None
        out = lse = None
        for i in range(ring.size):
            arrived = ring.pass_on(kv) if kv is not None and i + 1 < ring.size else None
            if kv is not None:
                k, v = kv
            own = min(each, max(0, tokens - (ring.index - i) % ring.size * each))
            keys, values = k[:, :own], v[:, :own]
            if text is not None and i == 0:
                keys, values = torch.cat([keys, text[1]], 1), torch.cat([values, text[2]], 1)
            if ring.size == 1:
                return self._attend(q, keys, values, None)
            if keys.shape[1]:
                assert self._attend_lse is not None
                out, lse = merge(out, lse, *self._attend_lse(q, keys, values))
            if arrived is not None:
                kv = arrived()
        assert out is not None
        return out.type_as(q)

    def _heads(self, *parts: Tensor) -> list[Tensor]:
        """Exchange tokens for heads: [B, s, H, D] -> [B, n*s, H/n, D]. One is copied while another travels."""
        n = self._ulysses.size
        if n == 1:
            return list(parts)
        arrivals = [self._ulysses.all_to_all(torch.stack(x.chunk(n, 2))) for x in parts]
        return [arrived().transpose(0, 1).flatten(1, 2) for arrived in arrivals]  # from [n, B, s, H/n, D]

    def _tokens(self, x: Tensor) -> Tensor:
        """Exchange heads for tokens: [B, n*s, H/n, D] -> [B, s, H, D]."""
        n = self._ulysses.size
        if n == 1:
            return x
        B, S, h, D = x.shape
        arrived = self._ulysses.all_to_all(x.reshape(B, n, S // n, h, D).transpose(0, 1).contiguous())
        return torch.cat(arrived().unbind(), 2)  # from [n, B, s, H/n, D]


def merge(out: Tensor | None, lse: Tensor | None, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over two sets of keys, [B, S, H, D] each, by log-sum-exps [B, S, H]; float32."""
    part = part.float()
    if out is None or lse is None:
        return part, part_lse
    return torch.lerp(out, part, torch.sigmoid(part_lse - lse)[..., None]), lse - F.logsigmoid(lse - part_lse)
