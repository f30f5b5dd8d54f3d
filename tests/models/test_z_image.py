"""Z-Image against diffusers: pictures, ranks, adapters, a picture to start from; and what the family says of itself."""

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
from sgld.models.z_image import ZImage, ZImageConfig, ZImageTransformer
from sgld.nn.attention import TORCH
from sgld.nn.lora import WeightedAdapter
from sgld.nn.lora_formats import read_adapter
from sgld.nn.parallel import Mesh
from sgld.nn.weights import Uninitialized, read_architecture
from sgld.resolve import resolve
from sgld.settings import VaeConfig
from tests.models import parity
from tests.models.contract import Z_IMAGE
from tests.models.parity import (
    activate,
    apart,
    edit,
    fused,
    load,
    photo,
    picture,
    pictures_of_ranks,
    quiet,
    same_state,
    spelled,
    write_lora,
)
from tools.twins.z_image import MAKERS

PUBLISHED = {  # transformer/config.json of Tongyi-MAI/Z-Image and Z-Image-Turbo
    "all_f_patch_size": [1], "all_patch_size": [2], "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
    "cap_feat_dim": 2560, "dim": 3840, "in_channels": 16, "n_heads": 30, "n_kv_heads": 30, "n_layers": 30,
    "n_refiner_layers": 2, "norm_eps": 1e-05, "qk_norm": True, "rope_theta": 256.0, "t_scale": 1000.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the twins `z-image` and `z-image-turbo`."""
    folder = tmp_path_factory.mktemp("z-image")
    for name, make_twin in MAKERS.items():
        make_twin(folder / name)
    return folder


def pipeline_of(folder: Path) -> Any:
    """The pipeline of diffusers for a folder, in float32."""
    from diffusers import ZImagePipeline

    return quiet(ZImagePipeline.from_pretrained(folder))


@pytest.fixture(scope="module")
def pipelines() -> Callable[[Path], Any]:
    return cache(pipeline_of)


def theirs(pipeline: Any, **changes: Any) -> Tensor:
    """Frames u8 [1, H, W, 3] of `Z_IMAGE` with changes, as that pipeline makes them."""
    return parity.theirs(pipeline, Z_IMAGE | changes)


def started(folder: Path, file: Path) -> Tensor:
    """What diffusers makes of that picture, told to take its mean latents, noised with the same noise."""
    from diffusers import ZImageImg2ImgPipeline

    pipeline = quiet(ZImageImg2ImgPipeline.from_pretrained(folder))
    vae = pipeline.vae
    pixels = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        clean = (vae.encode(pixels).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(7))
    sigma = 6 * 0.5 / (1 + 5 * 0.5)  # of the third step of four, shifted by 6
    return theirs(pipeline, image=Image.open(file), strength=0.5, latents=(1 - sigma) * clean + sigma * noise)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of 48 x 32 pixels."""
    return photo(tmp_path_factory.mktemp("photos") / "photo.png", 48, 32)


# --------------------------------------------------------------------------------------------------- parity


def test_a_schedule_shifted_by_the_size(twins: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(twins / "z-image", tmp_path / "model"))
    edit(folder / "scheduler" / "scheduler_config.json", use_dynamic_shifting=True)
    ours = picture(load(folder), Z_IMAGE)
    assert apart(ours, theirs(pipeline_of(folder))) <= 1
    assert apart(ours, picture(load(folder), Z_IMAGE | {"flow_shift": 6.0})) > 5


def test_padding_is_seen(twins: Path, tmp_path: Path) -> None:
    """The tokens that fill picture and text up take part, as in diffusers."""
    expected = picture(load(twins / "z-image"), Z_IMAGE)
    for name in ("x_pad_token", "cap_pad_token"):
        folder = Path(shutil.copytree(twins / "z-image", tmp_path / name))
        file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        tensors[name] = -tensors[name]
        save_file(tensors, file)
        assert apart(picture(load(folder), Z_IMAGE), expected) > 5


def test_the_published_transformer_has_the_keys_of_diffusers(tmp_path: Path) -> None:
    from diffusers import ZImageTransformer2DModel

    file = tmp_path / "config.json"
    file.write_text(json.dumps(PUBLISHED))
    with torch.device("meta"), Uninitialized():
        ours = ZImageTransformer(read_architecture(file, ZImageConfig), Mesh.solo(), TORCH)
        expected = ZImageTransformer2DModel(**PUBLISHED)
    same_state(ours, expected)


# ---------------------------------------------------------------------------------------------------- memory


def test_precision(twins: Path) -> None:
    family = load(twins / "z-image", precision="bf16")
    assert isinstance(family, ZImage)
    assert {p.dtype for p in family.transformer.parameters()} == {torch.bfloat16}
    assert family.text.module.dtype == torch.bfloat16
    assert family.vae.dtype == torch.float32
    assert 0 < apart(picture(family, Z_IMAGE), picture(load(twins / "z-image"), Z_IMAGE)) < 128


def test_the_published_size_is_estimated_linearly(twins: Path) -> None:
    info = load(twins / "z-image").info
    assert info.memory is not None
    small, large = (
        max(info.memory_needs(resolve({"height": side, "width": side}, info).params).values()) - info.memory.base
        for side in (512, 1024)
    )
    assert large == 4 * small > 0


# ----------------------------------------------------------------------------------------------------- LoRA


@pytest.fixture(scope="module")
def adapter(twins: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for every linear layer, in diffusers' names."""
    family = load(twins / "z-image")
    assert isinstance(family, ZImage)
    return write_lora(tmp_path_factory.mktemp("lora") / "lora.safetensors", family.transformer)


COMFY = {
    "attention.to_out.0.": "attention.out.", "all_x_embedder.2-1.": "x_embedder.",
    "all_final_layer.2-1.": "final_layer.",
}  # fmt: skip


def comfy_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same adapter with query, key and value in one layer of three times the rank."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("transformer.")
        if ".to_q." in key:
            block = key.partition(".to_q.")[0]
            found |= fused(tensors, [f"{block}.to_{part}" for part in "qkv"], f"{name.partition('.to_q.')[0]}.qkv")
        elif ".to_k." not in key and ".to_v." not in key:
            for ours, comfy in COMFY.items():
                name = name.replace(ours, comfy)
            found[name] = tensor
    return found


@pytest.mark.parametrize("spelling", ["comfy", "kohya"])
@pytest.mark.parametrize("names", [dict, comfy_names], ids=["diffusers", "fused"])
def test_other_spellings_of_the_same_adapter(
    twins: Path,
    adapter: Path,
    tmp_path: Path,
    names: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    spelling: str,
) -> None:
    """Only sums are taken in another order: every weight is the same but for that."""
    family = load(twins / "z-image")
    activate(family, adapter)
    expected = picture(family, Z_IMAGE)
    activate(family, spelled(names(load_file(adapter)), spelling, tmp_path / "other.safetensors"))
    assert apart(picture(family, Z_IMAGE), expected) <= 1


@pytest.mark.parametrize("spelling", ["comfy", "kohya"])
def test_an_adapter_that_renames_only_the_last_layer_of_attention(
    twins: Path, adapter: Path, tmp_path: Path, spelling: str
) -> None:
    """As diffusers reads it."""
    blocks = {key: x for key, x in load_file(adapter).items() if ".attention." in key or ".feed_forward." in key}
    renamed = {key.replace(".attention.to_out.0.", ".attention.out."): x for key, x in blocks.items()}
    file = spelled(renamed, spelling, tmp_path / "other.safetensors")
    pipeline = pipeline_of(twins / "z-image")
    pipeline.load_lora_weights(file)
    family = load(twins / "z-image")
    plain = picture(family, Z_IMAGE)
    activate(family, file)
    worn = picture(family, Z_IMAGE)
    assert apart(worn, theirs(pipeline)) <= 1
    assert apart(worn, plain) > 20


def test_an_adapter_of_another_model_is_refused(twins: Path, adapter: Path, tmp_path: Path) -> None:
    tensors = {key.replace(".layers.", ".blocks."): x for key, x in load_file(adapter).items()}
    save_file(tensors, tmp_path / "other.safetensors")
    layers = load(twins / "z-image").lora["transformer"]
    with pytest.raises(BadRequest, match=r"lora_path.*blocks\.0\.attention"):
        layers.apply([WeightedAdapter(layers.fit(read_adapter(tmp_path / "other.safetensors")))], "merge")


# ------------------------------------------------------------------------------------- a picture to start from


@pytest.mark.proves("ZImagePipeline", "image-to-image")
def test_a_picture_to_start_from(twins: Path, start: Path) -> None:
    family = load(twins / "z-image")
    ours = picture(family, Z_IMAGE | {"image_path": [str(start)], "strength": 0.5})
    assert apart(ours, started(twins / "z-image", start)) <= 1
    assert apart(ours, picture(family, Z_IMAGE)) > 20


def test_a_picture_to_start_from_on_two_ranks(twins: Path, start: Path, tmp_path: Path) -> None:
    folder, request = twins / "z-image", Z_IMAGE | {"image_path": [str(start)], "strength": 0.5}
    [made] = pictures_of_ranks(2, tmp_path / "store", [(folder, request, {"ulysses_degree": 2})])
    assert apart(made, started(folder, start)) <= 1


def test_a_mask_leaves_the_rest(twins: Path, start: Path, tmp_path: Path) -> None:
    mask = tmp_path / "mask.png"
    pixels = np.zeros((32, 48), np.uint8)
    pixels[:, 24:] = 255
    Image.fromarray(pixels).save(mask)
    request = Z_IMAGE | {"image_path": [str(start)], "strength": 0.8, "mask_path": str(mask)}
    frames = picture(load(twins / "z-image"), request)
    before = torch.from_numpy(np.array(Image.open(start)))[None]
    assert apart(frames[:, :, :24], before[:, :, :24]) == 0
    assert apart(frames[:, :, 24:], before[:, :, 24:]) > 20


# -------------------------------------------------------------------------------------------- what it says of itself


def test_info(twins: Path) -> None:
    base, turbo = (load(twins / name).info for name in ("z-image", "z-image-turbo"))
    assert (base.name, base.kind, base.size_multiple, base.frame_multiple) == ("ZImagePipeline", "image", 16, 1)
    assert base.components == ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
    assert base.tasks == ("text-to-image", "image-to-image")
    assert base.defaults == {
        "negative_prompt": "", "max_sequence_length": 512, "width": 1280, "height": 720, "num_inference_steps": 50,
        "guidance_scale": 5.0, "cfg_normalization": 1.0,
    }  # fmt: skip
    assert turbo.defaults == {
        "negative_prompt": "", "max_sequence_length": 512, "width": 1024, "height": 1024, "num_inference_steps": 9,
        "guidance_scale": 0.0,
    }  # fmt: skip
    assert base.lora_targets == ("transformer",)
    assert base.max_tokens == 544
    without = load(twins / "z-image", vae_config=VaeConfig(load_encoder=False)).info
    assert (without.tasks, without.pictures.max) == (("text-to-image",), 0)


@pytest.mark.parametrize("name", ["true_cfg_scale", "guidance_scale_2", "boundary_ratio"])
def test_fields_without_a_use(twins: Path, name: str) -> None:
    with pytest.raises(NotBuilt, match=f"^{name}: this model cannot use it: ") as caught:
        resolve(Z_IMAGE | {name: 0.5}, load(twins / "z-image").info)
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"height": 40}, "height: 40 is not a multiple of 16; the nearest valid size is 48x48"),
        ({"num_frames": 5}, "num_frames: 5: this model makes single pictures; allowed is 1"),
        ({"max_sequence_length": 600}, "max_sequence_length: 600 is more than this model takes; allowed is 1 to 544"),
    ],
)
def test_requests_that_cannot_be_made(twins: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        resolve(Z_IMAGE | changes, load(twins / "z-image").info)


def test_a_prompt_that_is_cut_is_told(twins: Path) -> None:
    params = resolve(Z_IMAGE | {"prompt": "cat " * 30, "max_sequence_length": 20}, load(twins / "z-image").info).params
    condition, notes = load(twins / "z-image").encode(params, [])
    assert condition.prompt_tokens == 20
    assert notes[0].startswith("prompt cut from ")
    assert notes[1].startswith("negative prompt cut from ")


# ------------------------------------------------------------------------------------------------- wrong checkpoints


@pytest.fixture
def copy(twins: Path, tmp_path: Path) -> Path:
    """A twin to break."""
    return Path(shutil.copytree(twins / "z-image", tmp_path / "model"))


@pytest.mark.parametrize(
    ("file", "changes", "error", "says"),
    [
        ("model_index.json", {"vae": [None, None]}, ModelError, "lacks vae"),
        ("transformer/config.json", {"siglip_feat_dim": 8}, NotBuilt, "siglip_feat_dim"),
        ("transformer/config.json", {"qk_norm": False}, ModelError, "qk_norm is False; only True"),
        ("transformer/config.json", {"n_kv_heads": 2}, ModelError, "n_kv_heads is 2; only 4"),
        ("transformer/config.json", {"all_patch_size": [2, 4]}, ModelError, "all_patch_size"),
        ("transformer/config.json", {"axes_dims": [4, 4, 2]}, ModelError, "axes_dims"),
        ("transformer/config.json", {"n_layers": 3}, ModelError, r"missing: layers\.2\."),
        ("text_encoder/config.json", {"model_type": "qwen2"}, ModelError, "only 'qwen3' is supported"),
        ("text_encoder/config.json", {"num_hidden_layers": 4}, ModelError, "text_encoder.*num_hidden_layers"),
        ("vae/config.json", {"_class_name": "AutoencoderKLWan"}, ModelError, "only 'AutoencoderKL'"),
        ("scheduler/scheduler_config.json", {"_class_name": "UniPCMultistepScheduler"}, ModelError, "only 'FlowMatch"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    copy: Path, file: str, changes: dict[str, Any], error: type[SgldError], says: str
) -> None:
    edit(copy / file, **changes)
    with pytest.raises(error, match=says) as caught:
        load(copy)
    assert "\n" not in str(caught.value)


def test_components_that_do_not_fit(copy: Path) -> None:
    from transformers import Qwen3Config, Qwen3Model

    wide = Qwen3Config.from_pretrained(copy / "text_encoder", hidden_size=40)
    Qwen3Model(wide).save_pretrained(copy / "text_encoder")
    with pytest.raises(ModelError, match="text of 32.*the text encoder makes 40"):
        load(copy)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component_is_named(copy: Path, part: str) -> None:
    shutil.rmtree(copy / part)
    with pytest.raises(ModelError, match=part):
        load(copy)


def test_a_tokenizer_that_cannot_be_used(copy: Path) -> None:
    template = copy / "tokenizer" / "chat_template.jinja"
    template.unlink()
    with pytest.raises(ModelError, match="tokenizer has no chat_template"):
        load(copy)
    (copy / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer: cannot be read"):
        load(copy)


def test_a_text_encoder_saved_with_its_head(twins: Path, copy: Path) -> None:
    """The published files have the names of the language model, whose head is tied to the embedding."""
    file = copy / "text_encoder" / "model.safetensors"
    save_file({f"model.{name}": x for name, x in load_file(file).items()}, file, {"format": "pt"})
    edit(copy / "text_encoder" / "config.json", architectures=["Qwen3ForCausalLM"])
    assert torch.equal(picture(load(copy), Z_IMAGE), picture(load(twins / "z-image"), Z_IMAGE))


def test_generation_config_gives_the_defaults(copy: Path) -> None:
    (copy / "generation_config.json").write_text('{"height": 64, "num_inference_steps": 4}')
    assert load(copy).info.defaults == {"height": 64, "num_inference_steps": 4}
