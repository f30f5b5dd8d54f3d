"""Borrowed components: strict, in tiles, shared by ranks, and gone while they are not needed."""

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sgld.errors import BadRequest, ModelError
from sgld.messages import Load
from sgld.models.components import ComponentLoader
from sgld.models.hf_components import Autoencoder, text_encoder, tokenizer
from sgld.nn.parallel import Mesh
from sgld.platform import Cpu
from sgld.settings import Settings, VaeConfig
from tests.nn.ranks import on_ranks
from tools import tiny
from tools.twins.flux import VAE, t5_tokenizer

SIZES: dict[str, dict[str, Any]] = {
    "LlamaModel": {"num_key_value_heads": 2, "head_dim": 8},
    "CLIPTextModel": {"projection_dim": 32, "max_position_embeddings": 16, "eos_token_id": 2},
    "T5EncoderModel": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
                       "relative_attention_num_buckets": 8, "feed_forward_proj": "gated-gelu"},
}  # fmt: skip
COMMON = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
BLOCKS = {"LlamaModel": "layers", "CLIPTextModel": "encoder", "T5EncoderModel": "encoder"}
TOKENS = torch.tensor([[5, 9, 3, 11, 2, 19]])
TILES = VaeConfig(
    tile_sample_min_height=32, tile_sample_min_width=32, tile_sample_stride_height=24, tile_sample_stride_width=24
)


