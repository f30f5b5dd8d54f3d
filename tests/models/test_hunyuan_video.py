"""HunyuanVideo against diffusers: whole generations, the full-size keys, adapters, and what requests mean."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from sgld.errors import BadRequest, ModelError, NotBuilt
from sgld.models import names
from sgld.models.hunyuan_video import (
    SYSTEM_TOKENS,
    TEMPLATE,
    HunyuanVideo,
    HunyuanVideoConfig,
    HunyuanVideoTransformer,
)
from sgld.nn.attention import TORCH
from sgld.nn.lora_formats import fit, read_adapter
from sgld.nn.parallel import Mesh
from sgld.nn.weights import Uninitialized, read_architecture
from sgld.resolve import resolve
from tests.models.parity import (
    activate,
    apart,
    edit,
    levels,
    load,
    picture,
    picture_of_ranks,
    quiet,
    same_state,
    tiles,
    write_both,
)
from tools.twins import hunyuan_video as twins

REQUEST = {
    "prompt": "a red cat {over} the green ball &amp; 2 dogs", "height": 32, "width": 48, "num_frames": 9,
    "num_inference_steps": 3, "guidance_scale": 6.0, "seed": 7,
}  # fmt: skip
GUIDED = REQUEST | {"negative_prompt": "blurred", "true_cfg_scale": 3.0, "guidance_scale": 2.5}
FULL = {"_class_name": "HunyuanVideoTransformer3DModel", "_diffusers_version": "0.32.0.dev0"} | {
    "attention_head_dim": 128, "guidance_embeds": True, "in_channels": 16, "mlp_ratio": 4.0,
    "num_attention_heads": 24, "num_layers": 20, "num_refiner_layers": 2, "num_single_layers": 40, "out_channels": 16,
    "patch_size": 2, "patch_size_t": 1, "pooled_projection_dim": 768, "qk_norm": "rms_norm",
    "rope_axes_dim": [16, 56, 56], "rope_theta": 256.0, "text_embed_dim": 4096,
}  # fmt: skip


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return twins.make_hunyuan_video(tmp_path_factory.mktemp("twins") / "video")


@pytest.fixture(scope="module")
def pipeline(twin: Path) -> Any:
    """diffusers' own, in float32."""
    from diffusers import HunyuanVideoPipeline

    return quiet(HunyuanVideoPipeline.from_pretrained(twin))


@pytest.fixture(scope="module")
def reference(pipeline: Any) -> Callable[..., Tensor]:
    """Frames u8 [N, H, W, 3] of a request with changes, as diffusers makes them."""

    def make(request: Mapping[str, Any] = REQUEST, **changes: Any) -> Tensor:
        given = {**request, **changes}
        generator = torch.Generator("cpu").manual_seed(given.pop("seed"))
        return levels(pipeline(**given, generator=generator, output_type="np").frames)

    return make


@pytest.fixture(scope="module")
def plain(twin: Path) -> Tensor:
    return picture(load(twin), REQUEST)


@pytest.fixture(scope="module")
def guided(twin: Path) -> Tensor:
    return picture(load(twin), GUIDED)


# ------------------------------------------------------------------------------------------------------- parity


@pytest.mark.proves("HunyuanVideoPipeline", "text-to-image")
@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_scale": 1.0},
        {"num_frames": 1},
        {"num_inference_steps": 1},
        {"num_frames": 33},  # more than the autoencoder decodes at once
        {"max_sequence_length": 4},
        {"prompt": ""},
        {"prompt": "a red cat over the green ball " * 40},  # too long for either encoder
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_same_picture_at_the_edges(
    twin: Path, plain: Tensor, reference: Callable[..., Tensor], changes: dict[str, Any]
) -> None:
    ours = picture(load(twin), REQUEST | changes)
    assert apart(ours, reference(**changes)) <= 1
    assert ours.shape != plain.shape or apart(ours, plain) > 5


TILES = tiles(32, 16)
SHARED = {"tp_size": 2, "vae_sp": True, "vae_config": TILES}


def test_two_ranks_share_tiles_of_the_decoding(
    twin: Path, tmp_path: Path, plain: Tensor, pipeline: Any, reference: Callable[..., Tensor]
) -> None:
    ours = picture_of_ranks(2, tmp_path / "store", twin, REQUEST, **SHARED)
    pipeline.vae.enable_tiling(**TILES)
    expected = reference()
    pipeline.vae.disable_tiling()
    assert apart(ours, expected) <= 1
    assert apart(ours, plain) > 1  # tiles make a difference


