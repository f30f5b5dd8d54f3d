"""Attention backends: torch's own against the formula, the others as far as their documented calls can be checked."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgld.errors import BadRequest, NotBuilt
from sgld.nn.attention import BACKENDS, CROSS, FLASH, SELF, TORCH, Chooser, sdpa
from sgld.platform import Cpu
from sgld.settings import DENSE_ATTENTION, Settings

HALF = torch.bfloat16
# Stand-ins for packages that this machine cannot run: their documented signatures and layouts, by torch's arithmetic.
LSE = """
import torch
import torch.nn.functional as F

def compute(q, k, v, scale=None):  # [B, S, H, D]
    logits = torch.einsum("bshd,blhd->bhsl", q.float(), k.float()) * (scale or q.shape[-1] ** -0.5)
    out = torch.einsum("bhsl,blhd->bshd", logits.softmax(-1), v.float()).to(q.dtype)
    return out, logits.logsumexp(-1)  # the latter [B, H, S]
"""
PACKAGES = {
    "flash_attn/__init__.py": LSE
    + """
def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                    alibi_slopes=None, deterministic=False, return_attn_probs=False):
    out, lse = compute(q, k, v, softmax_scale)
    return (out, lse, None) if return_attn_probs else out
""",
    "flash_attn/cute.py": LSE
    + """
def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None,
                    softcap=0.0):
    return compute(q, k, v, softmax_scale)[0], None
""",
    "flash_attn_interface.py": LSE
    + """
def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
                    v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
                    pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False):
    out, lse = compute(q, k, v, softmax_scale)
    return (out, lse) if return_attn_probs else out
""",
    "sageattention.py": LSE
    + """
def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False):
    turn = (lambda x: x.transpose(1, 2)) if tensor_layout == "HND" else (lambda x: x)
    out, lse = compute(turn(q), turn(k), turn(v), sm_scale)
    return (turn(out), lse) if return_lse else turn(out)
""",
    "sageattn3.py": LSE
    + """
def sageattn3_blackwell(q, k, v, attn_mask=None, is_causal=False, per_block_mean=True):
    k -= k.mean(dim=-2, keepdim=True)  # softmax does not mind; the caller may
    out, _ = compute(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)
""",
    "aiter.py": LSE
    + """
def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
                    alibi_slopes=None, deterministic=True, return_lse=False, return_attn_probs=False):
    out, lse = compute(q, k, v, softmax_scale)
    return (out, lse) if return_lse else (out,)
""",
}
GPUS = {
    "fa2": "sm80", "fa3": "sm90", "fa4": "sm100", "sage_attn": "sm89", "sage_attn_3": "sm120", "aiter": "rocm",
}  # fmt: skip


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All of them can be imported."""
    for name, text in PACKAGES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    names = {name.partition("/")[0].removesuffix(".py") for name in PACKAGES}
    yield
    for module in [m for m in sys.modules if m.partition(".")[0] in names]:
        del sys.modules[module]
    importlib.invalidate_caches()


def gpu(name: str) -> Cpu:
    """A platform that says it has that GPU."""

    class Gpu(Cpu):
        gpu = name

    return Gpu()


def choose(platform: Cpu | None = None, component: str = "transformer", role: str = SELF, **settings: Any) -> str:
    return Chooser(Settings.of(**settings), platform or Cpu()).choose(component, role, HALF, 128).name


def tensors(dtype: torch.dtype, S: int = 7, L: int = 19) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(2, n, 3, 16).to(dtype) for n in (S, L, L))
    return q, k, v


