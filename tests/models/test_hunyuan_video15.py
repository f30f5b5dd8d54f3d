"""HunyuanVideo 1.5 against diffusers: whole generations, the full-size keys, adapters, and what requests mean."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from sgld.errors import ModelError, NotBuilt
from sgld.models.hunyuan_video15 import (
    SYSTEM_TOKENS,
    TEMPLATE,
    HunyuanVideo15,
    HunyuanVideo15Config,
    HunyuanVideo15Transformer,
    glyphs,
)
from sgld.nn.attention import TORCH
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
from tools.twins import hunyuan_video15 as twins

REQUEST = {
    "prompt": 'a red cat {over} the "ball", “2 dogs” &amp; a "ball"', "negative_prompt": "blurred", "height": 32,
    "width": 48, "num_frames": 9, "num_inference_steps": 3, "guidance_scale": 6.0, "seed": 7,
}  # fmt: skip
FULL = {
    "_class_name": "HunyuanVideo15Transformer3DModel", "_diffusers_version": "0.36.0.dev0", "in_channels": 65,
    "out_channels": 32, "num_attention_heads": 16, "attention_head_dim": 128, "num_layers": 54,
    "num_refiner_layers": 2, "mlp_ratio": 4.0, "patch_size": 1, "patch_size_t": 1, "qk_norm": "rms_norm",
    "text_embed_dim": 3584, "text_embed_2_dim": 1472, "image_embed_dim": 1152, "rope_theta": 256.0,
    "rope_axes_dim": [16, 56, 56], "target_size": 640, "task_type": "t2v", "use_meanflow": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return twins.make_hunyuan_video15(tmp_path_factory.mktemp("twins") / "video")


@pytest.fixture(scope="module")
def pipeline(twin: Path) -> Any:
    """diffusers' own, in float32."""
    from diffusers import HunyuanVideo15Pipeline

    return quiet(HunyuanVideo15Pipeline.from_pretrained(twin))


@pytest.fixture(scope="module")
def reference(pipeline: Any) -> Callable[..., Tensor]:
    """Frames u8 [N, H, W, 3] of a request with changes, as diffusers makes them."""

    def make(request: Mapping[str, Any] = REQUEST, **changes: Any) -> Tensor:
        given = {**request, **changes}
        generator = torch.Generator("cpu").manual_seed(given.pop("seed"))
        pipeline.guider = pipeline.guider.new(guidance_scale=given.pop("guidance_scale"))
        return levels(pipeline(**given, generator=generator, output_type="np").frames)

    return make


@pytest.fixture(scope="module")
def family(twin: Path) -> HunyuanVideo15:
    loaded = load(twin)
    assert isinstance(loaded, HunyuanVideo15)
    return loaded


@pytest.fixture(scope="module")
def plain(family: HunyuanVideo15) -> Tensor:
    return picture(family, REQUEST)


@pytest.mark.proves("HunyuanVideo15Pipeline", "text-to-image")
@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_scale": 1.0},
        {"num_frames": 1},
        {"prompt": "a red cat"},  # nothing to be written
        {"prompt": ""},
        {"negative_prompt": 'the "green" ball'},
        {"prompt": "a red cat over the green ball " * 180},  # too long for the Qwen
        {"prompt": f'a "{"green ball " * 30}"'},  # too long for ByT5
    ],
    ids=str,
)
def test_same_picture_at_the_edges(
    family: HunyuanVideo15, plain: Tensor, reference: Callable[..., Tensor], changes: dict[str, Any]
) -> None:
    ours = picture(family, REQUEST | changes)
    assert apart(ours, reference(**changes)) <= 1
    assert ours.shape != plain.shape or apart(ours, plain) > 5


TILES = tiles(32, 16)
SHARED = {"ulysses_degree": 2, "tp_size": 2, "vae_sp": True, "vae_config": TILES}


def test_two_ranks_share_tiles_of_the_decoding(
    twin: Path, tmp_path: Path, plain: Tensor, pipeline: Any, reference: Callable[..., Tensor]
) -> None:
    ours = picture_of_ranks(2, tmp_path / "store", twin, REQUEST, **SHARED)
    pipeline.vae.enable_tiling(32, 32, 2, 2, 0.5)
    expected = reference()
    pipeline.vae.disable_tiling()
    assert apart(ours, expected) <= 1
    assert apart(ours, plain) > 1  # tiles make a difference