def test_the_negative_prompt_is_empty_by_default(twin: Path, guided: Tensor) -> None:
    family = load(twin)
    empty = picture(family, GUIDED | {"negative_prompt": None})
    assert torch.equal(empty, picture(family, GUIDED | {"negative_prompt": ""}))
    assert apart(empty, guided) > 20


def test_tiles_are_diffusers_own(twin: Path, pipeline: Any, reference: Callable[..., Tensor]) -> None:
    oblong = {"tile_sample_min_height": 32, "tile_sample_min_width": 32} | {
        "tile_sample_stride_height": 16, "tile_sample_stride_width": 24,
    }  # fmt: skip
    ours = picture(load(twin, vae_config=oblong), REQUEST | {"num_frames": 29})
    pipeline.vae.enable_tiling(**oblong)
    theirs = reference(num_frames=29)
    pipeline.vae.disable_tiling()
    assert apart(ours, theirs) <= 1
    whole = reference(num_frames=29)
    assert apart(ours, whole) > 1
    sizes = {"tile_sample_min_height": 32}
    with pytest.raises(BadRequest, match=r"vae_config.tile_sample_min_height: it has no effect without vae_tiling"):
        load(twin, vae_tiling=False, vae_config=sizes)


def test_full_size_keys_and_shapes(tmp_path: Path) -> None:
    """tencent/HunyuanVideo: 20 dual and 40 single blocks; FastHunyuan has the same."""
    from diffusers import HunyuanVideoTransformer3DModel

    (tmp_path / "config.json").write_text(json.dumps(FULL))
    config = read_architecture(tmp_path / "config.json", HunyuanVideoConfig)
    with torch.device("meta"), Uninitialized():
        ours = HunyuanVideoTransformer(config, Mesh.solo(), TORCH)
        theirs = HunyuanVideoTransformer3DModel.from_config(FULL)
    same_state(ours, theirs)
    assert sum(p.numel() for p in ours.parameters()) == 12_821_012_544


# --------------------------------------------------------------------------------------------- weights and pictures


def test_precisions(twin: Path) -> None:
    """A thousand times a guidance scale of 8 is the same number in bf16; one of 6 is not, and says something else."""
    request = REQUEST | {"guidance_scale": 8.0}
    family = load(twin, precision="bf16", text_encoder_precisions=["fp16", "fp32"], vae_precision="bf16")
    assert isinstance(family, HunyuanVideo)
    modules = family.transformer, family.llama.module, family.clip.module, family.vae.module
    kinds = [{p.dtype for p in module.parameters()} for module in modules]
    assert kinds == [{torch.bfloat16}, {torch.float16}, {torch.float32}, {torch.bfloat16}]
    difference = picture(family, request).float() - picture(load(twin), request).float()
    assert 0 < difference.abs().mean() < 10


@pytest.mark.proves("HunyuanVideoPipeline", "image-to-video", "image-to-image")
@pytest.mark.parametrize("frames", [1, 9])
def test_a_picture_to_start_from(
    twin: Path, tmp_path: Path, pipeline: Any, reference: Callable[..., Tensor], frames: int
) -> None:
    """diffusers has no such pipeline, but its own takes latents, and noise levels to begin with."""
    pixels = np.stack(np.meshgrid(np.arange(48) * 5, np.arange(32) * 8), -1) @ np.array([[1, 0, 0.5], [0, 1, 0.5]])
    file = tmp_path / "slope.png"
    Image.fromarray(pixels.astype(np.uint8)).save(file)
    family, request = load(twin), REQUEST | {"num_inference_steps": 4, "num_frames": frames}
    ours = picture(family, request | {"image_path": [str(file)], "strength": 0.5})
    clip = torch.from_numpy(pixels.astype(np.uint8)).permute(2, 0, 1)[None, :, None].expand(-1, -1, frames, -1, -1)
    with torch.inference_mode():
        clean = pipeline.vae.encode(clip / 127.5 - 1).latent_dist.mode() * pipeline.vae.config.scaling_factor
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(7))
    first = 7 * 0.5 / (1 + 6 * 0.5)  # the noise level 0.5, shifted
    theirs = reference(
        request,
        num_inference_steps=2,
        sigmas=[0.5, 0.25],
        latents=(1 - first) * clean + first * noise,
        negative_prompt=None,
    )
    assert apart(ours, theirs) <= 1
    assert apart(ours, picture(family, request)) > 20