def encoder_class(kind: str) -> Any:
    import transformers

    return getattr(transformers, kind)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each kind of text encoder a model with that and an autoencoder of pictures."""
    import transformers
    from diffusers import AutoencoderKL

    made = {}
    for kind, size in SIZES.items():
        folder = made[kind] = tmp_path_factory.mktemp(kind)
        cls = encoder_class(kind)
        torch.manual_seed(0)
        config = getattr(transformers, cls.config_class.__name__)
        encoder = cls(config(**({} if kind == "T5EncoderModel" else COMMON) | size, vocab_size=20))
        vae = AutoencoderKL(**VAE, sample_size=32)
        for name, module in {"text_encoder": encoder, "vae": vae}.items():
            tiny.stir(module, 0.1)
            module.save_pretrained(folder / name)
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text("{}")
        t5_tokenizer().save_pretrained(folder / "tokenizer")
        index = {"text_encoder": ["transformers", kind], "vae": ["diffusers", "AutoencoderKL"]}
        (folder / "model_index.json").write_text(json.dumps(index))
    return made


def parts_of(folder: Path, mesh: Mesh | None = None, platform: Cpu | None = None, **settings: Any) -> ComponentLoader:
    mesh = mesh or Mesh.solo()
    load = Load(Settings.of(model_path=str(folder), num_gpus=mesh.world, **settings), folder)
    return ComponentLoader(load, mesh, platform or Cpu(), lambda done, total: None, needs=("text_encoder",))


def states(module: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = module(TOKENS).last_hidden_state
        return found


# ------------------------------------------------------------------------------------------------ text encoders


@pytest.mark.parametrize("kind", SIZES)
def test_an_encoder_as_transformers_loads_it(folders: Mapping[str, Path], kind: str) -> None:
    ours = text_encoder(parts_of(folders[kind]), "text_encoder", encoder_class(kind))
    theirs = encoder_class(kind).from_pretrained(folders[kind] / "text_encoder")
    assert torch.equal(states(ours), states(theirs))
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_an_encoder_is_loaded_strictly(folders: Mapping[str, Path], tmp_path: Path, kind: str, change: str) -> None:
    folder = Path(shutil.copytree(folders[kind], tmp_path / "model"))
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "norm" in name and name.endswith(".weight"))
    if change == "missing":
        tensors.pop(name)
    else:
        tensors[name if change == "shape" else name.replace(".weight", ".extra")] = torch.zeros(7)
    save_file(tensors, file, {"format": "pt"})
    says = {
        "missing": "1 tensor missing: ",
        "unexpected": "1 tensor unexpected: ",
        "shape": r"1 tensor of the wrong shape: .*norm.* \[7\] instead of \[32\]",
    }
    with pytest.raises(ModelError, match=f"/text_encoder: .*({says[change]})") as caught:
        text_encoder(parts_of(folder), "text_encoder", encoder_class(kind))
    assert "\n" not in str(caught.value)


def test_an_encoder_that_cannot_be_read(folders: Mapping[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["LlamaModel"], tmp_path / "model"))
    (folder / "text_encoder" / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="/text_encoder: cannot be read: "):
        text_encoder(parts_of(folder), "text_encoder", encoder_class("LlamaModel"))


def test_a_tokenizer(folders: Mapping[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["LlamaModel"], tmp_path / "model"))
    ids = tokenizer(parts_of(folder), "tokenizer")("a red cat").input_ids
    assert ids == t5_tokenizer()("a red cat").input_ids
    (folder / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="/tokenizer: cannot be read: ") as caught:
        tokenizer(parts_of(folder), "tokenizer")
    assert "\n" not in str(caught.value)


@attrs.frozen
class HostMemory(Cpu):
    """A CPU on which offloaded weights wait in memory, as they do on CUDA."""

    offloads_to_files = False


@pytest.mark.parametrize("platform", [Cpu(), HostMemory()], ids=["files", "memory"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", SIZES)
def test_an_offloaded_encoder_comes_and_goes(
    folders: Mapping[str, Path], kind: str, precision: str, platform: Cpu
) -> None:
    """And is weighed rightly: T5 has one table under two names, and in half precision layers that stay in float32."""
    stays = text_encoder(parts_of(folders[kind], precision=precision), "text_encoder", encoder_class(kind))
    expected, weighs = states(stays), sum(p.nbytes for p in stays.parameters())
    parts = parts_of(folders[kind], platform=platform, precision=precision, text_encoder_cpu_offload=True)
    module = text_encoder(parts, "text_encoder", encoder_class(kind))
    for _ in range(2):
        assert held(module) == 0
        parts.offloader.need("text_encoder")
        assert held(module) == parts.offloader.held_bytes("text_encoder") == weighs
        assert torch.equal(states(module), expected)
        parts.offloader.release_all()


def held(module: nn.Module) -> int:
    """Bytes of the weights that are there, placeholders left out."""
    return sum(p.nbytes for p in module.parameters() if p.untyped_storage().nbytes() >= p.nbytes)


# -------------------------------------------------------------------------------------------------------- ranks


PICTURES = {(11, 9): 6, (8, 9): 5, (3, 4): 1}  # latents in height and width, to how often each of two ranks hears


def latents(height: int = 11, width: int = 9) -> Tensor:
    return torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(0))


def autoencoder(folder: Path, mesh: Mesh | None = None, **settings: Any) -> Autoencoder:
    from diffusers import AutoencoderKL

    return Autoencoder(parts_of(folder, mesh, **settings), AutoencoderKL, 8)


def _on_two(mesh: Mesh, folders: Mapping[str, Path]) -> list[Any]:
    found: list[Any] = []
    for kind, folder in folders.items():
        for settings in ({}, {"text_encoder_cpu_offload": True}):
            parts = parts_of(folder, mesh, tp_size=2, **settings)
            module = text_encoder(parts, "text_encoder", encoder_class(kind), BLOCKS[kind])
            parts.offloader.need("text_encoder")
            found.append((states(module).numpy(), sum(p.numel() for p in module.parameters())))
    vae = autoencoder(folders["LlamaModel"], mesh, vae_sp=True, vae_config=TILES)
    for size in PICTURES:
        called: list[int] = []
        with torch.inference_mode():
            found.append((vae.decode(latents(*size), partial(called.append, 1)).numpy(), len(called)))
    return found


def test_two_ranks_find_what_one_does(folders: dict[str, Path], tmp_path: Path) -> None:
    """Text encoders that they share by heads, and an autoencoder by tiles; a picture of one tile is not shared."""
    first, second = on_ranks(2, tmp_path / "store", _on_two, folders)
    shared = iter(zip(first, second, strict=True))
    for kind, folder in folders.items():
        module = text_encoder(parts_of(folder), "text_encoder", encoder_class(kind))
        alone, count = states(module), sum(p.numel() for p in module.parameters())
        for _ in range(2):
            for found, own_count in next(shared):
                torch.testing.assert_close(torch.from_numpy(found), alone, rtol=1e-4, atol=1e-5)
                assert own_count < 0.7 * count
    vae = autoencoder(folders["LlamaModel"], vae_sp=True, vae_config=TILES)  # the same flags, one worker
    for size, (pictures, calls) in zip(PICTURES, (zip(*both, strict=True) for both in shared), strict=True):
        with torch.inference_mode():
            assert torch.equal(torch.from_numpy(pictures[0]), vae.decode(latents(*size)))
        assert pictures[1].size == 0
        assert calls == (PICTURES[size],) * 2


@pytest.mark.parametrize(("kind", "ranks", "allowed"), [("LlamaModel", 4, "1, 2"), ("T5EncoderModel", 3, "1, 2, 4")])
def test_what_does_not_divide_is_an_error(folders: dict[str, Path], kind: str, ranks: int, allowed: str) -> None:
    mesh = Mesh(0, ranks, torch.device("cpu"))
    with pytest.raises(BadRequest, match=f"tp_size: {ranks} workers cannot share .* evenly; allowed: {allowed}$"):
        text_encoder(parts_of(folders[kind], mesh, tp_size=ranks), "text_encoder", encoder_class(kind), BLOCKS[kind])
    with pytest.raises(BadRequest, match=f"tp_size: {ranks} workers cannot share this model's text_encoder; use 1"):
        text_encoder(parts_of(folders[kind], mesh, tp_size=ranks), "text_encoder", encoder_class(kind))


# ------------------------------------------------------------------------------------------------- autoencoders


def pixels(decode: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Levels of 255, [1, H, W, 3], as diffusers decodes."""
    with torch.inference_mode():
        y = decode(z)
    return y.mul(0.5).add(0.5).clamp(0, 1).mul(255).round().permute(0, 2, 3, 1)


