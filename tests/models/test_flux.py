"""FLUX.1 against diffusers: dev, schnell and Kontext, on several ranks, with adapters, pictures and real sizes."""

import json
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from sgld.errors import BadRequest, ModelError, NotBuilt, SgldError
from sgld.models import flux, names
from sgld.models.flux import Flux, FluxConfig, FluxTransformer
from sgld.nn.attention import TORCH
from sgld.nn.lora_formats import fit, read_adapter
from sgld.nn.mmdit import DualBlock, SingleBlock, TokenLayout, pack, unpack
from sgld.nn.parallel import Mesh
from sgld.nn.usp import SequenceAttention
from sgld.nn.weights import read_architecture
from sgld.resolve import resolve
from tests.models.contract import LAYERWISE, WHOLE
from tests.models.parity import (
    activate,
    apart,
    clipped_alike,
    edit,
    estimate_is_near_the_peak,
    fused,
    load,
    photo,
    picture,
    pictures_of_ranks,
    quiet,
    ranks_decode_tiles,
    same_state,
    shown,
    spelled,
    theirs,
    write_lora,
)
from tools.tiny import stir
from tools.twins.flux import MAKERS

REQUEST: dict[str, Any] = {
    "prompt": "a red cat on the green ball", "height": 32, "width": 48, "num_inference_steps": 3,
    "max_sequence_length": 16, "seed": 7,
}  # fmt: skip
GUIDED = {"true_cfg_scale": 2.5, "negative_prompt": "blurred dog"}
SMALL_SIZES = [(32, 48), (48, 32), (48, 48)]
Reference = Callable[..., Tensor]


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the twins `flux1-dev`, `flux1-schnell` and `flux1-kontext`."""
    folder = tmp_path_factory.mktemp("flux")
    for name, make in MAKERS.items():
        make(folder / name)
    return folder


@pytest.fixture(scope="module")
def dev(twins: Path) -> Flux:
    """The twin of dev."""
    family = load(twins / "flux1-dev")
    assert isinstance(family, Flux)
    return family


@pytest.fixture(scope="module")
def pipelines(twins: Path) -> Callable[[str], Any]:
    """diffusers' own pipelines of the twins."""
    from diffusers import DiffusionPipeline

    return cache(lambda name: quiet(DiffusionPipeline.from_pretrained(twins / name)))


@pytest.fixture(scope="module")
def reference(pipelines: Callable[[str], Any]) -> Reference:
    """Frames u8 [N, H, W, 3] of `REQUEST` with changes, as diffusers makes them in float32."""

    def make(name: str, **changes: Any) -> Tensor:
        request = REQUEST | changes
        if name == "flux1-kontext":
            request["max_area"] = request["height"] * request["width"]
        return theirs(pipelines(name), request)

    return make


@pytest.fixture(scope="module")
def cat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of 45 x 30 pixels."""
    return photo(tmp_path_factory.mktemp("pictures") / "cat.png", 45, 30)


@pytest.fixture
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures to edit are small, here and in diffusers."""
    from diffusers.pipelines.flux import pipeline_flux_kontext

    monkeypatch.setattr(flux, "KONTEXT_SIZES", SMALL_SIZES)
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", SMALL_SIZES)


# ------------------------------------------------------------------------------------------------------- parity


def test_every_kind_of_guidance_takes_part(dev: Flux) -> None:
    base = picture(dev, REQUEST)
    assert apart(base, picture(dev, REQUEST | {"guidance_scale": 3.5})) == 0
    assert apart(base, picture(dev, REQUEST | {"guidance_scale": 7.0})) > 20
    assert apart(base, picture(dev, REQUEST | {"true_cfg_scale": 1.0})) == 0
    guided = picture(dev, REQUEST | GUIDED)
    assert apart(base, guided) > 20
    assert apart(guided, picture(dev, REQUEST | GUIDED | {"negative_prompt": "still"})) > 20


@pytest.mark.proves("FluxKontextPipeline", "image-to-image")
@pytest.mark.usefixtures("small_sizes")
@pytest.mark.parametrize("changes", [{}, GUIDED], ids=["plain", "guided"])
def test_an_edit_as_diffusers_makes_it(twins: Path, reference: Reference, cat: Path, changes: dict[str, Any]) -> None:
    family = load(twins / "flux1-kontext")
    changes = changes | {"guidance_scale": 2.5}
    ours = picture(family, REQUEST | changes | {"image_path": [str(cat)]})
    assert apart(ours, reference("flux1-kontext", image=Image.open(cat), **changes)) <= 1
    assert apart(ours, picture(family, REQUEST | changes)) > 20