# ------------------------------------------------------------------------------------------------------ adapters

DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
REFINER = "context_embedder.token_refiner.refiner_blocks.0"
AUTHORS = {  # layers of the authors' code -> of diffusers', in the order of their rows
    **{
        f"double_blocks.0.{theirs}": [f"{DOUBLE}.{name}" for name in ours]
        for theirs, ours in {
            "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "img_attn_proj": ("attn.to_out.0",), "txt_attn_proj": ("attn.to_add_out",),
            "img_mod.linear": ("norm1.linear",), "txt_mod.linear": ("norm1_context.linear",),
            "img_mlp.fc1": ("ff.net.0.proj",), "img_mlp.fc2": ("ff.net.2",),
            "txt_mlp.fc1": ("ff_context.net.0.proj",), "txt_mlp.fc2": ("ff_context.net.2",),
        }.items()
    },
    "single_blocks.0.linear1": [f"{SINGLE}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")],
    "single_blocks.0.linear2": [f"{SINGLE}.proj_out"],
    "single_blocks.0.modulation.linear": [f"{SINGLE}.norm.linear"],
    **{
        f"txt_in.individual_token_refiner.blocks.0.{theirs}": [f"{REFINER}.{name}" for name in ours]
        for theirs, ours in {
            "self_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "self_attn_proj": ("attn.to_out.0",),
            "mlp.fc1": ("ff.net.0.proj",), "mlp.fc2": ("ff.net.2",), "adaLN_modulation.1": ("norm_out.linear",),
        }.items()
    },
    **{
        theirs: [ours]
        for theirs, ours in {
            "txt_in.input_embedder": "context_embedder.proj_in",
            "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
            "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
            "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
            "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
            "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
            "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
            "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
            "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
            "final_layer.adaLN_modulation.1": "norm_out.linear",
            "final_layer.linear": "proj_out",
        }.items()
    },
}  # fmt: skip
SWAPPED = ("final_layer.adaLN_modulation.1",)  # theirs begins with the shift, diffusers' with the scale
COMFY = (
    ("_attn_qkv", "_attn.qkv"), ("_attn_proj", "_attn.proj"), ("_mod.linear", "_mod.lin"), ("mlp.fc1", "mlp.0"),
    ("modulation.linear", "modulation.lin"), ("mlp.fc2", "mlp.2"), ("_in.mlp.0", "_in.in_layer"),
    ("_in.mlp.2", "_in.out_layer"), ("t_embedder.mlp.0", "t_embedder.in_layer"),
    ("t_embedder.mlp.2", "t_embedder.out_layer"), ("c_embedder.linear_1", "c_embedder.in_layer"),
    ("c_embedder.linear_2", "c_embedder.out_layer"),
)  # fmt: skip


def comfy(name: str) -> str:
    """ComfyUI's name of an authors' layer."""
    for theirs, own in COMFY:
        name = name.replace(theirs, own)
    return f"diffusion_model.{name}"


SPELLINGS: dict[str, Callable[[str], str]] = {
    "authors": str,
    "authors-prefixed": "diffusion_model.{}".format,
    "comfy": comfy,
    "kohya": lambda name: f"lora_unet_{name.replace('.', '_')}",
}


@pytest.mark.proves("HunyuanVideoPipeline", "LoRA")
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_adapters_in_all_names(twin: Path, tmp_path: Path, guided: Tensor, spelling: str) -> None:
    family = load(twin)
    assert isinstance(family, HunyuanVideo)
    linear = {name for name, m in family.transformer.named_modules() if isinstance(m, nn.Linear)}
    assert linear == {layer for layers in AUTHORS.values() for layer in layers}
    ours, theirs = write_both(tmp_path, family.transformer, AUTHORS, SPELLINGS[spelling], SWAPPED)
    activate(family, ours)
    adapted = picture(family, GUIDED)
    assert apart(adapted, guided) > 20
    activate(family, theirs)
    assert torch.equal(picture(family, GUIDED), adapted)
    family.lora["transformer"].clear()
    assert torch.equal(picture(family, GUIDED), guided)


