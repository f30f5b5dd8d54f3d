"""Wan against diffusers: the transformer, whole generations, and what our short cuts change (nothing)."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from sgld.errors import ModelError, SgldError
from sgld.messages import Load
from sgld.models import load_family, wan
from sgld.models.text import pad
from sgld.models.wan import Wan
from sgld.models.wan_transformer import WanConfig, WanTransformer
from sgld.nn.attention import TORCH
from sgld.nn.parallel import Mesh
from sgld.nn.weights import load_module, read_architecture
from sgld.params import PictureRule
from sgld.platform import Cpu
from sgld.resolve import resolve
from sgld.settings import Settings
from tests.models.conftest import generate, levels_apart, load
from tests.models.parity import edit


def transformer(folder: Path) -> WanTransformer:
    """The one of that folder, in float32."""
    config = read_architecture(folder / "config.json", WanConfig)
    return load_module(lambda: WanTransformer(config, Mesh.solo(), TORCH), folder, torch.float32, torch.device("cpu"))


def test_another_scheduler_as_with_diffusers(twins: Path, reference: Callable[..., Tensor]) -> None:
    ours = generate(load(twins / "wan21-euler"))
    assert levels_apart(ours, reference(twins / "wan21-euler")) <= 1
    assert levels_apart(ours, reference(twins / "wan21-euler", seed=8)) > 20


def test_both_experts_and_guidance_scales_take_part(twins: Path) -> None:
    family = load(twins / "wan22-a14b")
    base = generate(family)
    assert levels_apart(base, generate(family, guidance_scale=2.0, guidance_scale_2=5.0)) > 5
    assert levels_apart(base, generate(family, guidance_scale_2=1.5)) > 5
    assert levels_apart(base, generate(family, boundary_ratio=0.5)) > 5


def test_transformer_equals_diffusers(twins: Path) -> None:
    from diffusers import WanTransformer3DModel

    folder = twins / "wan21" / "transformer"
    theirs = WanTransformer3DModel.from_pretrained(folder)
    ours = transformer(folder)
    x, text = torch.randn(2, 4, 3, 4, 6), torch.randn(2, 512, 32)
    with torch.inference_mode():
        expected = theirs(x, torch.full((2,), 873), text, return_dict=False)[0]
        assert (ours(x, torch.tensor(873), ours.text_keys(text)) - expected).abs().max() < 1e-5
        assert (ours(x, torch.tensor(500), ours.text_keys(text)) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("lengths", [(5, 2), (12, 12), (1, 11)])
def test_one_biased_key_stands_for_all_padding(twins: Path, lengths: tuple[int, int]) -> None:
    """Prompts that leave much, no and little room for padding."""
    ours = transformer(twins / "wan21" / "transformer")
    texts: list[Tensor | None] = [torch.randn(1, n, 32) for n in lengths]
    x, t = torch.randn(2, 4, 3, 4, 6), torch.tensor(700)
    with torch.inference_mode():
        padded = ours(x, t, ours.text_keys(*pad(texts, 12, fold=False)))
        folded = ours(x, t, ours.text_keys(*pad(texts, 12, fold=True)))
        longer = ours(x, t, ours.text_keys(*pad(texts, 500, fold=True)))
    assert (padded - folded).abs().max() < 1e-5
    assert (padded - longer).abs().max() > 1e-3


@attrs.frozen
class SlowBias(Cpu):
    """A CPU that says, as CUDA does, that a bias slows attention down."""

    biased_attention_is_fast = False


def test_short_cuts_change_nothing(twins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batched guidance and folded padding against two calls with all 512 text tokens."""
    fast = generate(load(twins / "wan21"))
    monkeypatch.setattr(wan, "BATCH_TOKENS", 0)
    monkeypatch.setattr("tests.models.conftest.Cpu", SlowBias)
    assert levels_apart(fast, generate(load(twins / "wan21"))) <= 1