def test_tiles_are_diffusers_own(twin: Path, pipeline: Any, reference: Callable[..., Tensor]) -> None:
    large = REQUEST | {"height": 96, "width": 96}
    ours = picture(load(twin, vae_config=tiles(64, 48)), large)
    pipeline.vae.enable_tiling(64, 64, 4, 4, 0.25)
    theirs = reference(large)
    pipeline.vae.disable_tiling()
    assert apart(ours, theirs) <= 1
    assert apart(ours, reference(large)) > 1


def test_full_size_keys_and_shapes(tmp_path: Path) -> None:
    from diffusers import HunyuanVideo15Transformer3DModel

    (tmp_path / "config.json").write_text(json.dumps(FULL))
    config = read_architecture(tmp_path / "config.json", HunyuanVideo15Config)
    with torch.device("meta"), Uninitialized():
        ours = HunyuanVideo15Transformer(config, Mesh.solo(), TORCH)
        theirs = HunyuanVideo15Transformer3DModel.from_config(FULL)
    same_state(ours, theirs)
    assert sum(p.numel() for p in ours.parameters()) > 8e9


def test_precisions(twin: Path, plain: Tensor) -> None:
    lowered = load(twin, precision="bf16", text_encoder_precisions=["fp16", "fp32"], vae_precision="bf16")
    assert isinstance(lowered, HunyuanVideo15)
    modules = lowered.transformer, lowered.qwen.module, lowered.byt5.module, lowered.vae.module
    kinds = [{p.dtype for p in module.parameters()} for module in modules]
    assert kinds == [{torch.bfloat16}, {torch.float16}, {torch.float32}, {torch.bfloat16}]
    assert 0 < (picture(lowered, REQUEST).float() - plain.float()).abs().mean() < 20


# ------------------------------------------------------------------------------------------------------ adapters

