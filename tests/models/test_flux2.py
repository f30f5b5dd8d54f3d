"""FLUX.2 against diffusers: pictures, references, ranks, adapters; the tiny autoencoder; what the family says."""

import json
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from sgld.errors import BadRequest, ModelError, NotBuilt, SgldError
from sgld.messages import Load
from sgld.models import load_family
from sgld.models.base import DiffusionModel
from sgld.models.flux2 import (
    Flux2,
    Flux2Config,
    Flux2DoubleBlock,
    Flux2SingleBlock,
    Flux2Transformer,
    Modulations,
    empirical_mu,
    reference,
)
from sgld.models.flux2_vae import Flux2TinyAutoEncoder
from sgld.nn.attention import TORCH
from sgld.nn.mmdit import TokenLayout
from sgld.nn.parallel import Mesh
from sgld.nn.usp import SequenceAttention
from sgld.nn.weights import Uninitialized, read_architecture, read_json
from sgld.platform import Cpu
from sgld.resolve import resolve
from sgld.settings import Settings, VaeConfig
from tests.models import parity
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
    same_state,
    shown,
    spelled,
    write_lora,
)
from tests.models.references import flux2_pipeline
from tools.tiny import stir
from tools.twins.flux2 import MAKERS, VAE

REQUEST = {
    "prompt": "a red cat & the green ball, 猫", "height": 32, "width": 48, "num_inference_steps": 3, "seed": 7,
    "max_sequence_length": 64,
}  # fmt: skip
DEV, KLEIN, BASE, TINY = "flux2-dev", "flux2-klein", "flux2-klein-base", "flux2-tiny-autoencoder"
COMMON = {
    "attention_head_dim": 128, "axes_dims_rope": [32, 32, 32, 32], "eps": 1e-6, "in_channels": 128, "mlp_ratio": 3.0,
    "out_channels": None, "patch_size": 1, "rope_theta": 2000, "timestep_guidance_channels": 256,
}  # fmt: skip
PUBLISHED = {  # transformer/config.json of black-forest-labs/FLUX.2-dev, -klein-4B and -klein-9B
    "dev": COMMON | {
        "guidance_embeds": True, "joint_attention_dim": 15360, "num_attention_heads": 48, "num_layers": 8,
        "num_single_layers": 48,
    },
    "klein-4b": COMMON | {
        "guidance_embeds": False, "joint_attention_dim": 7680, "num_attention_heads": 24, "num_layers": 5,
        "num_single_layers": 20,
    },
    "klein-9b": COMMON | {
        "guidance_embeds": False, "joint_attention_dim": 12288, "num_attention_heads": 32, "num_layers": 8,
        "num_single_layers": 24,
    },
}  # fmt: skip
WHOLE: dict[str, Any] = {"text_encoder_cpu_offload": True, "dit_cpu_offload": True, "vae_cpu_offload": True}
WEIGHTS = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the twins of dev, klein, its base, and the tiny autoencoder."""
    folder = tmp_path_factory.mktemp("flux2")
    for name in (DEV, KLEIN, BASE, TINY):
        MAKERS[name](folder / name)
    return folder


@pytest.fixture(scope="module")
def pipelines(twins: Path) -> Callable[[str], Any]:
    return cache(lambda name: flux2_pipeline(twins / name))


def theirs(pipeline: Any, **changes: Any) -> Tensor:
    """Frames u8 [1, H, W, 3] of `REQUEST` with changes, as that pipeline makes them."""
    return parity.theirs(pipeline, REQUEST | changes)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two pictures, 83 x 70 and 64 x 96."""
    folder = tmp_path_factory.mktemp("photos")
    return [str(photo(folder / "first.png", 83, 70)), str(photo(folder / "second.png", 64, 96))]


def flux2(folder: Path, **settings: Any) -> Flux2:
    family = load(folder, **settings)
    assert isinstance(family, Flux2)
    return family


# --------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize(("tokens", "steps"), [(6, 3), (4096, 50), (4096, 4), (4300, 28), (4301, 28), (16384, 50)])
def test_the_shift_of_time(tokens: int, steps: int) -> None:
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    assert empirical_mu(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), abs=1e-9)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_transformers_have_the_keys_of_diffusers(tmp_path: Path, name: str) -> None:
    from diffusers import Flux2Transformer2DModel

    file = tmp_path / "config.json"
    file.write_text(json.dumps(PUBLISHED[name]))
    with torch.device("meta"), Uninitialized():
        ours = Flux2Transformer(read_architecture(file, Flux2Config), Mesh.solo(), TORCH)
        expected = Flux2Transformer2DModel(**PUBLISHED[name])
    same_state(ours, expected)