@pytest.mark.parametrize("size", [(1000, 703), (50, 47), (1024, 1024), (300, 4000), (16, 16)])
def test_the_size_that_kontext_sees(pipelines: Callable[[str], Any], size: tuple[int, int]) -> None:
    """The shape of 1000x703 is nearest to 1184x880, but not once its sides are cut to multiples of 16."""
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    assert flux.KONTEXT_SIZES == PREFERRED_KONTEXT_RESOLUTIONS
    asked: list[tuple[int, int]] = []

    class Asked(Exception):
        pass

    def resize(image: Any, height: int, width: int) -> Any:
        asked.append((width, height))
        raise Asked

    pipeline = pipelines("flux1-kontext")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Asked):
        patch.setattr(pipeline.image_processor, "resize", resize)
        pipeline(Image.new("RGB", size), "a cat", max_sequence_length=16)
    assert flux.seen_size(size, 16) == asked[0]


def started(pipelines: Callable[[str], Any], start: Path, request: Mapping[str, Any]) -> Tensor:
    """What diffusers makes of a picture to start from, but that its latents are the most likely ones, as ours are."""
    from diffusers import FluxImg2ImgPipeline
    from diffusers.pipelines.flux import pipeline_flux_img2img as module

    pipeline = quiet(FluxImg2ImgPipeline(**pipelines("flux1-dev").components))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "retrieve_latents", lambda encoded, **_: encoded.latent_dist.mode())
        return theirs(pipeline, {**request, "image": Image.open(start)})


START = GUIDED | {"strength": 0.5, "num_inference_steps": 4, "guidance_scale": 3.5}


@pytest.mark.proves("FluxPipeline", "image-to-image")
def test_a_picture_to_start_from_as_diffusers_makes_it(
    dev: Flux, pipelines: Callable[[str], Any], tmp_path: Path
) -> None:
    start = photo(tmp_path / "start.png", 48, 32)
    ours = picture(dev, REQUEST | START | {"image_path": [str(start)]})
    assert apart(ours, started(pipelines, start, REQUEST | START)) <= 1
    assert apart(ours, picture(dev, REQUEST | START | {"image_path": [str(start)], "strength": 1.0})) > 20


def test_a_mask_leaves_the_rest_alone(dev: Flux, cat: Path, tmp_path: Path) -> None:
    mask = np.zeros((30, 45), np.uint8)
    mask[:, :20] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    request = REQUEST | {"height": 16, "width": 32, "image_path": [str(cat)], "mask_path": str(tmp_path / "mask.png")}
    made, other = (picture(dev, request | {"seed": seed}) for seed in (7, 8))
    assert apart(made[..., 20:, :], other[..., 20:, :]) == 0
    assert apart(made[..., :10, :], other[..., :10, :]) > 20


# -------------------------------------------------------------------------------------------------------- ranks

SPLITS: dict[int, list[dict[str, Any]]] = {
    2: [{"ulysses_degree": 2}, {"ring_degree": 2, "tp_size": 2}, {"enable_cfg_parallel": True}],
    4: [{"ulysses_degree": 2, "ring_degree": 2}, {"enable_cfg_parallel": True, "ring_degree": 2}],
}


def _small_sizes() -> None:
    flux.KONTEXT_SIZES[:] = SMALL_SIZES


@pytest.mark.proves("FluxPipeline", "USP", "CFG parallel")
@pytest.mark.proves("FluxKontextPipeline", "USP", "CFG parallel")
@pytest.mark.usefixtures("small_sizes")
@pytest.mark.parametrize("world", SPLITS)
def test_ranks_make_the_picture_of_diffusers(
    twins: Path, reference: Reference, pipelines: Callable[[str], Any], cat: Path, tmp_path: Path, world: int
) -> None:
    """With and without a picture; 3 tokens do not divide."""
    start = photo(tmp_path / "start.png", 48, 32)
    expected = [
        reference("flux1-dev", **GUIDED, guidance_scale=3.5),
        started(pipelines, start, REQUEST | START),
        reference("flux1-kontext", **GUIDED, guidance_scale=2.5),
        reference("flux1-kontext", height=16, image=Image.open(cat), guidance_scale=2.5),
    ]
    asked = [
        ("flux1-dev", REQUEST | GUIDED),
        ("flux1-dev", REQUEST | START | {"image_path": [str(start)]}),
        ("flux1-kontext", REQUEST | GUIDED),
        ("flux1-kontext", REQUEST | {"height": 16, "image_path": [str(cat)]}),
    ]
    cases = [(twins / name, request, split) for split in SPLITS[world] for name, request in asked]
    for made, one in zip(
        pictures_of_ranks(world, tmp_path / "store", cases, _small_sizes), expected * len(SPLITS[world]), strict=True
    ):
        assert apart(made, one) <= 1


