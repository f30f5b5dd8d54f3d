"""Qwen-Image and its editors against diffusers."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sgld import inputs
from sgld.errors import BadRequest, ModelError, NotBuilt
from sgld.messages import Load
from sgld.models import load_family, vae, vae_encoder
from sgld.models.qwen_image import QwenImage, QwenImageConfig, QwenImageTransformer
from sgld.nn.attention import TORCH
from sgld.nn.mmdit import finite
from sgld.nn.parallel import Mesh
from sgld.nn.weights import read_json
from sgld.params import near
from sgld.platform import Cpu
from sgld.resolve import resolve
from sgld.settings import Settings, VaeConfig
from sgld.worker.solvers import make_solver
from tests.models.contract import small_pictures
from tests.models.parity import (
    activate,
    apart,
    edit,
    estimate_is_near_the_peak,
    load,
    photo,
    picture,
    same_state,
    spelled,
    write_lora,
)
from tests.models.references import qwen_pipeline, their_qwen
from tools.tiny import make_cache, set_scheduler
from tools.twins.qwen_image import MAKERS, TEXT, VAE

REQUEST = {
    "prompt": "a red cat over the green ball", "negative_prompt": "blurred", "width": 48, "height": 32,
    "num_inference_steps": 4, "guidance_scale": 4.0, "seed": 7,
}  # fmt: skip
COUNTS = {"qwen-image": 0, "qwen-image-edit": 1, "qwen-image-edit-2509": 3, "qwen-image-edit-2511": 2}  # of pictures
AREA, GLANCE = 64 * 64, 32 * 32  # of pictures here, for speed
SHAPES = ((90, 50), (40, 70), (64, 64))
proves = pytest.mark.proves
DRAWS, EDITS, SEVERAL = "QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the twins, and pictures `0.png` to `2.png`."""
    folder = tmp_path_factory.mktemp("qwen")
    for name, make in MAKERS.items():
        make(folder / name)
    for i, (width, height) in enumerate(SHAPES):
        photo(folder / f"{i}.png", width, height)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Input pictures of a few thousand pixels, here and in diffusers."""
    small_pictures(monkeypatch)


def request(models: Path, name: str, **changes: Any) -> dict[str, Any]:
    """`REQUEST` with as many pictures as that twin is tested with."""
    files = [str(models / f"{i}.png") for i in range(COUNTS[name])]
    return REQUEST | ({"image_path": files} if files else {}) | changes


@pytest.fixture(scope="session")
def pipelines(models: Path) -> Callable[[str], Any]:
    """diffusers' own of the twins."""
    return cache(lambda name: qwen_pipeline(models / name))


@pytest.mark.parametrize(
    ("changes", "their_changes"),
    [
        ({"guidance_scale": 1.0, "true_cfg_scale": 2.5}, {"guidance_scale": 2.5}),
        ({"true_cfg_scale": 1.0}, {"guidance_scale": 1.0}),
    ],
    ids=str,
)
def test_either_scale_guides(
    models: Path, pipelines: Callable[[str], Any], changes: dict[str, Any], their_changes: dict[str, Any]
) -> None:
    given = {name: value for name, value in (changes | their_changes).items() if name != "true_cfg_scale"}
    expected = their_qwen(pipelines("qwen-image"), REQUEST | given)
    assert apart(picture(load(models / "qwen-image"), REQUEST | changes), expected) <= 1


def test_without_dynamic_shift(models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / "qwen-image", tmp_path / "model"))
    set_scheduler(folder, "FlowMatchEulerDiscreteScheduler", shift=3.0)
    plain = their_qwen(qwen_pipeline(folder), REQUEST)
    assert apart(picture(load(folder), REQUEST), plain) <= 1
    moved = picture(load(models / "qwen-image"), REQUEST | {"flow_shift": 3.0})
    assert apart(moved, picture(load(models / "qwen-image"), REQUEST)) > 5