# --------------------------------------------------------------------------------------------- several ranks

NINE = {"height": 48}  # tokens, which do not divide
LOOKING: tuple[tuple[str, dict[str, Any]], ...] = (  # at pictures
    (DEV, {"ulysses_degree": 2}),
    (BASE, {"ring_degree": 2}),
    (BASE, {"enable_cfg_parallel": True}),
)


@pytest.mark.proves("Flux2Pipeline", "USP", "CFG parallel")
@pytest.mark.proves("Flux2KleinPipeline", "USP", "CFG parallel")
def test_same_picture_on_two_ranks(
    twins: Path, pipelines: Callable[[str], Any], photos: list[str], tmp_path: Path
) -> None:
    """Dev's true guidance, which diffusers has not, is as that of one rank."""
    seen, guided = [Image.open(file) for file in photos], REQUEST | {"true_cfg_scale": 3.0}
    cases: list[parity.Case] = [(twins / DEV, REQUEST | NINE, {"ring_degree": 2})]
    cases += [(twins / name, REQUEST | {"image_path": photos}, split) for name, split in LOOKING]
    cases += [(twins / DEV, guided, {"enable_cfg_parallel": True})]
    expected = [theirs(pipelines(DEV), **NINE)]
    expected += [theirs(pipelines(name), image=seen) for name, _ in LOOKING]
    expected += [picture(load(twins / DEV), guided)]
    made = pictures_of_ranks(2, tmp_path / "store", cases)
    assert [apart(*pair) <= 1 for pair in zip(made, expected, strict=True)] == [True] * len(cases)


# ---------------------------------------------------------------------------------------- reference pictures


@pytest.mark.proves("Flux2Pipeline", "image-to-image")
@pytest.mark.proves("Flux2KleinPipeline", "image-to-image")
@pytest.mark.parametrize("name", [DEV, BASE, KLEIN])
def test_pictures_to_look_at(twins: Path, pipelines: Callable[[str], Any], photos: list[str], name: str) -> None:
    family, files = load(twins / name), [Image.open(file) for file in photos]
    scale = {"guidance_scale": family.info.defaults["guidance_scale"]}
    ours = picture(family, REQUEST | {"image_path": photos})
    assert apart(ours, theirs(pipelines(name), image=files, **scale)) <= 1
    assert apart(ours, theirs(pipelines(name), image=files[::-1], **scale)) > 2
    one = picture(family, REQUEST | {"image_path": photos[:1]})
    assert apart(one, theirs(pipelines(name), image=files[0], **scale)) <= 1
    assert apart(one, picture(family, REQUEST)) > 5