def test_authors_names_as_diffusers_converts_them(tmp_path: Path) -> None:
    """On the full-size blocks, whose width its converter knows by heart.

    Of the refiner's qkv and the last modulation it also splits A, which belongs to all rows: these are left out.
    """
    from diffusers.loaders.lora_conversion_utils import _convert_hunyuan_video_lora_to_diffusers

    config = HunyuanVideoConfig(num_layers=1, num_single_layers=1, num_refiner_layers=1)
    with torch.device("meta"), Uninitialized():
        module = HunyuanVideoTransformer(config, Mesh.solo(), TORCH)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    tensors = {}
    for name, layers in AUTHORS.items():
        if not name.endswith(("self_attn_qkv", *SWAPPED)):
            sizes = [shapes[f"{layer}.weight"] for layer in layers]
            tensors[f"{name}.lora_A.weight"] = torch.randn(1, sizes[0][1])
            tensors[f"{name}.lora_B.weight"] = torch.randn(sum(out for out, _ in sizes), 1)
    save_file(tensors, tmp_path / "a.safetensors")
    fitted = fit(read_adapter(tmp_path / "a.safetensors"), shapes, names.HUNYUAN_VIDEO)
    expected = _convert_hunyuan_video_lora_to_diffusers(tensors)
    assert {f"transformer.{name}.lora_A.weight" for name in fitted.layers} == {k for k in expected if "lora_A" in k}
    for name, delta in fitted.layers.items():
        assert torch.equal(delta.down, expected[f"transformer.{name}.lora_A.weight"])  # type: ignore[arg-type]
        assert torch.equal(delta.up, expected[f"transformer.{name}.lora_B.weight"])  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- what requests mean


@pytest.fixture(scope="module")
def family(twin: Path) -> HunyuanVideo:
    loaded = load(twin)
    assert isinstance(loaded, HunyuanVideo)
    return loaded


def test_info(family: HunyuanVideo) -> None:
    info = family.info
    assert (info.name, info.kind, info.size_multiple, info.frame_multiple) == ("HunyuanVideoPipeline", "video", 16, 4)
    assert info.tasks == ("text-to-video", "text-to-image", "image-to-video", "image-to-image")
    assert set(info.unsupported) == {"cfg_normalization", "guidance_scale_2", "boundary_ratio", "diffusers_kwargs"}
    resolved = resolve({"prompt": "a cat"}, attrs.evolve(info, memory=None))
    params = resolved.params
    assert (params.width, params.height, params.num_frames, params.fps) == (1280, 720, 125, 24)
    assert (params.num_inference_steps, params.guidance_scale, params.true_cfg_scale) == (50, 6.0, 1.0)
    assert (params.flow_shift, params.max_sequence_length, resolved.notes) == (None, 256, ())
    with pytest.raises(NotBuilt, match="guidance_scale_2: this model cannot use it: it has no second expert"):
        resolve({"guidance_scale_2": 2.0}, info)
    with pytest.raises(BadRequest, match="height: 40 is not a multiple of 16"):
        resolve({"height": 40}, info)
    assert resolve({**REQUEST, "num_frames": 12}, info).params.num_frames == 13


def test_without_the_autoencoders_encoder_it_takes_no_picture(twin: Path) -> None:
    info = load(twin, vae_config={"load_encoder": False}).info
    assert (info.pictures.max, info.tasks) == (0, ("text-to-video", "text-to-image"))


def test_fasthunyuan_takes_six_steps_of_another_schedule(tmp_path: Path) -> None:
    params = resolve(
        REQUEST | {"num_inference_steps": None}, load(twins.make_fasthunyuan(tmp_path / "FastHunyuan")).info
    ).params
    assert (params.num_inference_steps, params.flow_shift, params.guidance_scale) == (6, 17.0, 6.0)


def test_flow_shift(twin: Path, family: HunyuanVideo, plain: Tensor) -> None:
    """The checkpoint's own is 7."""
    assert torch.equal(picture(family, REQUEST | {"flow_shift": 7.0}), plain)
    assert apart(picture(family, REQUEST | {"flow_shift": 17.0}), plain) > 5