BLOCK, REFINER = "transformer_blocks.0", "context_embedder.token_refiner.refiner_blocks.0"
AUTHORS = {  # some layers of the authors' code -> of diffusers', in the order of their rows
    "double_blocks.0.img_attn_q": [f"{BLOCK}.attn.to_q"],
    "double_blocks.0.txt_attn_v": [f"{BLOCK}.attn.add_v_proj"],
    "double_blocks.0.img_attn_proj": [f"{BLOCK}.attn.to_out.0"],
    "double_blocks.0.txt_attn_proj": [f"{BLOCK}.attn.to_add_out"],
    "double_blocks.0.img_mod.linear": [f"{BLOCK}.norm1.linear"],
    "double_blocks.0.txt_mod.linear": [f"{BLOCK}.norm1_context.linear"],
    "double_blocks.0.img_mlp.fc1": [f"{BLOCK}.ff.net.0.proj"],
    "double_blocks.0.txt_mlp.fc2": [f"{BLOCK}.ff_context.net.2"],
    "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": [f"{REFINER}.attn.to_{part}" for part in "qkv"],
    "txt_in.individual_token_refiner.blocks.0.self_attn_proj": [f"{REFINER}.attn.to_out.0"],
    "txt_in.individual_token_refiner.blocks.0.mlp.fc1": [f"{REFINER}.ff.net.0.proj"],
    "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1": [f"{REFINER}.norm_out.linear"],
    "txt_in.input_embedder": ["context_embedder.proj_in"],
    "txt_in.t_embedder.mlp.0": ["context_embedder.time_text_embed.timestep_embedder.linear_1"],
    "txt_in.c_embedder.linear_2": ["context_embedder.time_text_embed.text_embedder.linear_2"],
    "time_in.mlp.2": ["time_embed.timestep_embedder.linear_2"],
    "byt5_in.fc3": ["context_embedder_2.linear_3"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    "final_layer.linear": ["proj_out"],
}


SWAPPED = ("final_layer.adaLN_modulation.1",)  # theirs begins with the shift, diffusers' with the scale
SPELLINGS: dict[str, Callable[[str], str]] = {
    "authors": str,
    "comfy": "diffusion_model.{}".format,
    "kohya": lambda name: f"lora_unet_{name.replace('.', '_')}",
}


@pytest.mark.proves("HunyuanVideo15Pipeline", "LoRA")
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_adapters_in_the_authors_names(twin: Path, tmp_path: Path, plain: Tensor, spelling: str) -> None:
    family = load(twin)
    assert isinstance(family, HunyuanVideo15)
    ours, theirs = write_both(tmp_path, family.transformer, AUTHORS, SPELLINGS[spelling], SWAPPED)
    activate(family, ours)
    adapted = picture(family, REQUEST)
    assert apart(adapted, plain) > 20
    activate(family, theirs)
    assert torch.equal(picture(family, REQUEST), adapted)
    family.lora["transformer"].clear()
    assert torch.equal(picture(family, REQUEST), plain)


# ---------------------------------------------------------------------------------------------- what requests mean


def test_info(family: HunyuanVideo15) -> None:
    info = family.info
    assert (info.name, info.kind, info.size_multiple, info.frame_multiple) == (
        "HunyuanVideo15Pipeline", "video", 16, 4,
    )  # fmt: skip
    assert info.tasks == ("text-to-video", "text-to-image")
    resolved = resolve({"prompt": "a cat"}, attrs.evolve(info, memory=None))
    params = resolved.params
    assert (params.width, params.height, params.num_frames, params.fps) == (848, 480, 121, 24)
    assert (params.num_inference_steps, params.guidance_scale, params.max_sequence_length) == (50, 6.0, 1000)
    assert resolved.notes == ()
    with pytest.raises(NotBuilt, match="true_cfg_scale: this model cannot use it"):
        resolve({"true_cfg_scale": 2.0}, info)


def test_a_checkpoint_of_larger_pictures_without_guidance(copy: Path) -> None:
    edit(copy / "transformer/config.json", target_size=960)
    edit(copy / "guider/guider_config.json", guidance_scale=1.0)
    defaults = load(copy).info.defaults
    assert (defaults["width"], defaults["height"], defaults["guidance_scale"]) == (1280, 720, 1.0)


def test_prompts(family: HunyuanVideo15) -> None:
    """The words before the prompt are the 108 tokens that are cut off; after it come five."""
    assert len(family.qwen.tokenizer(TEMPLATE.partition("{}")[0]).input_ids) == SYSTEM_TOKENS
    with torch.inference_mode():
        condition, notes = family.encode(resolve(REQUEST | {"prompt": 'a "red cat"'}, family.info).params, [])
    count = family.qwen.tokenizer
    assert condition.prompt_tokens == len(count('a "red cat"').input_ids) + 5
    assert condition.positive.glyphs.shape == (1, len('Text "red cat". ') + 1, 24)
    assert (condition.negative.glyphs, notes) == (None, [])
    assert glyphs('“one”, "two" and "one"') == 'Text "one". Text "two". '
    with torch.inference_mode():
        long = f'a "{"ball " * 80}"'
        changes = {"prompt": long, "max_sequence_length": 60}
        condition, notes = family.encode(resolve(REQUEST | changes, family.info).params, [])
    assert notes == [
        f"prompt cut from {len(count(long).input_ids) + 5} to 60 tokens, the most this request allows",
        "prompt: its texts in quotation marks are cut from 410 to 256 bytes",
    ]
    assert (condition.prompt_tokens, condition.positive.glyphs.shape[1]) == (60, 256)


# -------------------------------------------------------------------------------------------- what does not fit


@pytest.fixture
def copy(twin: Path, tmp_path: Path) -> Path:
    """A twin to break."""
    return Path(shutil.copytree(twin, tmp_path / "model"))


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("model_index.json", {"guider": [None, None]}, r"model_index\.json: lacks guider"),
        ("guider/guider_config.json", {"guidance_rescale": 0.7}, r"guidance_rescale is 0.7; only 0.0 is supported"),
        ("guider/guider_config.json", {"_class_name": "SkipLayerGuidance"}, "only 'ClassifierFreeGuidance'"),
        ("transformer/config.json", {"use_meanflow": True}, "use_meanflow is True; only False"),
        ("transformer/config.json", {"num_layers": 3}, r"32 tensors missing: transformer_blocks\.2\."),
        ("vae/config.json", {"_class_name": "AutoencoderKL"}, "only 'AutoencoderKLHunyuanVideo15'"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(copy: Path, file: str, changes: dict[str, Any], says: str) -> None:
    edit(copy / file, **changes)
    with pytest.raises(ModelError, match=says) as caught:
        load(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2", "guider"])
def test_a_missing_component_is_named(copy: Path, part: str) -> None:
    shutil.rmtree(copy / part)
    with pytest.raises(ModelError, match=rf"/{part}: no such folder"):
        load(copy)