@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiles"])
def test_decoding_is_that_of_diffusers(folders: Mapping[str, Path], tiled: bool) -> None:
    from diffusers import AutoencoderKL

    folder, z = folders["LlamaModel"], latents()
    theirs = AutoencoderKL.from_pretrained(folder / "vae")
    if tiled:
        theirs.enable_tiling()
    settings: dict[str, Any] = {"vae_tiling": True, "vae_config": TILES} if tiled else {}
    ours = autoencoder(folder, **settings)
    called = []
    with torch.inference_mode():
        found = ours.decode(z, lambda: called.append(1))
        whole = autoencoder(folder).decode(z)
    assert found.shape == (1, 88, 72, 3)
    assert (found.float() - pixels(lambda z: theirs.decode(z).sample, z)).abs().max() <= 1
    assert len(called) == (12 if tiled else 1)
    assert ((found.int() - whole.int()).abs().max() > 1) == tiled, "tiles make no difference, so this proves nothing"


def test_it_is_shared_by_tiles_alone(folders: Mapping[str, Path]) -> None:
    folder = folders["LlamaModel"]
    mode = attrs.evolve(TILES, parallel_decode_mode="tiled")
    assert autoencoder(folder, vae_sp=True, vae_config=mode).tiling
    with pytest.raises(BadRequest, match=r"^vae_config.parallel_decode_mode: 'spatial': .*; use auto or tiled$"):
        autoencoder(folder, vae_sp=True, vae_config=VaeConfig(parallel_decode_mode="spatial"))
    for path, settings in {
        "vae_tiling": {"vae_tiling": False},
        "vae_config.use_tiling": {"vae_config": VaeConfig(use_tiling=False)},
    }.items():
        with pytest.raises(BadRequest, match=f"^{path}: false: this model's decode is shared tile by tile"):
            autoencoder(folder, vae_sp=True, **settings)


def test_encoding_is_the_mode(folders: Mapping[str, Path]) -> None:
    from diffusers import AutoencoderKL

    ours = autoencoder(folders["LlamaModel"])
    theirs = AutoencoderKL.from_pretrained(folders["LlamaModel"] / "vae")
    picture = torch.rand(1, 3, 32, 48) * 2 - 1
    with torch.inference_mode():
        assert torch.equal(ours.encode(picture), theirs.encode(picture).latent_dist.mode())


def test_another_autoencoder_is_refused(folders: Mapping[str, Path]) -> None:
    from diffusers import AutoencoderKLWan

    with pytest.raises(ModelError, match="vae/config.json: _class_name is 'AutoencoderKL'; only 'AutoencoderKLWan'"):
        Autoencoder(parts_of(folders["LlamaModel"]), AutoencoderKLWan, 8)
    with pytest.raises(BadRequest, match="load_decoder"):
        autoencoder(folders["LlamaModel"], vae_config=VaeConfig(load_decoder=False))