def test_generation_config_gives_the_defaults(copy: Path) -> None:
    (copy / "generation_config.json").write_text('{"true_cfg_scale": 2.0}')
    assert load(copy).info.defaults == {"true_cfg_scale": 2.0}
    (copy / "generation_config.json").write_text('{"true_cfg_scal": 2.0}')
    with pytest.raises(ModelError, match=r"generation_config\.json.*true_cfg_scale"):
        load(copy)


def warnings(family: HunyuanVideo, **changes: Any) -> list[str]:
    with torch.inference_mode():
        return family.encode(resolve(REQUEST | changes, family.info).params, [])[1]


def test_warnings(family: HunyuanVideo) -> None:
    assert warnings(family) == warnings(family, **GUIDED) == []
    assert warnings(family, negative_prompt="dogs") == [
        "negative_prompt: it has no effect without a true_cfg_scale above 1"
    ]
    long = {"negative_prompt": "red " * 30, "max_sequence_length": 24, "true_cfg_scale": 2.0}
    assert warnings(family, **long) == [
        "negative_prompt cut from 33 to 24 tokens, the most this request allows",
    ]
    assert warnings(family, prompt="ball " * 20) == [
        "prompt: the second of two text encoders reads 77 of its 82 tokens"
    ]


def test_tokens(family: HunyuanVideo) -> None:
    """Of the prompt and the template's end; the words before it are the 95 that are cut off."""
    with torch.inference_mode():
        condition, _ = family.encode(resolve(REQUEST | {"prompt": "a red cat"}, family.info).params, [])
    assert (condition.prompt_tokens, condition.latent_tokens) == (4, 3 * 2 * 3)
    assert condition.positive.text.shape == (1, 4, 32)
    assert condition.positive.guidance.tolist() == [6000]
    assert len(family.llama.tokenizer.encode(TEMPLATE.partition("{}")[0]).ids) == SYSTEM_TOKENS


def test_the_class_that_a_tokenizer_names_does_not_matter(copy: Path, plain: Tensor) -> None:
    """Real checkpoints name LlamaTokenizerFast, of which today's transformers makes another tokenizer."""
    file = copy / "tokenizer" / "tokenizer_config.json"
    edit(file, tokenizer_class="LlamaTokenizerFast")
    edit(copy / "model_index.json", tokenizer=["transformers", "LlamaTokenizerFast"])
    assert torch.equal(picture(load(copy), REQUEST), plain)


# -------------------------------------------------------------------------------------------- what does not fit


@pytest.fixture
def copy(twin: Path, tmp_path: Path) -> Path:
    """A twin to break."""
    return Path(shutil.copytree(twin, tmp_path / "model"))


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("model_index.json", {"text_encoder_2": [None, None]}, r"model_index\.json: lacks text_encoder_2"),
        (
            "transformer/config.json",
            {"image_condition_type": "token_replace"},
            "image_condition_type is 'token_replace'",
        ),
        ("transformer/config.json", {"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'; only 'rms_norm'"),
        ("transformer/config.json", {"num_layers": 2}, r"32 tensors missing: transformer_blocks\.1\."),
        ("transformer/config.json", {"in_channels": 8}, r"x_embedder\.proj\.weight \[48, 4, 1, 2, 2\] instead of"),
        ("vae/config.json", {"_class_name": "AutoencoderKL"}, "only 'AutoencoderKLHunyuanVideo'"),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "use_karras_sigmas"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(copy: Path, file: str, changes: dict[str, Any], says: str) -> None:
    edit(copy / file, **changes)
    with pytest.raises(ModelError, match=says) as caught:
        picture(load(copy), REQUEST)
    assert "\n" not in str(caught.value)


def test_components_that_do_not_fit_each_other(copy: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    CLIPTextModel(CLIPTextConfig(**twins.CLIP | {"hidden_size": 32}, vocab_size=300)).save_pretrained(
        copy / "text_encoder_2"
    )
    with pytest.raises(ModelError, match="text of 32 and 16, .* the text encoders make 32 and 32"):
        load(copy)


@pytest.mark.parametrize(
    "part", ["transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"]
)
def test_a_missing_component_is_named(copy: Path, part: str) -> None:
    shutil.rmtree(copy / part)
    with pytest.raises(ModelError, match=rf"/{part}: no such folder"):
        load(copy)