def test_a_single_step_goes_all_the_way(models: Path) -> None:
    """The schedule's one level, 1, cannot be stretched to another; diffusers divides 0 by 0 there."""
    family = load(models / "qwen-image")
    params = resolve(REQUEST | {"num_inference_steps": 1}, family.info).params
    solver = make_solver(family.scheduler, 1, family.schedule(params, torch.zeros(1, 4, 1, 4, 6)))
    assert solver.sigmas.tolist() == [1, 0]
    assert picture(family, REQUEST | {"num_inference_steps": 1}).float().std() > 10


def test_every_picture_counts_and_so_does_their_order(models: Path) -> None:
    family = load(models / "qwen-image-edit-2509")
    asked = request(models, "qwen-image-edit-2509")
    base, files = picture(family, asked), asked["image_path"]
    assert apart(base, picture(family, asked | {"image_path": files[::-1]})) > 5
    assert apart(base, picture(family, asked | {"image_path": files[:2]})) > 5


def test_pictures_stand_where_their_patches_are(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text encoder's positions: without the kinds of tokens the picture differs."""
    asked, family = request(models, "qwen-image-edit"), load(models / "qwen-image-edit")
    right = picture(family, asked)
    assert isinstance(family, QwenImage)
    family.text.module.register_forward_pre_hook(
        lambda module, args, given: (args, given | {"mm_token_type_ids": None}), with_kwargs=True
    )
    assert apart(right, picture(family, asked)) > 20


@proves(DRAWS, "image-to-image")
def test_a_picture_to_start_from(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' pipeline for it draws from the posterior; ours takes its mode, as the editors do."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    asked = REQUEST | {"strength": 0.5, "image_path": [str(photo(tmp_path / "start.png", 48, 32))]}
    ours = picture(load(models / "qwen-image"), asked)
    assert apart(ours, their_qwen(qwen_pipeline(models / "qwen-image", "QwenImageImg2ImgPipeline"), asked)) <= 1
    assert apart(ours, picture(load(models / "qwen-image"), asked | {"strength": 1.0})) > 20


# ------------------------------------------------------------------------------------------------- full size


@pytest.mark.parametrize("changes", [{}, {"zero_cond_t": True}], ids=["2512", "2511"])
def test_the_real_transformer_has_the_checkpoints_tensors(changes: dict[str, Any]) -> None:
    from diffusers import QwenImageTransformer2DModel

    published = {
        "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56), "guidance_embeds": False, "in_channels": 64,
        "joint_attention_dim": 3584, "num_attention_heads": 24, "num_layers": 60, "out_channels": 16, "patch_size": 2,
    } | changes  # fmt: skip
    with torch.device("meta"):
        ours = QwenImageTransformer(QwenImageConfig(**published), Mesh.solo(), TORCH)
        same_state(ours, QwenImageTransformer2DModel(**published))
    assert sum(x.numel() for x in ours.parameters()) == pytest.approx(20.4e9, rel=0.01)


def test_the_real_autoencoder_has_the_checkpoints_tensors(tmp_path: Path) -> None:
    from diffusers import AutoencoderKLQwenImage

    with torch.device("meta"):
        whole = AutoencoderKLQwenImage()
        whole.save_config(tmp_path)
        c = vae.vae_config(tmp_path / "config.json")
        same_state(vae.WanDecoder(c), whole, ("encoder.", "quant_conv."))
        same_state(vae_encoder.WanEncoder(c), whole, ("decoder.", "post_quant_conv."))


# --------------------------------------------------------------------------------------- weights: where and which

WHOLE = {"text_encoder_cpu_offload": True, "dit_cpu_offload": True, "vae_cpu_offload": True}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param("qwen-image", WHOLE, marks=proves(DRAWS, "offload")),
        pytest.param("qwen-image-edit", WHOLE | {"dit_layerwise_offload": True}, marks=proves(EDITS, "offload")),
    ],
)
def test_the_same_picture_from_weights_that_come(models: Path, name: str, settings: dict[str, Any]) -> None:
    asked = request(models, name)
    family = load(models / name, **settings)
    assert isinstance(family, QwenImage)
    assert picture(family, asked).equal(picture(load(models / name), asked))
    modules = (family.text.module, family.transformer, family.vae.decoder.module)
    assert all(p.untyped_storage().nbytes() < p.nbytes for module in modules for p in module.parameters() if p.ndim > 1)


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"dit_precision": "fp16"}], ids=str)
def test_precision(models: Path, settings: dict[str, Any]) -> None:
    asked = request(models, "qwen-image-edit-2511")
    family = load(models / "qwen-image-edit-2511", **settings)
    assert isinstance(family, QwenImage)
    assert {p.dtype for p in family.transformer.parameters()} <= {torch.bfloat16, torch.float16}
    assert 0 < apart(picture(family, asked), picture(load(models / "qwen-image-edit-2511"), asked)) < 128