def formula(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output [B, S, H, D] and log-sum-exps [B, S, H], in float64."""
    logits = torch.einsum("bshd,blhd->bshl", q.double(), k.double()) * q.shape[-1] ** -0.5
    return torch.einsum("bshl,blhd->bshd", logits.softmax(-1), v.double()), logits.logsumexp(-1)


def apart(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a.double() - b.double()).abs().max())


@pytest.mark.parametrize(("S", "L"), [(7, 19), (1, 1), (64, 100), (5, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (HALF, 2e-2), (torch.float16, 2e-3)])
def test_torch_gives_the_log_sum_exp_too(dtype: torch.dtype, tolerance: float, S: int, L: int) -> None:
    q, k, v = tensors(dtype, S, L)
    assert TORCH.attend_lse is not None
    out, lse = TORCH.attend_lse(q, k, v)
    expected, expected_lse = formula(q, k, v)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert apart(out, expected) < tolerance
    assert apart(lse, expected_lse) < 1e-4  # a logarithm of base 2, or one without the scale, is off by more than 0.1
    assert torch.equal(out, sdpa(q, k, v))


@pytest.mark.parametrize("name", GPUS)
def test_a_package_is_called_as_it_documents(packages: None, name: str) -> None:
    """Wrong layouts, names of arguments or places in answers would fail, and so would keys that are changed."""
    backend = Chooser(Settings.of(attention_backend=name), gpu(GPUS[name])).choose("transformer", SELF, HALF, 128)
    q, k, v = tensors(HALF)
    before = k.clone()
    expected, expected_lse = formula(q, k, v)
    assert backend.name == name
    assert apart(backend.attend(q, k, v, None), expected) < 2e-2
    assert apart(backend.attend(q, v, k, None), expected) > 0.5
    assert torch.equal(k, before)
    if backend.attend_lse is not None:
        out, lse = backend.attend_lse(q, k, v)
        assert apart(out, expected) < 2e-2
        assert apart(lse, expected_lse) < 1e-4
    assert (backend.attend_lse is None) == (name in ("fa4", "sage_attn_3"))


@pytest.mark.parametrize(
    ("settings", "platform", "dtype", "head", "message"),
    [
        ({"attention_backend": "fa"}, Cpu(), HALF, 128,
         "attention_backend: fa cannot run here: it needs an NVIDIA GPU from Ampere on, or an AMD one; this worker "
         "computes on a CPU; these can: torch_sdpa"),
        ({"attention_backend": "sage_attn"}, gpu("sm90"), HALF, 128,
         "attention_backend: sage_attn cannot run here: the package sageattention is not installed; these can: "
         "torch_sdpa, torch_cudnn_sdpa"),
        ({"attention_backend": "fa3"}, gpu("sm80"), HALF, 128,
         "attention_backend: fa3 cannot run here: it needs an NVIDIA Hopper GPU; this worker computes on sm80; these "
         "can: torch_sdpa, torch_cudnn_sdpa"),
        ({"attention_backend": "torch_cudnn_sdpa"}, gpu("sm90"), torch.float32, 128,
         "attention_backend: torch_cudnn_sdpa cannot run here: it computes in fp16 or bf16; the component's precision "
         "is fp32; these can: torch_sdpa"),
        ({"attention_backend": "torch_cudnn_sdpa"}, gpu("sm90"), HALF, 160,
         "attention_backend: torch_cudnn_sdpa cannot run here: it takes heads of at most 128 channels; the component's "
         "have 160; these can: torch_sdpa"),
        ({"component_attention_backends": {"transformer.self": "aiter"}}, gpu("sm90"), HALF, 128,
         "component_attention_backends.transformer.self: aiter cannot run here: it needs an AMD GPU; this worker "
         "computes on sm90; these can: torch_sdpa, torch_cudnn_sdpa"),
        ({"attention_backend_config": {"topk": 0.5}}, Cpu(), HALF, 128,
         "attention_backend_config: 'topk' is no setting of torch_sdpa; it has none"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_with_what_can(
    settings: dict[str, Any], platform: Cpu, dtype: torch.dtype, head: int, message: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        Chooser(Settings.of(**settings), platform).choose("transformer", SELF, dtype, head)
    assert caught.value.message == message


def test_sparse_kernels_do_not_stand() -> None:
    with pytest.raises(NotBuilt, match="^attention_backend: vmoba_attn is not built yet"):
        choose(attention_backend="vmoba_attn")


def test_flash_attention_is_the_default_where_it_runs(packages: None) -> None:
    assert choose() == "torch_sdpa"
    assert [choose(gpu(name)) for name in ("sm75", "sm80", "sm90", "sm100", "rocm")] == [
        "torch_sdpa", "fa2", "fa4", "fa4", "fa2",
    ]  # fmt: skip
    assert choose(gpu("sm80"), attention_backend="fa") == "fa2"
    assert choose(gpu("sm80"), attention_backend="torch_sdpa") == "torch_sdpa"
    assert Chooser(Settings(), gpu("sm90")).choose("transformer", SELF, torch.float32, 128).name == "torch_sdpa"


def test_in_a_ring_a_kernel_must_tell_log_sum_exps(packages: None) -> None:
    def ring(platform: Cpu, **settings: Any) -> str:
        return Chooser(Settings.of(**settings), platform).choose("transformer", SELF, HALF, 128, ring=True).name

    assert [ring(gpu(name)) for name in ("sm80", "sm90", "sm100")] == ["fa2", "fa3", "fa2"]
    with pytest.raises(BadRequest) as caught:
        ring(gpu("sm90"), attention_backend="fa4")
    assert caught.value.message == (
        "attention_backend: fa4 cannot run here: it cannot join what the workers of a ring attend to; these can: "
        "torch_sdpa, fa2, fa3, torch_cudnn_sdpa, sage_attn"
    )


def test_the_nearest_setting_counts(packages: None) -> None:
    """Role, then component, then the first component of its kind, then the one for all."""
    hopper = gpu("sm90")
    given = {"transformer": "fa3", "transformer.cross": "torch_sdpa", "transformer_2": "fa2"}
    ask = {"attention_backend": "sage_attn", "component_attention_backends": given}
    chosen = {(c, r): choose(hopper, c, r, **ask) for c in ("transformer", "transformer_2") for r in (SELF, CROSS)}
    assert chosen == {
        ("transformer", SELF): "fa3",
        ("transformer", CROSS): "torch_sdpa",
        ("transformer_2", SELF): "fa2",
        ("transformer_2", CROSS): "fa2",
    }
    del given["transformer_2"]
    assert choose(hopper, "transformer_2", CROSS, **ask) == "torch_sdpa"
    assert choose(hopper, "transformer_2", SELF, **ask) == "fa3"
    assert choose(hopper, "another", SELF, **ask) == "sage_attn"


@pytest.mark.parametrize("name", ["conectors", "vae.self", "transformer.both", "transformer_2"])
def test_a_component_that_the_model_has_not(name: str) -> None:
    chooser = Chooser(Settings.of(component_attention_backends={name: "torch_sdpa"}), Cpu())
    with pytest.raises(BadRequest) as caught:
        chooser.check(("text_encoder", "transformer", "vae"))
    assert caught.value.message.startswith(
        f"component_attention_backends: {name!r} is none of text_encoder, transformer, vae, transformer.self, "
        "transformer.cross"
    )


def test_components_that_torch_alone_computes() -> None:
    Chooser(Settings.of(component_attention_backends={"text_encoder": "torch_sdpa"}), Cpu()).torch_only(
        "text_encoder", ""
    )
    chooser = Chooser(Settings.of(component_attention_backends={"text_encoder": "fa"}), Cpu())
    with pytest.raises(BadRequest, match=r"^component_attention_backends.text_encoder: fa cannot be used: it sings"):
        chooser.torch_only("text_encoder", "it sings")


def test_every_name_of_the_settings_has_its_kernel() -> None:
    assert {*BACKENDS, "fa"} == set(DENSE_ATTENTION)
    assert set(FLASH) <= set(BACKENDS)