def test_ranks_decode_a_tile_each(twins: Path, tmp_path: Path) -> None:
    ranks_decode_tiles(tmp_path / "store", twins / "flux1-dev", REQUEST, 32, 16)


# ------------------------------------------------------------------------------------------------------- weights

REAL = {  # as the repositories' transformer/config.json have them
    "attention_head_dim": 128, "guidance_embeds": True, "in_channels": 64, "joint_attention_dim": 4096,
    "num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38, "patch_size": 1,
    "pooled_projection_dim": 768,
}  # fmt: skip


@pytest.mark.parametrize("guided", [True, False], ids=["dev", "schnell"])
def test_full_size(guided: bool) -> None:
    from diffusers import FluxTransformer2DModel

    config = REAL | {"guidance_embeds": guided}
    with torch.device("meta"):
        ours = FluxTransformer(FluxConfig(**config), Mesh.solo(), TORCH)
        theirs = FluxTransformer2DModel(**config)
    same_state(ours, theirs)
    assert 11.8e9 < sum(p.numel() for p in ours.parameters()) < 12.0e9


@pytest.mark.usefixtures("small_sizes")
@pytest.mark.parametrize("settings", [WHOLE, LAYERWISE], ids=lambda s: next(iter(s)))
def test_offloaded_weights_make_the_same_edit(twins: Path, cat: Path, settings: dict[str, Any]) -> None:
    request = REQUEST | GUIDED | {"image_path": [str(cat)]}
    expected = picture(load(twins / "flux1-kontext"), request)
    family = load(twins / "flux1-kontext", **settings)
    for _ in range(2):
        assert torch.equal(picture(family, request), expected)


def test_precision(twins: Path, dev: Flux) -> None:
    family = load(twins / "flux1-dev", precision="bf16", vae_precision="bf16", text_encoder_precisions=["fp32", "bf16"])
    assert isinstance(family, Flux)
    modules = (family.transformer, family.vae.module, family.clip.module, family.t5.module)
    assert [next(m.parameters()).dtype for m in modules] == [torch.bfloat16] * 2 + [torch.float32, torch.bfloat16]
    frames = picture(family, REQUEST)
    assert 0 < apart(frames, picture(dev, REQUEST)) < 128


@pytest.mark.parametrize("ours", [DualBlock, SingleBlock])
def test_half_precision_stays_finite(ours: type[DualBlock] | type[SingleBlock]) -> None:
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock

    torch.manual_seed(0)
    size = 16, 2, 8
    block = (FluxTransformerBlock if ours is DualBlock else FluxSingleTransformerBlock)(*size).half()
    stir(block, 1.0)
    if ours is DualBlock:
        block.ff_context.net[2].weight.data *= 16  # the last addition, not one before it, goes too far
    own = ours(*size, SequenceAttention(Mesh.solo(), TORCH)).half()
    own.load_state_dict(block.state_dict())
    x, text, emb = (torch.randn(shape).half() for shape in ((1, 6, 16), (1, 5, 16), (1, 16)))
    text = (60000 if ours is DualBlock else 65500) * text.sign()
    with torch.inference_mode():
        told, seen = block(x, text, emb)
        clipped_alike(own(x, text, emb, TokenLayout(None, None, 6)), (seen, told))  # type: ignore[arg-type]


def test_pack_and_unpack_are_inverse() -> None:
    z = torch.randn(1, 4, 6, 10)
    assert pack(z).shape == (1, 15, 16)
    assert torch.equal(unpack(pack(z), (3, 5)), z)


# ---------------------------------------------------------------------------------------------------------- lora

PARTS = {  # of the fused layers
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}
NAMES = {
    "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj", "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2", "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
    "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin", "norm.linear": "modulation.lin",
    "proj_out": "linear2",
}  # fmt: skip
OUTSIDE = {
    "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
}  # fmt: skip


