"""Attention over [B, S, H, D], by a kernel that is chosen once for each component.

Only torch's own kernels run on a CPU. The others are written to what their packages document.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sgld.errors import BadRequest, NotBuilt, nearest
from sgld.platform import Platform
from sgld.settings import ATTENTION_ROLES, TRANSFORMERS, Settings

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
AttentionLse = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


@attrs.frozen
class Backend:
    """A kernel: attention, and, where it can tell them, also the log-sum-exps that join parts of the keys.

    `attend_lse` takes q [B, S, H, D] and k, v [B, L, H, D], and gives the output [B, S, H, D] and the natural
    logarithm of each query's sum of exponentials [B, S, H], float32.
    """

    name: str
    attend: Attention
    attend_lse: AttentionLse | None = None


# --------------------------------------------------------------------------------------------------- kernels


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute softmax(q k^T / sqrt(D) + bias) v; q [B, S, H, D], k and v [B, L, H, D], bias [B, 1, 1, L]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, S, D]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def sdpa_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `sdpa` without a bias, [B, S, H, D], and its log-sum-exps [B, S, H], float32."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, S, D]
    aten = torch.ops.aten
    if q.device.type == "cpu":
        y, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif q.dtype == torch.float32:
        y, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
        lse = lse[..., : q.shape[2]]  # it is padded to a multiple of 32
    else:
        y, lse = aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    return y.transpose(1, 2), lse.transpose(1, 2)


TORCH = Backend("torch_sdpa", sdpa, sdpa_with_lse)


def _cudnn() -> Backend:
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(q, k, v, bias)

    def attend_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
        return y.transpose(1, 2), lse.reshape(y.shape[:3]).transpose(1, 2)

    return Backend("torch_cudnn_sdpa", attend, attend_lse)


def _flash_2() -> Backend:
    kernel = importlib.import_module("flash_attn").flash_attn_func
    return Backend("fa2", _unbiased(kernel), _with_lse(kernel, return_attn_probs=True))


def _flash_3() -> Backend:
    kernel = importlib.import_module("flash_attn_interface").flash_attn_func
    return Backend("fa3", _unbiased(kernel), _with_lse(kernel, return_attn_probs=True))


def _flash_4() -> Backend:
    return Backend("fa4", _unbiased(importlib.import_module("flash_attn.cute").flash_attn_func))


def _sage() -> Backend:
    kernel = importlib.import_module("sageattention").sageattn
    attend = _unbiased(lambda q, k, v: kernel(q, k, v, tensor_layout="NHD"))
    return Backend("sage_attn", attend, _with_lse(kernel, tensor_layout="NHD", return_lse=True))


def _sage_3() -> Backend:
    kernel = importlib.import_module("sageattn3").sageattn3_blackwell

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, v = q.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
        k = k.transpose(1, 2).clone(memory_format=torch.contiguous_format)  # it is changed in place
        y: Tensor = kernel(q, k, v)
        return y.transpose(1, 2)

    return Backend("sage_attn_3", _unbiased(attend))


def _aiter() -> Backend:
    kernel = importlib.import_module("aiter").flash_attn_func
    return Backend("aiter", _unbiased(kernel), _with_lse(kernel, return_lse=True))


def _unbiased(kernel: Callable[[Tensor, Tensor, Tensor], Any]) -> Attention:
    """Wrap a kernel without a bias. Some versions return a tuple whose first element is the output."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        assert bias is None, "families fold padding into a bias only where torch_sdpa is all there is"
        answer = kernel(q, k, v)
        y: Tensor = answer[0] if isinstance(answer, tuple) else answer
        return y

    return attend