def test_text_keys_are_computed_once_per_expert(twins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    read = WanTransformer.text_keys
    monkeypatch.setattr(WanTransformer, "text_keys", lambda self, *a: calls.append(self) or read(self, *a))
    generate(load(twins / "wan22-a14b"))
    assert len(calls) == len(set(calls)) == 2


def test_info(twins: Path) -> None:
    info = load(twins / "wan21").info
    assert (info.name, info.kind, info.size_multiple, info.frame_multiple) == ("WanPipeline", "video", 16, 4)
    assert info.components == ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
    assert info.defaults["guidance_scale"] == 3.0
    of_others = {"true_cfg_scale", "cfg_normalization", "diffusers_kwargs"}
    assert set(info.unsupported) == {"guidance_scale_2", "boundary_ratio"} | of_others
    assert (info.pictures, info.fixed_steps) == (PictureRule(max=1), None)
    info = load(twins / "wan22-a14b").info
    assert set(info.unsupported) == of_others
    assert (info.defaults["guidance_scale_2"], info.defaults["boundary_ratio"]) == (3.0, 0.875)


@pytest.fixture
def copy(twins: Path, tmp_path: Path) -> Path:
    """A twin to break."""
    return Path(shutil.copytree(twins / "wan21", tmp_path / "model"))


def test_a_negative_prompt_without_guidance_is_told(twins: Path) -> None:
    told = ["negative_prompt: it has no effect without a guidance_scale above 1"]
    family, given = load(twins / "wan21"), {"prompt": "a cat", "negative_prompt": "blue"}
    own = {"negative_prompt": family.info.defaults["negative_prompt"]}
    for changes, expected in (({"guidance_scale": 1.0}, told), ({}, []), (own | {"guidance_scale": 1.0}, [])):
        params = resolve(given | changes, family.info).params
        assert family.encode(params, [])[1] == expected


def test_generation_config_gives_the_defaults(copy: Path) -> None:
    (copy / "generation_config.json").write_text('{"height": 64, "num_inference_steps": 4}')
    assert load(copy).info.defaults == {"height": 64, "num_inference_steps": 4}
    (copy / "generation_config.json").write_text('{"heigth": 64}')
    with pytest.raises(SgldError, match=r"heigth.*height"):
        load(copy)


@pytest.mark.parametrize(
    ("file", "changes", "error", "says"),
    [
        ("model_index.json", {"_class_name": "WanPipelin"}, ModelError, "did you mean WanPipeline"),
        ("model_index.json", {"vae": [None, None]}, ModelError, "lacks vae"),
        ("transformer/config.json", {"in_channels": 8}, ModelError, r"in_channels: 8 is not supported; only 4, or 12"),
        ("transformer/config.json", {"num_layers": 3}, ModelError, r"27 tensors missing: blocks\.2\."),
        ("transformer/config.json", {"ffn_dim": 100}, ModelError, r"ffn.*\[96, 48\] instead of \[100, 48\]"),
        ("transformer/config.json", {"num_layers": 1}, ModelError, r"27 tensors unexpected: blocks\.1\."),
        ("text_encoder/config.json", {"model_type": "t5"}, ModelError, "only 'umt5' is supported"),
        ("vae/config.json", {"_class_name": "AutoencoderKL"}, ModelError, "only AutoencoderKLWan"),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, ModelError, "use_karras_sigmas"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    copy: Path, file: str, changes: dict[str, Any], error: type[SgldError], says: str
) -> None:
    edit(copy / file, **changes)
    with pytest.raises(error, match=says) as caught:
        generate(load(copy))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component_is_named(copy: Path, part: str) -> None:
    shutil.rmtree(copy / part)
    with pytest.raises(ModelError, match=part):
        load(copy)


def test_components_that_do_not_fit_each_other(twins: Path) -> None:
    demo = Path(__file__).parents[2] / "sgld" / "demo"
    command = Load(Settings(), twins / "wan21", {"vae": demo / "vae"})
    with pytest.raises(ModelError, match="4 latent channels and text of 32, the vae has"):
        load_family(command, Mesh.solo(), Cpu(), lambda step, total: None)


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no model_index"):
        load(tmp_path)


@pytest.mark.parametrize(("dtype", "nearer"), [(torch.bfloat16, 4), (torch.float16, 1.5)])
def test_transformer_equals_diffusers_in_half_precision(twins: Path, dtype: torch.dtype, nearer: float) -> None:
    """The time, the modulation and the norms stay in float32: that is nearer than where they do not."""
    from diffusers import WanTransformer3DModel

    folder = twins / "wan21" / "transformer"
    theirs = WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype)
    config = read_architecture(folder / "config.json", WanConfig)
    make = partial(WanTransformer, config, Mesh.solo(), TORCH)
    ours, plain = (load_module(make, folder, dtype, torch.device("cpu"), precise=p) for p in (wan.PRECISE, ()))
    assert {name: x.dtype for name, x in ours.state_dict().items()} == {
        name: x.dtype for name, x in theirs.state_dict().items()
    }
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 4, 3, 4, 6, generator=generator), torch.randn(1, 512, 32, generator=generator)
    with torch.inference_mode():
        for t in (999, 873, 401, 12):
            expected = theirs(x.to(dtype), torch.tensor([t]), text.to(dtype), return_dict=False)[0].float()
            found, coarse = (m(x, torch.tensor(t), m.text_keys(text)).float() - expected for m in (ours, plain))
            assert nearer * found.norm() < coarse.norm()


def test_precision(twins: Path) -> None:
    family = load(twins / "wan21", precision="bf16")
    assert isinstance(family, Wan)
    assert family.transformers["transformer"].compute_dtype == torch.bfloat16
    frames = generate(family)
    assert 0 < levels_apart(frames, generate(load(twins / "wan21"))) < 128