def authors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter of diffusers' names in the authors', with their fused layers."""
    left = {key.removeprefix("transformer."): x for key, x in tensors.items()}
    renamed = dict(OUTSIDE)
    made: dict[str, Tensor] = {}
    for ours, other in (("transformer_blocks", "double_blocks"), ("single_transformer_blocks", "single_blocks")):
        for block in sorted({key.split(".")[1] for key in left if key.startswith(f"{ours}.")}):
            for name, parts in PARTS.items():
                if (name == "linear1") == (other == "single_blocks"):
                    made |= fused(left, [f"{ours}.{block}.{part}" for part in parts], f"{other}.{block}.{name}")
            renamed |= {f"{ours}.{block}.{one}": f"{other}.{block}.{another}" for one, another in NAMES.items()}
    for one, other in renamed.items():
        for part in "AB":
            if (x := left.get(f"{one}.lora_{part}.weight")) is not None:
                swapped = (one, part) == ("norm_out.linear", "B")
                made[f"{other}.lora_{part}.weight"] = x.roll(len(x) // 2, 0) if swapped else x
    return made


@pytest.mark.proves("FluxPipeline", "LoRA")
@pytest.mark.proves("FluxKontextPipeline", "LoRA")
@pytest.mark.usefixtures("small_sizes")
@pytest.mark.parametrize("name", ["flux1-dev", "flux1-kontext"])
def test_adapters_of_every_spelling_as_diffusers_wears_them(
    twins: Path, reference: Reference, pipelines: Callable[[str], Any], cat: Path, tmp_path: Path, name: str
) -> None:
    pipeline, family = pipelines(name), load(twins / name)
    file = write_lora(tmp_path / "lora.safetensors", pipeline.transformer)
    seen = {"image": Image.open(cat)} if name == "flux1-kontext" else {}
    request = REQUEST | {"guidance_scale": 3.5} | ({"image_path": [str(cat)]} if seen else {})
    before = picture(family, request)
    activate(family, file)
    worn = picture(family, request)
    pipeline.load_lora_weights(file)
    expected = reference(name, guidance_scale=3.5, **seen)
    pipeline.unload_lora_weights()
    assert apart(worn, expected) <= 1
    assert apart(worn, before) > 20
    tensors = load_file(file)
    renamed = authors(tensors)
    assert sum(x.numel() for x in renamed.values()) > sum(x.numel() for x in tensors.values())  # fused, and all of it
    for spelling in ("authors", "comfy", "kohya"):
        family.lora["transformer"].clear()
        activate(family, spelled(renamed, spelling, tmp_path / f"{spelling}.safetensors"))
        assert apart(picture(family, request), worn) <= 1
    family.lora["transformer"].clear()
    assert torch.equal(picture(family, request), before)


def test_adapters_of_xlabs_as_diffusers_wears_them(
    dev: Flux, reference: Reference, pipelines: Callable[[str], Any], tmp_path: Path
) -> None:
    sizes = {
        "double_blocks.0.processor.qkv_lora1": (144, 48), "double_blocks.0.processor.proj_lora1": (48, 48),
        "double_blocks.0.processor.qkv_lora2": (144, 48), "double_blocks.0.processor.proj_lora2": (48, 48),
        "single_blocks.1.processor.qkv_lora": (144, 48), "single_blocks.1.processor.proj_lora": (48, 240),
    }  # fmt: skip
    tensors = {}
    for name, (out, inner) in sizes.items():
        tensors |= {f"{name}.down.weight": torch.randn(2, inner) / 2, f"{name}.up.weight": torch.randn(out, 2) / 2}
    save_file(tensors, tmp_path / "lora.safetensors")
    before = picture(dev, REQUEST)
    activate(dev, tmp_path / "lora.safetensors")
    worn = picture(dev, REQUEST)
    dev.lora["transformer"].clear()
    pipelines("flux1-dev").load_lora_weights(tmp_path / "lora.safetensors")
    expected = reference("flux1-dev")
    pipelines("flux1-dev").unload_lora_weights()
    assert apart(worn, expected) <= 1
    assert apart(worn, before) > 20


def test_full_size_adapters_as_diffusers_reads_them(tmp_path: Path) -> None:
    """kohya's file: alpha, fused rows of four sizes, swapped halves."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers as convert

    with torch.device("meta"):
        model = FluxTransformer(FluxConfig(**REAL), Mesh.solo(), TORCH)
    sizes = {
        "double_blocks_18_img_attn_qkv": (9216, 3072), "double_blocks_0_txt_attn_qkv": (9216, 3072),
        "single_blocks_37_linear1": (21504, 3072), "single_blocks_0_linear2": (3072, 15360),
        "double_blocks_3_txt_mlp_2": (3072, 12288), "final_layer_adaLN_modulation_1": (6144, 3072),
        "guidance_in_in_layer": (3072, 256),
    }  # fmt: skip
    tensors = {}
    for name, (out, inner) in sizes.items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(2, inner)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(out, 2)
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(2.0 if "final" in name else 1.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = fit(read_adapter(tmp_path / "lora.safetensors"), shapes, names.FLUX)
    theirs = {key.removeprefix("transformer."): x for key, x in convert(dict(tensors)).items()}
    assert len(theirs) == 2 * len(found.layers) == 2 * (3 + 3 + 4 + 4)
    for name, delta in found.layers.items():
        assert delta.up is not None and delta.down is not None
        assert torch.equal(delta.up, theirs[f"{name}.lora_B.weight"])
        assert torch.equal(delta.down * delta.scale, theirs[f"{name}.lora_A.weight"])


# ------------------------------------------------------------------------------------------------------ requests


def test_info(twins: Path, dev: Flux) -> None:
    info = dev.info
    assert (info.name, info.kind, info.size_multiple, info.frame_multiple) == ("FluxPipeline", "image", 16, 1)
    assert (info.defaults["guidance_scale"], info.defaults["num_inference_steps"]) == (3.5, 50)
    assert (info.defaults["width"], info.defaults["height"]) == (1024, 1024)
    assert (info.pictures.max, info.pictures.starts_denoising) == (1, True)
    assert info.tasks == ("text-to-image", "image-to-image")
    assert set(info.unsupported) == {"cfg_normalization", "guidance_scale_2", "boundary_ratio", "diffusers_kwargs"}
    info = load(twins / "flux1-schnell").info
    assert (info.defaults["num_inference_steps"], info.defaults["max_sequence_length"]) == (4, 256)
    with pytest.raises(NotBuilt, match="guidance_scale: this model cannot use it: .*trained without"):
        resolve(REQUEST | {"guidance_scale": 3.5}, info)
    info = load(twins / "flux1-kontext").info
    assert (info.name, info.pictures.max, info.pictures.starts_denoising) == ("FluxKontextPipeline", 1, False)
    assert info.defaults["guidance_scale"] == 2.5


def test_bad_requests(dev: Flux, cat: Path) -> None:
    with pytest.raises(BadRequest, match="height: 40 is not a multiple of 16"):
        resolve(REQUEST | {"height": 40}, dev.info)
    with pytest.raises(BadRequest, match="max_sequence_length: 513 .* allowed is 1 to 512"):
        resolve(REQUEST | {"max_sequence_length": 513}, dev.info)
    with pytest.raises(BadRequest, match="image_path: 2 given; this model takes 1"):
        resolve(REQUEST | {"image_path": [str(cat)] * 2}, dev.info)


def test_attention_that_it_has_not(twins: Path) -> None:
    with pytest.raises(BadRequest, match=r"transformer\.cross: this model has no such attention: .*; leave it out"):
        load(twins / "flux1-dev", component_attention_backends={"transformer.cross": "torch_sdpa"})
    load(twins / "flux1-dev", component_attention_backends={"transformer.self": "torch_sdpa"})


def notes(family: Flux, **changes: Any) -> list[str]:
    with torch.inference_mode():
        return family.encode(resolve(REQUEST | changes, family.info).params, [])[1]


def test_warnings(dev: Flux) -> None:
    assert notes(dev) == []
    assert notes(dev, **GUIDED) == []
    assert notes(dev, negative_prompt="blurred") == [
        "negative_prompt: it has no effect without a true_cfg_scale above 1"
    ]
    assert notes(dev, **GUIDED | {"negative_prompt": "a red dog " * 60}) == [
        "negative_prompt: the first of two text encoders reads 77 of its 182 tokens",
        "negative_prompt cut from 181 to 16 tokens, the most this request allows",
    ]


def test_tokens_are_counted(dev: Flux) -> None:
    params = resolve(REQUEST, dev.info).params
    with torch.inference_mode():
        condition, _ = dev.encode(params, [])
    assert (condition.prompt_tokens, condition.latent_tokens) == (8, 6)
    assert condition.positive.text.shape == (1, 16, 32)


@pytest.mark.proves("FluxPipeline", "previews")
@pytest.mark.proves("FluxKontextPipeline", "previews")
@pytest.mark.usefixtures("small_sizes")
@pytest.mark.parametrize("name", ["flux1-dev", "flux1-kontext"])
def test_previews(twins: Path, cat: Path, name: str) -> None:
    """The first, from pure noise, is what a single step without true guidance makes."""
    family = load(twins / name)
    request = REQUEST | GUIDED | ({"image_path": [str(cat)]} if name == "flux1-kontext" else {})
    made, previews = shown(family, request | {"num_inference_steps": 4}, 2)
    assert [tuple(frames.shape) for frames in previews] == [(1, 32, 48, 3)] * 2
    once = request | {"num_inference_steps": 1, "true_cfg_scale": 1.0}
    assert apart(previews[0], picture(family, once)) <= 1
    assert apart(previews[0], previews[1]) > 5
    assert torch.equal(made, picture(family, request | {"num_inference_steps": 4}))


def test_the_estimate_of_an_edit_is_near_the_measured_peak(twins: Path, tmp_path: Path) -> None:
    """A megapixel is seen, however small the picture to make."""
    once = REQUEST | {"num_inference_steps": 1}
    edits = once | {"image_path": [str(photo(tmp_path / "photo.png", 1024, 1024))]}
    estimate_is_near_the_peak(tmp_path / "store", twins / "flux1-kontext", once, edits, below=1.4)


# -------------------------------------------------------------------------------------------------- other models


@pytest.fixture
def copy(twins: Path, tmp_path: Path) -> Path:
    """A twin to break."""
    return Path(shutil.copytree(twins / "flux1-dev", tmp_path / "model"))


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("model_index.json", {"text_encoder_2": [None, None]}, "lacks text_encoder_2"),
        ("transformer/config.json", {"_class_name": "Flux2Transformer2DModel"}, "only 'FluxTransformer2DModel'"),
        ("transformer/config.json", {"num_layers": 2}, r"tensors missing: transformer_blocks\.1\."),
        ("transformer/config.json", {"guidance_embeds": False}, "4 tensors unexpected: time_text_embed.guidance_"),
        ("transformer/config.json", {"out_channels": 4}, "out_channels 4 is not supported"),
        ("transformer/config.json", {"pooled_projection_dim": 20}, r"\[48, 24\] instead of \[48, 20\]"),
        ("vae/config.json", {"_class_name": "AutoencoderKLFlux2"}, "only 'AutoencoderKL'"),
        ("text_encoder_2/config.json", {"num_layers": 3}, r"text_encoder_2: 9 tensors missing: encoder\.block\.2"),
        ("text_encoder/config.json", {"num_hidden_layers": 1}, "text_encoder: 16 tensors unexpected"),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "use_karras_sigmas"),
        ("scheduler/scheduler_config.json", {"_class_name": "UniPCMultistepScheduler"}, "only 'FlowMatchEuler"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(copy: Path, file: str, changes: dict[str, Any], says: str) -> None:
    edit(copy / file, **changes)
    with pytest.raises(ModelError, match=says) as caught:
        picture(load(copy), REQUEST)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer_2", "scheduler"])
def test_a_missing_component_is_named(copy: Path, part: str) -> None:
    shutil.rmtree(copy / part)
    with pytest.raises(ModelError, match=f"/{part}: no such folder"):
        load(copy)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_missing_weights_are_named(copy: Path, part: str) -> None:
    for file in (copy / part).glob("*.safetensors"):
        file.unlink()
    with pytest.raises(SgldError, match=f"/{part}: "):
        load(copy)


def test_components_that_do_not_fit_each_other(copy: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    shutil.rmtree(copy / "text_encoder_2")
    config = T5Config(d_model=16, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=120)
    T5EncoderModel(config).save_pretrained(copy / "text_encoder_2")
    with pytest.raises(ModelError, match="takes 4 latent channels and text of 24 and 32, .* make 24 and 16"):
        load(copy)


def test_config_of_the_real_model(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(REAL | {"_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.30.0.dev0"}))
    c = read_architecture(file, FluxConfig)
    assert (c.dim, c.axes_dims_rope) == (3072, (16, 56, 56))