def test_half_precision_stays_finite() -> None:
    x = torch.tensor([1.0, 70000.0, -70000.0]).half()
    assert finite(x).tolist() == [1.0, 65504.0, -65504.0]
    assert not finite(torch.tensor([torch.inf])).isfinite()  # other types keep what they have


def test_only_what_is_used_is_loaded(models: Path) -> None:
    """No head for the next word; no eyes where no picture is looked at."""
    for name, sees in (("qwen-image", False), ("qwen-image-edit", True)):
        family = load(models / name)
        assert isinstance(family, QwenImage)
        names = [name for name, _ in family.text.module.named_parameters()]
        assert not any("lm_head" in name for name in names)
        assert any("visual" in name for name in names) is sees


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("qwen-image", marks=proves(DRAWS, "LoRA")),
    ],
)
def test_lora(models: Path, tmp_path: Path, name: str) -> None:
    pipe, family, asked = qwen_pipeline(models / name), load(models / name), request(models, name)
    plain = picture(family, asked)
    file = write_lora(tmp_path / "diffusers.safetensors", pipe.transformer)
    activate(family, file)
    worn = picture(family, asked)
    pipe.load_lora_weights(file)
    assert apart(worn, their_qwen(pipe, asked)) <= 1
    assert apart(worn, plain) > 20
    family.lora["transformer"].clear()
    assert picture(family, asked).equal(plain)
    for spelling in ("comfy", "dotted", "kohya"):
        activate(family, spelled(load_file(file), spelling, tmp_path / f"{spelling}.safetensors"))
        assert picture(family, asked).equal(worn), spelling
        family.lora["transformer"].clear()


# ------------------------------------------------------------------------------------------------ what is asked


def test_info(models: Path) -> None:
    info = load(models / "qwen-image").info
    assert (info.name, info.kind, info.size_multiple, info.frame_multiple) == (DRAWS, "image", 16, 1)
    assert info.defaults == {
        "width": 1280, "height": 720, "num_inference_steps": 50, "guidance_scale": 4.0, "negative_prompt": " ",
        "max_sequence_length": 512,
    }  # fmt: skip
    assert info.tasks == ("text-to-image", "image-to-image")
    assert (info.pictures.max, info.pictures.min, info.pictures.starts_denoising) == (1, 0, True)
    assert (info.max_tokens, info.lora_targets) == (1024, ("transformer",))
    assert set(info.unsupported) == {"guidance_scale_2", "boundary_ratio", "cfg_normalization", "diffusers_kwargs"}
    edits = [load(models / name).info for name in ("qwen-image-edit", "qwen-image-edit-2509")]
    assert [(info.pictures.min, info.pictures.max, info.pictures.starts_denoising) for info in edits] == [
        (1, 1, False), (1, 16, False)
    ]  # fmt: skip
    assert [info.tasks for info in edits] == [("image-to-image",)] * 2
    assert [info.defaults["num_inference_steps"] for info in edits] == [50, 40]