@pytest.mark.parametrize("size", [(64, 64), (83, 70), (1024, 1024), (1400, 1111), (3000, 380)])
def test_pictures_are_cut_as_the_pipeline_does(size: tuple[int, int]) -> None:
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    processor = Flux2ImageProcessor(vae_scale_factor=16)
    small = processor._resize_if_exceeds_area(image)
    width, height = (side // 16 * 16 for side in small.size)
    expected = processor.preprocess(small, height=height, width=width, resize_mode="crop")
    assert (reference(image, 16) - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("size", "expected"), [((83, 70), (80, 64)), ((1024, 1024), (1024, 1024)), ((1400, 1111), (1136, 912))]
)
def test_the_picture_gives_the_size(twins: Path, size: tuple[int, int], expected: tuple[int, int]) -> None:
    """Its own, cut to multiples; only what is larger than a megapixel is made smaller."""
    info = load(twins / KLEIN).info
    resolved = resolve({"image_path": ["x.png"]}, info, picture=size)
    params = resolved.params
    assert (params.width, params.height) == expected == tuple(reference(Image.new("RGB", size), 16).shape[:1:-1])
    assert all(f"after the picture's {size[0]}x{size[1]} pixels" in note for note in resolved.notes)
    params = resolve({"image_path": ["x.png"], "width": 64, "height": 32}, info, picture=size).params
    assert (params.width, params.height) == (64, 32)


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ((300, 63), "image_path: a picture of 300x63 pixels is too small; each side needs 64 or more"),
        ((64, 513), "image_path: a picture of 64x513 pixels is too long; one side may be 8 times the other"),
    ],
)
def test_pictures_that_it_cannot_look_at(size: tuple[int, int], says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        reference(Image.new("RGB", size), 16)


def test_the_picture_that_it_cannot_look_at_is_named(twins: Path, photos: list[str], tmp_path: Path) -> None:
    low = str(tmp_path / "low.png")
    Image.new("RGB", (300, 63)).save(low)
    with pytest.raises(BadRequest, match=f"image_path: {low!r} of 300x63 pixels is too small"):
        picture(load(twins / KLEIN), REQUEST | {"image_path": [photos[0], low]})


# ---------------------------------------------------------------------------------------------------- memory


@pytest.mark.proves("Flux2Pipeline", "offload")
@pytest.mark.proves("Flux2KleinPipeline", "offload")
@pytest.mark.parametrize(("name", "precision"), [(DEV, "bf16"), (BASE, "fp32")])
def test_offload_changes_nothing(twins: Path, photos: list[str], name: str, precision: str) -> None:
    request = REQUEST | {"image_path": photos}
    plain = load(twins / name, precision=precision)
    expected = picture(plain, request)
    assert apart(expected, picture(plain, request | {"seed": 8})) > 20
    for settings in (WHOLE, {"dit_layerwise_offload": True}, WHOLE | {"dit_layerwise_offload": True}):
        family = load(twins / name, precision=precision, **settings)
        for _ in range(2):
            assert torch.equal(picture(family, request), expected)


def test_precision(twins: Path) -> None:
    family = flux2(twins / DEV, precision="bf16")
    assert {p.dtype for p in family.transformer.parameters()} == {torch.bfloat16}
    assert (family.text.module.dtype, family.vae.dtype) == (torch.bfloat16, torch.float32)
    assert 0 < apart(picture(family, REQUEST), picture(load(twins / DEV), REQUEST)) < 128


@pytest.mark.parametrize("ours", [Flux2DoubleBlock, Flux2SingleBlock])
def test_half_precision_stays_finite(ours: type[Flux2DoubleBlock] | type[Flux2SingleBlock]) -> None:
    from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock, Flux2TransformerBlock

    torch.manual_seed(0)
    double = ours is Flux2DoubleBlock
    block = (Flux2TransformerBlock if double else Flux2SingleTransformerBlock)(16, 2, 8).half()
    stir(block, 1.0)
    if double:
        block.ff_context.linear_out.weight.data *= 16  # the last addition, not one before it, goes too far
    own = ours(Flux2Config(1, 1, 8, 2, 8), SequenceAttention(Mesh.solo(), TORCH)).half()
    own.load_state_dict(block.state_dict())
    x, text, *mods = (torch.randn(1, n, width).half() for n, width in ((6, 16), (5, 16), (1, 96), (1, 96), (1, 48)))
    text = (60000 if double else 65500) * text.sign()
    mod = Modulations(mods[0].chunk(6, -1), mods[1].chunk(6, -1), mods[2].chunk(3, -1))
    with torch.inference_mode():
        told, seen = block(x, text, *mods[:2]) if double else block(x, text, mods[2], split_hidden_states=True)
        clipped_alike(own(x, text, mod, TokenLayout(None, None, 6)), (seen, told))  # type: ignore[arg-type]


def test_only_the_layers_that_are_needed_are_kept(twins: Path) -> None:
    for name, layers in ((DEV, 30), (KLEIN, 27)):
        model = flux2(twins / name).text.module
        assert len(model.layers) == layers
        assert not any(part in key for key, _ in model.named_parameters() for part in ("vision", "lm_head"))


def test_the_memory_estimate_is_near_the_measured_peak(twins: Path, tmp_path: Path) -> None:
    photo = str(tmp_path / "photo.png")
    Image.new("RGB", (1024, 1024), "green").save(photo)  # encoding it takes the most
    once = REQUEST | {"num_inference_steps": 1}
    request = once | {"height": 64, "width": 64, "image_path": [photo]}
    estimate_is_near_the_peak(tmp_path / "store", twins / KLEIN, once, request, below=1.4)


# ----------------------------------------------------------------------------------------------------- LoRA


@pytest.fixture(scope="module")
def adapter(twins: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for every linear layer of dev, in diffusers' names."""
    file = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    return write_lora(file, flux2(twins / DEV).transformer, scale=0.1)


AUTHORS = {
    "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1", "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj", "attn.to_out": "linear2",
    "ff.linear_in": "img_mlp.0", "ff.linear_out": "img_mlp.2", "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2", "single_transformer_blocks": "single_blocks",
    "transformer_blocks": "double_blocks", "modulation_img.linear": "modulation_img.lin",
    "modulation_txt.linear": "modulation_txt.lin", "stream_modulation.linear": "stream_modulation.lin",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
}  # fmt: skip


def authors_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same adapter with query, key and value in one layer of three times the rank, and shift before scale."""
    left = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    for block in sorted({key.split(".")[1] for key in left if key.startswith("transformer_blocks.")}):
        attn = f"transformer_blocks.{block}.attn"
        for name, parts in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
            layers = [f"{attn}.{part}" for part in parts]
            left |= fused(left, layers, attn.replace(".attn", f".{name}_attn.qkv"))
            for layer in layers:
                del left[f"{layer}.lora_A.weight"], left[f"{layer}.lora_B.weight"]
    left["norm_out.linear.lora_B.weight"] = torch.cat(left["norm_out.linear.lora_B.weight"].chunk(2)[::-1])
    found = {}
    for name, tensor in left.items():
        for ours, authors in AUTHORS.items():
            name = name.replace(ours, authors)
        found[name] = tensor
    return found


@pytest.mark.parametrize(
    ("names", "spelling"),
    [(authors_names, "authors"), (authors_names, "comfy"), (authors_names, "kohya"), (dict, "comfy")],
)
def test_other_spellings_of_the_same_adapter(
    twins: Path,
    adapter: Path,
    tmp_path: Path,
    names: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    spelling: str,
) -> None:
    """Only sums are taken in another order: every weight is the same but for that."""
    family = load(twins / DEV)
    activate(family, adapter)
    expected = picture(family, REQUEST)
    activate(family, spelled(names(load_file(adapter)), spelling, tmp_path / "other.safetensors"))
    assert apart(picture(family, REQUEST), expected) <= 1


def test_an_adapter_of_dev_does_not_fit_klein(twins: Path, adapter: Path) -> None:
    with pytest.raises(BadRequest, match=r"lora_path.*guidance_embedder"):
        activate(load(twins / KLEIN), adapter)


# ----------------------------------------------------------------------------------------- the tiny autoencoder


def with_tiny(twins: Path, name: str) -> DiffusionModel:
    command = Load(Settings.of(model_path=str(twins / name)), twins / name, {"vae": twins / TINY})
    return load_family(command, Mesh.solo(), Cpu(), lambda step, total: None)


def tiny_reference(folder: Path) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Encoder and decoder of that folder, from diffusers' tiny autoencoder and plain functions."""
    from diffusers import AutoencoderTiny

    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    config = {key: value for key, value in read_json(folder / "config.json").items() if not key.startswith("_")}
    inner = AutoencoderTiny(**config | {"latent_channels": config["latent_channels"] // 4}).eval()
    inner.load_state_dict({key.removeprefix("tiny_vae."): x for key, x in state.items() if "tiny_vae" in key})

    def refined(name: str, z: Tensor) -> Tensor:
        w = {key.removeprefix(f"residual_{name}."): x for key, x in state.items()}
        y = F.conv2d(z, w["0.weight"], w["0.bias"], padding=1)
        y = F.silu(F.group_norm(y, 8, w["1.weight"], w["1.bias"]))
        return z + F.conv2d(y, w["3.weight"], w["3.bias"], padding=1)

    def encode(x: Tensor) -> Tensor:
        weight, bias = state["extra_encoder.weight"], state["extra_encoder.bias"]
        return refined("encoder", F.conv2d(inner.encode(x).latents, weight, bias, 2, 1))

    def decode(z: Tensor) -> Tensor:
        weight, bias = state["extra_decoder.weight"], state["extra_decoder.bias"]
        y: Tensor = inner.decode(refined("decoder", F.conv_transpose2d(z, weight, bias, 2, 1))).sample
        return y

    return encode, decode


@pytest.mark.parametrize("name", [DEV, KLEIN])
def test_the_tiny_autoencoder_takes_the_place_of_the_other(twins: Path, photos: list[str], name: str) -> None:
    encode, decode = tiny_reference(twins / TINY)
    family = with_tiny(twins, name)
    assert isinstance(family, Flux2)
    z = torch.randn(1, 32, 2, 3)
    x = 2 * torch.rand(1, 3, 64, 80) - 1
    with torch.inference_mode():
        expected = ((decode(z).clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).to(torch.uint8)
        assert apart(family.decode(z, lambda: None), expected) <= 1
        assert (family.vae.encode(x) - encode(x)).abs().max() < 1e-5
    plain = picture(family, REQUEST)
    assert plain.shape == (1, 32, 48, 3)
    assert apart(plain, picture(load(twins / name), REQUEST)) > 20
    assert apart(plain, picture(family, REQUEST | {"image_path": photos})) > 2


class Pooled(nn.Module):
    """A block of the middle of TAEF2, which looks at all of the picture."""

    def __init__(self, block: nn.Module, n: int = 64):
        super().__init__()
        self.block = block
        self.pool = nn.Sequential(
            nn.Conv2d(n, 4 * n, 1, bias=False), nn.GroupNorm(4, 4 * n), nn.ReLU(), nn.Conv2d(4 * n, n, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x + self.pool(x))
        return y


@pytest.fixture
def taef2() -> Flux2TinyAutoEncoder:
    """The tiny autoencoder with the real weights of TAEF2, whose patching is plain."""
    if not (WEIGHTS / "weights" / "taef2_decoder.pth").is_file():
        pytest.skip("no real weights here")
    module = Flux2TinyAutoEncoder({"act_fn": "relu"})
    for half, pooled, skip in (("encoder", (11, 12, 13), 0), ("decoder", (2, 3, 4), 1)):
        layers = getattr(module.tiny_vae, half).layers  # theirs begin after the clamp, which diffusers has no layer for
        state = torch.load(WEIGHTS / "weights" / f"taef2_{half}.pth", weights_only=True)
        for i in pooled:
            layers[i] = Pooled(layers[i])
        named = {}
        for key, x in state.items():
            i, rest = key.split(".", 1)
            index = int(i) - skip
            named[f"{index}.block.{rest}" if index in pooled and "pool" not in rest else f"{index}.{rest}"] = x.float()
        layers.load_state_dict(named)
    patch = torch.zeros(128, 32, 4, 4)
    for c in range(128):
        patch[c, c // 4, 1 + c // 2 % 2, 1 + c % 2] = 1
    with torch.no_grad():
        for layer in (module.extra_encoder, module.extra_decoder):
            layer.weight.copy_(patch)
            layer.bias.zero_()  # type: ignore[union-attr]
        for layer in (module.residual_encoder[3], module.residual_decoder[3]):
            layer.weight.zero_()
            layer.bias.zero_()
    return module.eval()


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee"])
def test_real_weights_give_the_photo_back(taef2: Flux2TinyAutoEncoder, name: str) -> None:
    photo = Image.open(WEIGHTS / "photos" / f"{name}.png").convert("RGB").crop((0, 0, 256, 256))
    x = reference(photo, 16)

    def psnr(y: Tensor) -> float:
        return -10 * float(torch.log10((((y.clamp(-1, 1) - x) / 2) ** 2).mean()))

    with torch.inference_mode():
        z = taef2.encode(x)
        assert z.shape == (1, 128, 16, 16)
        assert psnr(taef2.decode(z)[0]) > 26
        assert psnr(taef2.decode(z.flip(1))[0]) < 20  # the order of the channels matters


# -------------------------------------------------------------------------------------------- what it says of itself


def test_info(twins: Path) -> None:
    dev, klein, base = (load(twins / name).info for name in (DEV, KLEIN, BASE))
    assert (dev.name, dev.kind, dev.size_multiple, dev.frame_multiple) == ("Flux2Pipeline", "image", 16, 1)
    assert dev.components == ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
    assert dev.tasks == ("text-to-image", "image-to-image")
    common = {"negative_prompt": "", "max_sequence_length": 512, "width": 1024, "height": 1024}
    assert dev.defaults == common | {"num_inference_steps": 50, "guidance_scale": 4.0} == base.defaults
    assert klein.defaults == common | {"num_inference_steps": 4, "guidance_scale": 1.0}
    assert (dev.pictures.min, dev.pictures.max, dev.pictures.starts_denoising) == (0, 10, False)
    assert dev.lora_targets == ("transformer",)
    assert set(dev.unsupported) == {"guidance_scale_2", "boundary_ratio", "cfg_normalization", "diffusers_kwargs"}
    assert set(klein.unsupported) == {*dev.unsupported, "true_cfg_scale"}
    without = load(twins / DEV, vae_config=VaeConfig(load_encoder=False)).info
    assert (without.tasks, without.pictures.max) == (("text-to-image",), 0)


def test_the_published_size_is_estimated_linearly(twins: Path) -> None:
    info = load(twins / DEV).info
    assert info.memory is not None
    small, large = (
        max(info.memory_needs(resolve({"height": side, "width": side}, info).params).values()) - info.memory.base
        for side in (512, 1024)
    )
    assert large == 4 * small > 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"height": 40}, "height: 40 is not a multiple of 16; the nearest valid size is 48x48"),
        ({"num_frames": 5}, "num_frames: 5: this model makes single pictures; allowed is 1"),
        ({"max_sequence_length": 600}, "max_sequence_length: 600 is more than this model takes; allowed is 1 to 512"),
        ({"image_path": ["x.png"] * 11}, "image_path: 11 given; this model takes 10"),
        ({"true_cfg_scale": 2.0}, "true_cfg_scale: this model cannot use it"),
        ({"strength": 0.5, "image_path": ["x.png"]}, "strength: this model cannot use it"),
    ],
    ids=str,
)
def test_requests_that_cannot_be_made(twins: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises((BadRequest, NotBuilt), match=says):
        resolve(REQUEST | changes, load(twins / KLEIN).info)


def test_true_guidance_where_guidance_is_embedded(twins: Path) -> None:
    family = load(twins / DEV)
    plain, request = picture(family, REQUEST), REQUEST | {"true_cfg_scale": 3.0}
    assert apart(plain, picture(family, REQUEST | {"guidance_scale": 1.0})) > 5
    assert torch.equal(plain, picture(family, REQUEST | {"true_cfg_scale": 1.0, "negative_prompt": "blue"}))
    guided = picture(family, request)
    assert apart(guided, plain) > 20
    assert apart(guided, picture(family, request | {"negative_prompt": "blue"})) > 5
    assert apart(plain, picture(family, request | {"negative_prompt": REQUEST["prompt"]})) <= 1
    assert apart(guided, picture(family, request | {"guidance_scale": 1.0})) > 5


def test_a_negative_prompt_without_true_guidance_is_told(twins: Path) -> None:
    told = ["negative_prompt: it has no effect without a true_cfg_scale above 1"]
    dev, base = load(twins / DEV), load(twins / BASE)
    for family, changes, expected in ((dev, {}, told), (dev, {"true_cfg_scale": 2.0}, []), (base, {}, [])):
        params = resolve(REQUEST | {"negative_prompt": "blue"} | changes, family.info).params
        assert family.encode(params, [])[1] == expected


def test_guidance_of_a_distilled_model(twins: Path) -> None:
    family = load(twins / KLEIN)
    params = resolve(REQUEST | {"guidance_scale": 2.0}, family.info).params
    condition, notes = family.encode(params, [])
    assert condition.negative is not None
    assert notes == ["guidance_scale: 2.0: this checkpoint was distilled to need none above 1"]
    condition, notes = family.encode(attrs.evolve(params, guidance_scale=1.0), [])
    assert (condition.negative, notes) == (None, [])


def test_tokens_and_cut_prompts_are_told(twins: Path, photos: list[str]) -> None:
    family = load(twins / DEV)
    params = resolve(REQUEST | {"prompt": "cat " * 99, "true_cfg_scale": 2.0}, family.info).params
    condition, notes = family.encode(params, [Image.open(file) for file in photos])
    assert condition.latent_tokens == 2 * 3 + 5 * 4 + 4 * 6
    assert condition.prompt_tokens == len(flux2(twins / DEV).text.tokenizer.tokenize(params.prompt))
    assert len(notes) == 1
    assert notes[0].startswith("prompt cut from ")
    assert notes[0].endswith("to 64 tokens, the most this request allows")


@pytest.mark.proves("Flux2Pipeline", "previews")
@pytest.mark.proves("Flux2KleinPipeline", "previews")
@pytest.mark.parametrize("name", [DEV, BASE])
def test_previews(twins: Path, name: str) -> None:
    """The first, from pure noise, is what a single step without guidance makes."""
    family = load(twins / name)
    final, previews = shown(family, REQUEST | {"num_inference_steps": 6}, 3)
    assert [frame.shape for frame in previews] == [final.shape] * 3
    once = REQUEST | {"num_inference_steps": 1} | ({"guidance_scale": 1.0} if name == BASE else {})
    assert apart(previews[0], picture(family, once)) <= 1
    assert apart(previews[0], previews[1]) > 5
    assert apart(previews[2], final) > 5


# ---------------------------------------------------------------------------------------------- wrong checkpoints


@pytest.fixture
def copy(twins: Path, tmp_path: Path) -> Path:
    """A twin to break."""
    return Path(shutil.copytree(twins / KLEIN, tmp_path / "model"))


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("model_index.json", {"text_encoder": [None, None]}, "lacks text_encoder"),
        ("model_index.json", {"_class_name": "Flux2Pipeline"}, "guidance_embeds: False is not supported; only True"),
        ("transformer/config.json", {"guidance_embeds": True}, "guidance_embeds: True is not supported; only False"),
        ("transformer/config.json", {"num_layers": 3}, r"16 tensors missing: transformer_blocks\.2\."),
        ("transformer/config.json", {"patch_size": 2}, "patch_size is 2; only 1 is supported"),
        ("transformer/config.json", {"joint_attention_dim": 24}, r"context_embedder.*\[64, 48\] instead of \[64, 24\]"),
        (
            "text_encoder/config.json",
            {"num_hidden_layers": 27, "layer_types": ["full_attention"] * 27},
            r"text_encoder: 11 tensors unexpected: model\.layers\.27\.",
        ),
        ("vae/config.json", {"_class_name": "AutoencoderKL"}, "only AutoencoderKLFlux2 and Flux2TinyAutoEncoder"),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "use_karras_sigmas"),
        ("scheduler/scheduler_config.json", {"_class_name": "UniPCMultistepScheduler"}, "only 'FlowMatchEuler"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(copy: Path, file: str, changes: dict[str, Any], says: str) -> None:
    edit(copy / file, **changes)
    with pytest.raises(SgldError, match=says) as caught:
        picture(load(copy), REQUEST)
    assert isinstance(caught.value, ModelError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component_is_named(copy: Path, part: str) -> None:
    shutil.rmtree(copy / part)
    with pytest.raises(ModelError, match=part):
        load(copy)


def test_a_text_encoder_with_too_few_layers(copy: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    kept = Qwen3Config.from_pretrained(copy / "text_encoder")
    kept.num_hidden_layers, kept.layer_types = 26, ["full_attention"] * 26
    Qwen3ForCausalLM(kept).save_pretrained(copy / "text_encoder")
    with pytest.raises(ModelError, match="text_encoder: has 26 layers; at least 27 are needed"):
        load(copy)


def test_a_tokenizer_without_a_chat_template(copy: Path) -> None:
    (copy / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="tokenizer: has no chat template"):
        load(copy)


def test_another_text_encoder_is_refused_before_it_is_built(twins: Path) -> None:
    command = Load(Settings(), twins / DEV, {"text_encoder": twins / KLEIN / "text_encoder"})
    with pytest.raises(ModelError, match="config.json: model_type is 'qwen3'; only 'mistral3' is supported"):
        load_family(command, Mesh.solo(), Cpu(), lambda step, total: None)


def test_components_that_do_not_fit_each_other(twins: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKLFlux2

    AutoencoderKLFlux2(**VAE | {"latent_channels": 4}).save_pretrained(tmp_path / "vae")
    command = Load(Settings(), twins / KLEIN, {"vae": tmp_path / "vae"})
    with pytest.raises(ModelError, match="takes 32 latent channels and text of 48, the vae has 16 channels"):
        load_family(command, Mesh.solo(), Cpu(), lambda step, total: None)