def _with_lse(kernel: Callable[..., Any], **options: Any) -> AttentionLse:
    """Wrap a kernel that returns [B, S, H, D] and the logarithm [B, H, S] of its sums, if `options` ask for it."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        y, lse = kernel(q, k, v, **options)[:2]
        return y, lse.transpose(1, 2)

    return attend


# ---------------------------------------------------------------------------------------------------- choice


@attrs.frozen
class Entry:
    """How a backend is made, and what it needs."""

    make: Callable[[], Backend]
    package: str = "torch"
    gpu: str = ""  # pattern of `Platform.gpu`; empty: a CPU will do
    needs: str = ""  # the same in words
    max_head: int = 2**16
    keys: tuple[str, ...] = ()  # of attention_backend_config
    joins: bool = True  # whether it tells log-sum-exps, which a ring of workers needs

    def obstacle(self, platform: Platform, dtype: torch.dtype, head: int, ring: bool = False) -> str | None:
        """Return why the backend cannot run, in a `ring` of workers or without; None if it can."""
        if self.gpu and not re.fullmatch(self.gpu, platform.gpu or ""):
            return f"it needs {self.needs}; this worker computes on {platform.gpu or 'a CPU'}"
        if not _installed(self.package):
            return f"the package {self.package} is not installed"
        if self.gpu and dtype == torch.float32:
            return "it computes in fp16 or bf16; the component's precision is fp32"
        if head > self.max_head:
            return f"it takes heads of at most {self.max_head} channels; the component's have {head}"
        if ring and not self.joins:
            return "it cannot join what the workers of a ring attend to"
        return None


def _installed(package: str) -> bool:
    top, *inner = package.split(".")
    return importlib.util.find_spec(top) is not None and (not inner or importlib.util.find_spec(package) is not None)


BACKENDS: Mapping[str, Entry] = {
    "torch_sdpa": Entry(lambda: TORCH),
    "fa2": Entry(_flash_2, "flash_attn", r"sm(8|9|1\d)\d|rocm", "an NVIDIA GPU from Ampere on, or an AMD one", 256),
    "fa3": Entry(_flash_3, "flash_attn_interface", "sm90", "an NVIDIA Hopper GPU", 256),
    "fa4": Entry(_flash_4, "flash_attn.cute", r"sm(90|1\d\d)", "an NVIDIA GPU from Hopper on", 128, joins=False),
    "torch_cudnn_sdpa": Entry(_cudnn, "torch", r"sm(8|9|1\d)\d", "an NVIDIA GPU from Ampere on", 128),
    "sage_attn": Entry(_sage, "sageattention", "sm(80|86|89|90|120)", "an NVIDIA GPU of sm80, 86, 89, 90 or 120", 128),
    "sage_attn_3": Entry(_sage_3, "sageattn3", r"sm1[02]\d", "an NVIDIA Blackwell GPU", 128, joins=False),
    "aiter": Entry(_aiter, "aiter", "rocm", "an AMD GPU", 256),
}
FLASH = ("fa4", "fa3", "fa2")  # what `fa` stands for: the first that can run
SELF, CROSS = ATTENTION_ROLES


@attrs.frozen
class Chooser:
    """The backends of one model's components, as the settings ask."""

    settings: Settings
    platform: Platform

    def check(self, components: tuple[str, ...]) -> None:
        """Raise `BadRequest` for a component that is not one of these, whose attention can be chosen."""
        for name in self.settings.attention.component_attention_backends:
            component, _, role = name.partition(".")
            if component not in components or (role and (component not in TRANSFORMERS or role not in ATTENTION_ROLES)):
                roles = [f"{c}.{r}" for c in components if c in TRANSFORMERS for r in ATTENTION_ROLES]
                allowed = [*components, *roles]
                raise BadRequest(
                    f"{name!r} is none of {', '.join(allowed)}{nearest(name, allowed)}",
                    field="component_attention_backends",
                )

    def torch_only(self, component: str, why: str) -> None:
        """Raise `BadRequest` where another backend is asked for a component that torch alone can compute."""
        name = self.settings.attention.component_attention_backends.get(component, "torch_sdpa")
        if name != "torch_sdpa":
            path = f"component_attention_backends.{component}"
            raise BadRequest(f"{name} cannot be used: {why}; use torch_sdpa", field=path)

    def refuse(self, name: str, why: str) -> None:
        """Raise `BadRequest` where a backend is chosen for what this model has not."""
        if name in self.settings.attention.component_attention_backends:
            path = f"component_attention_backends.{name}"
            raise BadRequest(f"this model has no such attention: {why}; leave it out", field=path)

    def choose(self, component: str, role: str, dtype: torch.dtype, head: int, ring: bool = False) -> Backend:
        """Choose the backend for one role of a transformer's attention, maybe in a `ring` of workers.

        The role's own, or the component's, or those of the first of several such components, or the one for all; else
        flash attention where it can run, and torch's own where it cannot.

        Raises:
            BadRequest: it cannot run here, or does not read a key of `attention_backend_config`; says what can.
            NotBuilt: it does not stand yet.
        """
        given = self.settings.attention.component_attention_backends
        first = component.removesuffix("_2")
        asked = next((n for n in (f"{component}.{role}", component, f"{first}.{role}", first) if n in given), None)
        param = f"component_attention_backends.{asked}" if asked else "attention_backend"
        name = wanted = given[asked] if asked else self.settings.attention.attention_backend
        runs = [n for n, entry in BACKENDS.items() if entry.obstacle(self.platform, dtype, head, ring) is None]
        if name in (None, "fa"):
            flash = [n for n in FLASH if n in runs]
            name = next(iter(flash), FLASH[-1] if name else "torch_sdpa")
        if name not in BACKENDS:
            raise NotBuilt(f"{name} is not built yet in this version of sgld; use torch_sdpa", field=param)
        if reason := BACKENDS[name].obstacle(self.platform, dtype, head, ring):
            raise BadRequest(f"{wanted} cannot run here: {reason}; these can: {', '.join(runs)}", field=param)
        self._check_keys(name)
        return BACKENDS[name].make()

    def _check_keys(self, name: str) -> None:
        keys = BACKENDS[name].keys
        for key in self.settings.attention.attention_backend_config or {}:
            if key not in keys:
                raise BadRequest(
                    f"{key!r} is no setting of {name}; it has {', '.join(keys) or 'none'}",
                    field="attention_backend_config",
                )