def test_an_edit_takes_the_shape_of_its_picture(models: Path) -> None:
    info = load(models / "qwen-image-edit").info
    params = resolve({"image_path": ["a.png"]}, info, picture=(1600, 900)).params
    assert (params.width, params.height) == (1376, 768)
    with pytest.raises(BadRequest, match="none given; this model takes 1"):
        resolve({}, info)
    with pytest.raises(NotBuilt, match="strength: this model cannot use it"):
        resolve({"image_path": ["a.png"], "strength": 0.5}, info)


@pytest.mark.parametrize("picture", [(1600, 900), (333, 1000), (64, 64), (1999, 20)])
@pytest.mark.parametrize("area", [1024**2, 384**2])
def test_sizes_as_diffusers_has_them(picture: tuple[int, int], area: int) -> None:
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions

    assert near(area, picture, 32) == calculate_dimensions(area, picture[0] / picture[1])


def test_defaults_by_name(tmp_path: Path) -> None:
    folder = make_cache("qwen-image", tmp_path)
    assert load(folder).info.defaults["negative_prompt"] == " "
    settings = Settings.of(model_path="Qwen/Qwen-Image-2512")
    info = load_family(Load(settings, folder), Mesh.solo(), Cpu(), lambda step, total: None).info
    assert info.defaults["negative_prompt"].startswith("低分辨率")
    later = folder.rename(tmp_path / "Qwen-Image-2512")
    assert load(later).info.defaults == info.defaults
    (later / "generation_config.json").write_text('{"height": 64}')
    assert load(later).info.defaults == {"height": 64}


def test_warnings_and_errors_of_a_request(models: Path, tmp_path: Path) -> None:
    family = load(models / "qwen-image-edit-2509")
    files = [str(models / "0.png")] * 4
    changes = {"image_path": files, "max_sequence_length": 8, "negative_prompt": " blurred"}
    params = resolve(request(models, "qwen-image-edit-2509", **changes), family.info).params
    pictures = [inputs.upright(file) for file in files]
    condition, notes = family.encode(params, pictures)
    assert notes == [
        "prompt cut from 12 to 8 tokens, the most this request allows",
        "image_path: 4 pictures; this model was made for 1 to 3",
    ]
    assert condition.prompt_tokens == 8
    assert condition.positive.text.shape[1] == condition.negative.text.shape[1] + 2  # 8 words against 6
    marked = resolve(request(models, "qwen-image-edit-2509", prompt="<|image_pad|>"), family.info).params
    with pytest.raises(BadRequest, match="prompt: it holds <|image_pad|>") as caught:
        family.encode(marked, pictures[:1])
    assert caught.value.param == "prompt"
    with pytest.raises(BadRequest, match=r"image_path: 'b.png' of 500x4 pixels is too long; one side may be 100 "):
        family.encode(params, [pictures[0], inputs.named("b.png", Image.new("RGB", (500, 4)))])
    with pytest.raises(BadRequest, match="max_sequence_length: 1025"):
        resolve({"image_path": files, "max_sequence_length": 1025}, family.info)


# ------------------------------------------------------------------------------------------------ broken models


@pytest.fixture
def copy(models: Path, tmp_path: Path) -> Path:
    """A twin to break."""
    return Path(shutil.copytree(models / "qwen-image-edit", tmp_path / "model"))


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("model_index.json", {"vae": [None, None]}, "lacks vae"),
        ("model_index.json", {"processor": [None, None]}, "lacks processor"),
        ("transformer/config.json", {"num_layers": 3}, r"32 tensors missing: transformer_blocks\.2\."),
        ("transformer/config.json", {"guidance_embeds": True}, "guidance_embeds is True; only False"),
        ("transformer/config.json", {"use_layer3d_rope": True}, "use_layer3d_rope is True; only False"),
        ("transformer/config.json", {"patch_size": 1}, "patch_size is 1; only 2"),
        ("transformer/config.json", {"axes_dims_rope": [4, 4, 2]}, "axes_dims_rope"),
        ("text_encoder/config.json", {"text_config": TEXT | {"num_hidden_layers": 3}}, "text_encoder"),
        ("vae/config.json", {"_class_name": "AutoencoderKL"}, "only AutoencoderKLWan and AutoencoderKLQwenImage"),
        ("vae/config.json", {"input_channels": 4}, "input_channels: 4 is not supported"),
        ("scheduler/scheduler_config.json", {"_class_name": "UniPCMultistepScheduler"}, "UniPCMultistepScheduler"),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "use_karras_sigmas"),
    ],
    ids=str,
)
def test_a_model_that_does_not_fit_is_refused(
    models: Path, copy: Path, file: str, changes: dict[str, Any], says: str
) -> None:
    edit(copy / file, **changes)
    with pytest.raises(ModelError, match=says) as caught:
        picture(load(copy), request(models, "qwen-image-edit"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler", "processor"])
def test_a_missing_component_is_named(copy: Path, part: str) -> None:
    shutil.rmtree(copy / part)
    with pytest.raises(ModelError, match=part):
        load(copy)


def test_a_tokenizer_without_its_words(copy: Path) -> None:
    for file in (copy / "tokenizer").iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        load(copy)


def test_a_tokenizer_as_the_real_ones_are_stored(models: Path, copy: Path) -> None:
    """Words and merges in files of their own."""
    stored = read_json(copy / "tokenizer" / "tokenizer.json")["model"]
    (copy / "tokenizer" / "vocab.json").write_text(json.dumps(stored["vocab"]))
    merges = [" ".join(pair) for pair in stored["merges"]]
    (copy / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    added = {token["content"]: token for token in read_json(copy / "tokenizer" / "tokenizer.json")["added_tokens"]}
    tokens = {str(token.pop("id")): token for token in added.values()}
    edit(copy / "tokenizer" / "tokenizer_config.json", added_tokens_decoder=tokens)
    (copy / "tokenizer" / "tokenizer.json").unlink()
    asked = request(models, "qwen-image-edit")
    assert picture(load(copy), asked).equal(picture(load(models / "qwen-image-edit"), asked))


def test_without_the_encoder(models: Path) -> None:
    settings = {"vae_config": VaeConfig(load_encoder=False)}
    with pytest.raises(BadRequest, match=r"vae_config\.load_encoder"):
        load(models / "qwen-image-edit", **settings)
    info = load(models / "qwen-image", **settings).info
    assert (info.pictures.max, info.tasks) == (0, ("text-to-image",))


def test_components_that_do_not_fit_each_other(models: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKLQwenImage

    narrow = {"z_dim": 2, "latents_mean": [0.0, 0.0], "latents_std": [1.0, 1.0]}
    AutoencoderKLQwenImage(**VAE | narrow).save_pretrained(tmp_path)
    command = Load(Settings(), models / "qwen-image", {"vae": tmp_path})
    with pytest.raises(ModelError, match="takes 4 latent channels and text of 32, the vae has 2"):
        load_family(command, Mesh.solo(), Cpu(), lambda step, total: None)


# ------------------------------------------------------------------------------------------------------- memory


def test_the_estimate_is_near_the_measured_peak(models: Path, tmp_path: Path) -> None:
    request = REQUEST | {"width": 384, "height": 384, "num_inference_steps": 1}
    estimate_is_near_the_peak(tmp_path / "store", models / "qwen-image", REQUEST, request, slack=2**26)


def test_the_estimate_of_an_edit_is_near_the_measured_peak(models: Path, tmp_path: Path) -> None:
    """A megapixel is seen, however small the picture to make."""
    folder = models / "qwen-image-edit-2509"
    once = request(models, folder.name, num_inference_steps=1, image_path=[str(models / "0.png")])
    estimate_is_near_the_peak(tmp_path / "store", folder, once, once)
