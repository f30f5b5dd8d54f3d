"""LoRA files: every spelling of one adapter is the same adapter, and what does not fit is named."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sgld.errors import BadRequest, NotBuilt
from sgld.models import names
from sgld.models.wan_transformer import WanConfig, WanTransformer
from sgld.nn.attention import TORCH
from sgld.nn.lora import Part, merged_bias, merged_weight
from sgld.nn.lora_formats import Delta, Fitted, Renames, fit, read_adapter
from sgld.nn.parallel import Mesh
from tools.tiny import TRANSFORMER

with torch.device("meta"):
    MODEL = WanTransformer(WanConfig(**TRANSFORMER), Mesh.solo(), TORCH)
SHAPES = {name: tuple(p.shape) for name, p in MODEL.named_parameters()}
SELF = {"attn1.to_q": "self_attn.q", "attn1.to_k": "self_attn.k", "attn1.to_v": "self_attn.v"}
CROSS = {"attn2.to_q": "cross_attn.q", "attn2.to_k": "cross_attn.k", "attn2.to_v": "cross_attn.v"}
REST = {
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
BLOCK = SELF | CROSS | REST
OUTSIDE = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}
BLOCKS = {f"blocks.{i}.{ours}": f"blocks.{i}.{theirs}" for i in range(2) for ours, theirs in BLOCK.items()}
ORIGINAL = BLOCKS | OUTSIDE | {"patch_embedding": "patch_embedding"}
RANK = 3


@attrs.frozen
class Pair:
    down: Tensor
    up: Tensor
    alpha: float

    @property
    def delta(self) -> Tensor:
        """Of a two-dimensional weight."""
        return self.alpha / len(self.down) * self.up.flatten(1) @ self.down.flatten(1)


Truth = dict[str, Pair]


def make_truth(names: Mapping[str, str], alphas: tuple[float, ...] = (0.5, 7.0, 3.0)) -> Truth:
    """A random pair for each of our layers, with alphas that are neither the rank nor whole numbers."""
    draw = torch.Generator().manual_seed(1)
    truth = {}
    for i, name in enumerate(names):
        out, *inner = SHAPES[f"{name}.weight"]
        down = torch.randn(RANK, *inner, generator=draw)
        up = torch.randn(out, RANK, *(1,) * (len(inner) - 1), generator=draw)
        truth[name] = Pair(down, up, alphas[i % len(alphas)])
    return truth


def spelled(
    truth: Truth,
    layer: Callable[[str], str],
    down: str = "lora_A.weight",
    up: str = "lora_B.weight",
    alpha: str | None = "alpha",
) -> dict[str, Tensor]:
    """A file's tensors, with those names."""
    tensors = {}
    for name, pair in truth.items():
        tensors |= {f"{layer(name)}.{down}": pair.down, f"{layer(name)}.{up}": pair.up}
        if alpha is not None:
            tensors[f"{layer(name)}.{alpha}"] = torch.tensor(pair.alpha)
    return tensors


def kohya(truth: Truth, named: Callable[[str], str]) -> dict[str, Tensor]:
    layer: Callable[[str], str] = lambda name: f"lora_unet_{named(name).replace('.', '_')}"  # noqa: E731
    return spelled(truth, layer, "lora_down.weight", "lora_up.weight")


FORMATS: dict[str, Callable[[Truth], dict[str, Tensor]]] = {
    "plain": lambda t: spelled(t, str),
    "diffusers": lambda t: spelled(t, "transformer.{}".format),
    "diffusers, down and up": lambda t: spelled(t, "transformer.{}".format, "lora.down.weight", "lora.up.weight"),
    "second transformer": lambda t: spelled(t, "transformer.{}".format),
    "peft": lambda t: spelled(t, "base_model.model.{}".format),
    "peft, slot": lambda t: spelled(t, "base_model.model.{}".format, "lora_A.default.weight", "lora_B.default.weight"),
    "peft, slot, no leaf": lambda t: spelled(t, str, "lora_A.mine", "lora_B.mine"),
    "original": lambda t: spelled(t, ORIGINAL.__getitem__),
    "comfy": lambda t: spelled(t, lambda n: f"diffusion_model.{ORIGINAL[n]}"),
    "comfy, down and up": lambda t: spelled(
        t, lambda n: f"diffusion_model.{ORIGINAL[n]}", "lora_down.weight", "lora_up.weight"
    ),
    "comfy, model": lambda t: spelled(t, lambda n: f"model.diffusion_model.{ORIGINAL[n]}"),
    "comfy, our names": lambda t: spelled(t, "diffusion_model.{}".format),
    "kohya": lambda t: kohya(t, ORIGINAL.__getitem__),
    "kohya, our names": lambda t: kohya(t, str),
    "kohya, diffusers' prefix": lambda t: {
        key.replace("lora_unet_", "lora_transformer_"): tensor for key, tensor in kohya(t, str).items()
    },
}


def write(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    file = folder / "adapter.safetensors"
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, file, dict(metadata or {}))
    return file


def fitted(path: Path, names: Renames = names.WAN, **options: Any) -> Fitted:
    return fit(read_adapter(path), SHAPES, names, **options)


def product(delta: Delta) -> Tensor:
    assert delta.up is not None and delta.down is not None
    return delta.scale * delta.up.flatten(1) @ delta.down.flatten(1)


def differences(found: Fitted, truth: Truth) -> float:
    """The largest difference between the deltas, of layers that must be the same."""
    assert set(found.layers) == set(truth)
    return max(float((product(found.layers[name]) - pair.delta).abs().max()) for name, pair in truth.items())


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_the_same_adapter(tmp_path: Path, name: str) -> None:
    truth = make_truth(ORIGINAL)
    found = fitted(write(tmp_path, FORMATS[name](truth)))
    assert differences(found, truth) == 0
    assert not found.skipped


def test_the_names_of_this_test_are_all_linear_and_convolution_layers() -> None:
    layers = {name for name, module in MODEL.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv3d)}
    assert layers == set(ORIGINAL)


def test_wrong_mapping_and_ignored_alpha_would_show(tmp_path: Path) -> None:
    truth = make_truth(ORIGINAL)
    file = write(tmp_path, FORMATS["comfy"](truth))
    swapped = [(".attn1.", ".cross_attn."), (".attn2.", ".self_attn."), *names.WAN]
    assert differences(fitted(file, swapped), truth) > 1
    for key, tensor in (tensors := load_file(file)).items():
        if key.endswith(".alpha"):
            tensors[key] = tensor.int().float()  # an alpha cut to a whole number
    assert differences(fitted(write(tmp_path, tensors)), truth) > 0.1
    without = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    assert differences(fitted(write(tmp_path, without)), truth) > 1


def test_alpha_may_be_a_whole_number(tmp_path: Path) -> None:
    """As kohya's converters write it."""
    truth = make_truth(ORIGINAL, alphas=(1.0, 7.0))
    tensors = FORMATS["kohya"](truth)
    whole = {key: tensor.long() if key.endswith(".alpha") else tensor for key, tensor in tensors.items()}
    assert differences(fitted(write(tmp_path, whole)), truth) == 0
    with pytest.raises(BadRequest, match="no finite floating-point numbers"):
        read_adapter(write(tmp_path, {key: tensor.long() for key, tensor in tensors.items()}))


def test_alpha_of_zero_and_half_are_what_they_say(tmp_path: Path) -> None:
    truth = make_truth(ORIGINAL, alphas=(0.0, 0.5))
    found = fitted(write(tmp_path, FORMATS["kohya"](truth)))
    assert {delta.scale for delta in found.layers.values()} == {0.0, 0.5 / RANK}


@pytest.mark.parametrize("name", ["comfy", "comfy, down and up"])
def test_same_as_diffusers_converter(tmp_path: Path, name: str) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers as convert

    truth = make_truth(BLOCKS)  # outside the blocks it does not know alpha
    biases = {f"diffusion_model.{ORIGINAL[n]}.diff_b": torch.randn(SHAPES[f"{n}.bias"]) for n in truth}
    outside = {n: attrs.evolve(pair, alpha=RANK) for n, pair in make_truth(OUTSIDE).items()}
    kinds = ("lora_A.weight", "lora_B.weight") if name == "comfy" else ("lora_down.weight", "lora_up.weight")
    bare = spelled(outside, lambda n: f"diffusion_model.{ORIGINAL[n]}", *kinds, alpha=None)
    tensors = FORMATS[name](truth) | biases | bare
    ours = fitted(write(tmp_path, tensors))
    theirs = convert({key: tensor.clone() for key, tensor in tensors.items()})
    assert_same_as_converted(ours, theirs)
    for name, delta in ours.layers.items():
        expected = theirs.get(f"transformer.{name}.lora_B.bias")
        assert (expected is None) == (delta.diff_b is None)
        assert expected is None or torch.equal(delta.diff_b, expected)  # type: ignore[arg-type]


def test_same_as_diffusers_converter_of_kohya_files(tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_musubi_wan_lora_to_diffusers as convert

    tensors = FORMATS["kohya"](make_truth(BLOCKS))
    theirs = convert({key: tensor.clone() for key, tensor in tensors.items()})
    assert_same_as_converted(fitted(write(tmp_path, tensors)), theirs)


def test_same_as_diffusers_converter_with_picture_input(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers as convert

    with torch.device("meta"):
        twin = WanTransformer3DModel(**TRANSFORMER, added_kv_proj_dim=48, image_dim=20)
    shapes = {name: tuple(p.shape) for name, p in twin.named_parameters()}
    sizes = {"blocks.0.cross_attn.k_img": (48, 48), "blocks.1.cross_attn.v_img": (48, 48), "img_emb.proj.1": (20, 20),
             "img_emb.proj.3": (48, 20), "blocks.0.ffn.2": (48, 96)}  # fmt: skip
    tensors = {}
    for name, (out, inner) in sizes.items():
        tensors[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(RANK, inner)
        tensors[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(out, RANK)
    ours = fit(read_adapter(write(tmp_path, tensors)), shapes, names.WAN)
    assert_same_as_converted(ours, convert(dict(tensors)))


def assert_same_as_converted(ours: Fitted, theirs: dict[str, Tensor]) -> None:
    layers = {key.split(".lora_A")[0].removeprefix("transformer.") for key in theirs if ".lora_A." in key}
    assert layers == set(ours.layers)
    for name, delta in ours.layers.items():
        expected = theirs[f"transformer.{name}.lora_B.weight"] @ theirs[f"transformer.{name}.lora_A.weight"]
        torch.testing.assert_close(product(delta), expected, rtol=1e-5, atol=1e-5)


def test_full_deltas_of_weights_biases_norms_and_modulations(tmp_path: Path) -> None:
    ours = {
        "blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
        "blocks.1.norm3.diff": "blocks.1.norm2.weight",
        "blocks.1.norm3.diff_b": "blocks.1.norm2.bias",
        "blocks.0.modulation.diff": "blocks.0.scale_shift_table",
        "blocks.1.diff_m": "blocks.1.scale_shift_table",
        "head.diff_m": "scale_shift_table",
        "head.head.diff": "proj_out.weight",
        "head.head.diff_b": "proj_out.bias",
        "patch_embedding.diff": "patch_embedding.weight",
        "time_projection.1.diff_b": "condition_embedder.time_proj.bias",
    }
    tensors = {f"diffusion_model.{key}": torch.randn(SHAPES[name]) for key, name in ours.items()}
    found = fitted(write(tmp_path, tensors))
    values = {}
    for delta in found.layers.values():
        values |= {delta.weight: delta.diff, delta.bias: delta.diff_b}
    for key, name in ours.items():
        assert torch.equal(values[name], tensors[f"diffusion_model.{key}"])  # type: ignore[arg-type]


def test_pairs_of_a_linear_layer_written_as_convolutions(tmp_path: Path) -> None:
    truth = make_truth(BLOCKS)
    tensors = {
        key: tensor[..., None, None] if tensor.ndim == 2 else tensor for key, tensor in FORMATS["kohya"](truth).items()
    }
    assert differences(fitted(write(tmp_path, tensors)), truth) == 0


# ---------------------------------------------------------------------------------------------------- fused layers

PIECES = {"to_q": 12, "to_k": 4, "to_v": 4, "proj_mlp": 20}
FUSED = {"double.0.qkv": ("to_q", "to_k", "to_v"), "single.0.linear1": tuple(PIECES)}
FUSED_NAMES: Renames = (
    (r"^(double|single)\.(\d+)\.to_([qkv])$", r"\1.\2.qkv\3"),
    (r"qkvq$", "qkv#0"),
    (r"qkvk$", "qkv#1"),
    (r"qkvv$", "qkv#2"),
    (r"^(single\.\d+)\.qkv#(\d)", r"\1.linear1#\2|\1.qkv_lora#\2"),
    (r"\.proj_mlp$", ".linear1#3"),
    (r"^norm_out\.linear$", "final_layer.mod.1#1#0"),
)
SPLIT_SHAPES = {
    f"{layer.rpartition('.')[0]}.{part}.{leaf}": (PIECES[part], *inner)
    for layer, parts in FUSED.items()
    for part in parts
    for leaf, inner in (("weight", (8,)), ("bias", ()))
} | {"norm_out.linear.weight": (16, 8), "norm_out.linear.bias": (16,), "gate": ()}
FUSED_SHAPES = {
    f"{layer}.{leaf}": (sum(PIECES[part] for part in parts), *inner)
    for layer, parts in FUSED.items()
    for leaf, inner in (("weight", (8,)), ("bias", ()))
} | {"final_layer.mod.1.weight": (16, 8), "final_layer.mod.1.bias": (16,)}


def fused_file(folder: Path, layer: Callable[[str], str], *kinds: str) -> Path:
    """An adapter of the authors' fused layers, in their names."""
    draw = torch.Generator().manual_seed(2)
    tensors = {}
    for name, (out, *_) in FUSED_SHAPES.items():
        shapes = {
            "lora_down.weight": (RANK, 8), "lora_up.weight": (out, RANK), "lora_up.bias": (out,), "diff": (out, 8),
            "diff_b": (out,), "dora_scale": (out, 1), "lora_magnitude_vector": (out,),
        }  # fmt: skip
        if name.endswith(".weight"):
            for kind in kinds:
                key = f"{layer(name.removesuffix('.weight'))}.{kind}"
                tensors[key] = torch.randn(shapes[kind], generator=draw) if kind in shapes else torch.tensor(1.5)
    return write(folder, tensors)


FUSED_SPELLINGS: dict[str, Callable[[str], str]] = {
    "authors": str,
    "comfy": "diffusion_model.{}".format,
    "kohya": lambda name: f"lora_unet_{name.replace('.', '_')}",
}
PAIR = ("lora_down.weight", "lora_up.weight", "alpha")


@pytest.mark.parametrize("spelling", FUSED_SPELLINGS)
@pytest.mark.parametrize(
    "kinds",
    [PAIR, (*PAIR, "lora_up.bias"), ("diff", "diff_b"), (*PAIR, "dora_scale"), (*PAIR, "lora_magnitude_vector")],
    ids="+".join,
)
def test_a_fused_layer_is_shared_out_by_rows(tmp_path: Path, spelling: str, kinds: tuple[str, ...]) -> None:
    """Against the same file on a model whose layers are fused as in the file."""
    adapter = read_adapter(fused_file(tmp_path, FUSED_SPELLINGS[spelling], *kinds))
    split, fused = fit(adapter, SPLIT_SHAPES, FUSED_NAMES), fit(adapter, FUSED_SHAPES)
    assert len(split.layers) == 8
    for layer, whole in fused.layers.items():
        start = 0
        for part in FUSED.get(layer, ()):
            rows = torch.arange(start, start := start + PIECES[part])
            assert_rows(split.layers[f"{layer.rpartition('.')[0]}.{part}"], whole, rows)
    assert_rows(split.layers["norm_out.linear"], fused.layers["final_layer.mod.1"], torch.arange(16).roll(8))


def test_a_layer_of_several_names(tmp_path: Path) -> None:
    """In some files it is fused with fewer others."""
    up, down = torch.randn(20, RANK), torch.randn(RANK, 8)
    adapter = read_adapter(write(tmp_path, {"single.0.qkv_lora.up.weight": up, "single.0.qkv_lora.down.weight": down}))
    found = fit(adapter, SPLIT_SHAPES, FUSED_NAMES).layers
    assert list(found) == ["single.0.to_q", "single.0.to_k", "single.0.to_v"]
    for delta, rows in zip(found.values(), up.split([12, 4, 4]), strict=True):
        assert delta.up is not None and delta.down is not None
        assert torch.equal(delta.up, rows) and torch.equal(delta.down, down)


def assert_rows(part: Delta, whole: Delta, rows: Tensor) -> None:
    """Merging the part is these rows of what merging the whole gives."""
    for merged, name in ((merged_weight, "weight"), (merged_bias, "bias")):
        before = torch.randn(FUSED_SHAPES[getattr(whole, name)])
        if getattr(whole, f"changes_{name}"):
            after = merged(before, [Part(whole, 0.5)])
            torch.testing.assert_close(merged(before[rows], [Part(part, 0.5)]), after[rows])
            assert (after - before).abs().amax(tuple(range(1, before.ndim))).min() > 1e-3


@pytest.mark.parametrize("kinds", [PAIR, ("diff", "diff_b")], ids="+".join)
@pytest.mark.parametrize("lack", [1, -1])
def test_a_fused_layer_of_another_size(tmp_path: Path, kinds: tuple[str, ...], lack: int) -> None:
    file = fused_file(tmp_path, str, *kinds)
    tensors = load_file(file)
    key = f"single.0.linear1.{kinds[-1] if 'diff' in kinds else kinds[1]}"
    wide = torch.zeros(41, *tensors[key].shape[1:])
    tensors[key] = wide if lack < 0 else wide[:39]
    with pytest.raises(BadRequest, match=rf"single\.0\.linear1.*\[{40 - lack}(, 3)?\]; 40 rows are needed"):
        fit(read_adapter(write(tmp_path, tensors)), SPLIT_SHAPES, FUSED_NAMES)
    partial = fit(read_adapter(tmp_path), SPLIT_SHAPES, FUSED_NAMES, strict=False)
    assert {name.partition(".")[0] for name in partial.layers} == {"double", "norm_out"}


def test_a_magnitude_across_outputs_cannot_be_shared_out(tmp_path: Path) -> None:
    tensors = load_file(fused_file(tmp_path, str, *PAIR)) | {"double.0.qkv.dora_scale": torch.ones(1, 8)}
    assert fit(read_adapter(write(tmp_path, tensors)), FUSED_SHAPES).layers
    with pytest.raises(BadRequest, match=r"dora_scale \[1, 8\]; 20 rows are needed"):
        fit(read_adapter(tmp_path), SPLIT_SHAPES, FUSED_NAMES)


# ------------------------------------------------------------------------------------------------ alpha and rank


def peft_folder(folder: Path, truth: Truth, **config: Any) -> Path:
    save_file(spelled(truth, "base_model.model.{}".format, alpha=None), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, **config}))
    return folder


def scales(found: Fitted) -> set[float]:
    return {delta.scale for delta in found.layers.values()}


@pytest.mark.parametrize("whole", [True, False], ids=["folder", "file"])
def test_adapter_config(tmp_path: Path, whole: bool) -> None:
    folder = peft_folder(tmp_path, make_truth(BLOCKS), lora_alpha=0.75)
    assert scales(fitted(folder if whole else folder / "adapter_model.safetensors")) == {0.25}


def test_another_file_does_not_take_the_config_beside_it(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path, make_truth(BLOCKS), lora_alpha=0.75)
    (folder / "adapter_model.safetensors").rename(folder / "other.safetensors")
    assert scales(fitted(folder / "other.safetensors")) == {1.0}
    assert scales(fitted(folder)) == {0.25}


def test_alpha_pattern(tmp_path: Path) -> None:
    pattern = {"to_q": 6, r"^blocks\.0\.ffn\.net\.2": 9, "to_out.0": 1.5}
    found = fitted(peft_folder(tmp_path, make_truth(BLOCKS), lora_alpha=3, alpha_pattern=pattern))
    expected = {"blocks.1.attn2.to_q": 2.0, "blocks.0.ffn.net.2": 3.0, "blocks.1.ffn.net.2": 1.0}
    expected["blocks.0.attn1.to_out.0"] = 0.5
    assert {name: found.layers[name].scale for name in expected} == expected


def test_rank_stabilized(tmp_path: Path) -> None:
    found = fitted(peft_folder(tmp_path, make_truth(BLOCKS), lora_alpha=3, use_rslora=True))
    assert scales(found) == {3 / RANK**0.5}


def test_override_yields_to_a_layers_own_alpha(tmp_path: Path) -> None:
    truth = make_truth(BLOCKS, alphas=(6.0,))
    assert scales(fitted(peft_folder(tmp_path, truth, lora_alpha=3), alpha=1.5)) == {0.5}
    assert scales(fitted(write(tmp_path, FORMATS["plain"](truth)), alpha=1.5)) == {2.0}


@pytest.mark.parametrize("name", ["lora_alpha", "network_alpha", "alpha"])
def test_alpha_in_metadata(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, spelled(make_truth(BLOCKS), str, alpha=None), {name: "1.5"})
    assert scales(fitted(file)) == {0.5}


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_diffusers_metadata(tmp_path: Path, prefix: str) -> None:
    config = {f"{prefix}r": RANK, f"{prefix}lora_alpha": 3, f"{prefix}alpha_pattern": {"to_q": 6}}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(config)}
    found = fitted(write(tmp_path, spelled(make_truth(BLOCKS), "transformer.{}".format, alpha=None), metadata))
    assert scales(found) == {1.0, 2.0}


def test_layers_may_have_ranks_of_their_own(tmp_path: Path) -> None:
    truth = make_truth(BLOCKS)
    truth["blocks.0.ffn.net.2"] = Pair(torch.randn(8, 96), torch.randn(48, 8), 2.0)
    assert differences(fitted(write(tmp_path, FORMATS["comfy"](truth))), truth) == 0


# ------------------------------------------------------------------------------------------------------ two experts


def test_a_file_for_both_experts(tmp_path: Path) -> None:
    high, low = make_truth(SELF_ONLY), make_truth(SELF_ONLY, alphas=(1.0, 2.0))
    file = write(tmp_path, spelled(high, "transformer.{}".format) | spelled(low, "transformer_2.{}".format))
    assert differences(fitted(file, component="transformer"), high) == 0
    assert differences(fitted(file, component="transformer_2"), low) == 0
    assert differences(fitted(file, component="transformer_2"), high) > 0.1


def test_a_file_for_one_expert_fits_the_other(tmp_path: Path) -> None:
    truth = make_truth(BLOCKS)
    file = write(tmp_path, FORMATS["diffusers"](truth))
    assert read_adapter(file).has("transformer") and read_adapter(file).has("transformer_2")
    assert differences(fitted(file, component="transformer_2"), truth) == 0


def test_a_file_for_the_second_expert_alone(tmp_path: Path) -> None:
    file = write(tmp_path, spelled(make_truth(BLOCKS), "transformer_2.{}".format))
    assert not read_adapter(file).has("transformer")
    with pytest.raises(BadRequest, match="holds nothing for the model's transformer$"):
        fitted(file)


SELF_ONLY = {name: name for name in BLOCKS if ".attn1." in name}


# --------------------------------------------------------------------------------------------------------- faults

Q, NORM = "diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.0.self_attn.norm_q"
A, B, BIAS = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", torch.ones(48)
FAULTS: list[tuple[str, dict[str, Tensor | None], str]] = [
    ("no such layer", {"diffusion_model.blocks.7.self_attn.q.lora_A.weight": torch.zeros(3, 48)}, "no such layer"),
    ("wrong way of spelling", {"lora_unet_blocks_0_ffn_0.lora_down.weight": torch.zeros(3, 48)}, "no such layer"),
    ("picture input", {"diffusion_model.blocks.0.cross_attn.k_img.diff_b": torch.zeros(48)}, "no such layer"),
    ("text encoder", {"lora_te_layers_0_q.lora_down.weight": torch.zeros(3, 48)}, "no such layer"),
    ("unknown kind", {f"{Q}.hada_w1_a": torch.zeros(3, 48)}, "no LoRA key that is known"),
    ("saved module", {"base_model.model.proj_out.modules_to_save.weight": torch.zeros(3)}, "no LoRA key that is known"),
    ("A without B", {B: None}, "has lora_A without B"),
    ("B without A", {A: None}, "has lora_B without A"),
    ("alpha alone", {A: None, B: None}, "only alpha, no weights"),
    ("two ranks", {B: torch.zeros(48, 4)}, "no common rank"),
    ("rank of zero", {A: torch.zeros(0, 48), B: torch.zeros(48, 0)}, "no common rank"),
    ("A too wide", {A: torch.zeros(3, 64)}, r"the layer has \[48, 48\]"),
    ("B too tall", {B: torch.zeros(64, 3)}, r"the layer has \[48, 48\]"),
    ("pair of a norm", {f"{NORM}.lora_A": torch.zeros(3, 48), f"{NORM}.lora_B": torch.zeros(48, 3)}, r"has \[48\]"),
    ("alpha of many", {f"{Q}.alpha": torch.ones(3)}, r"alpha \[3\]; one number"),
    ("diff of another shape", {f"{Q}.diff": torch.ones(48)}, r"diff \[48\]; the layer has \[48, 48\]"),
    ("bias of another shape", {f"{Q}.diff_b": torch.ones(47)}, r"diff_b \[47\]; the layer has \[48\]"),
    ("no bias", {f"{NORM}.diff_b": torch.ones(48)}, "no bias"),
    ("magnitude of another shape", {f"{Q}.dora_scale": torch.ones(47)}, r"magnitude \[47\]"),
    ("two magnitudes", {f"{Q}.dora_scale": torch.ones(48), f"{Q}.lora_magnitude_vector": torch.ones(48)}, "two DoRA"),
    ("B's bias alone", {A: None, B: None, f"{Q}.diff": torch.ones(48, 48), f"{Q}.lora_B.bias": BIAS}, "bias of lora_B"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_faults(tmp_path: Path, changes: dict[str, Tensor | None], says: str) -> None:
    """A key that does not fit is named; without `strict` the other layers are had."""
    tensors = FORMATS["comfy"](make_truth(ORIGINAL)) | changes
    file = write(tmp_path, {key: tensor for key, tensor in tensors.items() if tensor is not None})
    with pytest.raises(BadRequest, match=says) as caught:
        fitted(file)
    assert "adapter.safetensors" in str(caught.value) and str(tmp_path) not in str(caught.value)
    partial = fitted(file, strict=False)
    assert 1 <= len(partial.skipped) <= 5
    assert len(partial.layers) >= len(ORIGINAL) - 1


def test_faults_are_counted_and_only_some_listed(tmp_path: Path) -> None:
    tensors = FORMATS["comfy"](make_truth(BLOCKS))
    wrong = {key.replace("blocks.1", "blocks.9"): tensor for key, tensor in tensors.items()}
    with pytest.raises(BadRequest, match=r"30 of 60 keys: .*blocks\.9\.cross_attn\.k.*, \.\.\.$") as caught:
        fitted(write(tmp_path, wrong))
    assert str(caught.value).count("no such layer") == 5


@pytest.mark.parametrize("strict", [True, False])
def test_an_adapter_of_another_model(tmp_path: Path, strict: bool) -> None:
    layer = "transformer.single_blocks.0"
    tensors = {f"{layer}.lora_A.weight": torch.zeros(3, 5), f"{layer}.lora_B.weight": torch.zeros(5, 3)}
    with pytest.raises(BadRequest, match="2 of 2 keys"):
        fitted(write(tmp_path, tensors), strict=strict)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"lora": torch.zeros(1)}, "holds no LoRA key; it has lora"),
        ({"a.lora_A.one.weight": torch.zeros(1), "a.lora_B.two.weight": torch.zeros(1)}, "several adapters: one, two"),
        ({"a.lora_A.weight": torch.zeros(1), "transformer.a.lora_down.weight": torch.zeros(1)}, "are the down of one"),
        ({"a.lora_A.weight": torch.tensor([1.0, float("nan")])}, "no finite"),
        ({"a.lora_A.weight": torch.tensor([1.0, float("inf")]).half()}, "no finite"),
        ({"a.lora_A.weight": torch.zeros(3, dtype=torch.int8)}, "no finite"),
        ({"a.alpha": torch.tensor(float("nan"))}, "no finite"),
    ],
)
def test_bad_tensors(tmp_path: Path, tensors: dict[str, Tensor], says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        read_adapter(write(tmp_path, tensors))


@pytest.mark.parametrize("damage", ["truncated", "empty", "noise"])
def test_corrupt_files(tmp_path: Path, damage: str) -> None:
    file = write(tmp_path, FORMATS["plain"](make_truth(BLOCKS)))
    data = file.read_bytes()
    file.write_bytes({"truncated": data[:-20], "empty": b"", "noise": b"\xff" * 400}[damage])
    with pytest.raises(BadRequest, match=r"'adapter\.safetensors' is corrupt or truncated"):
        read_adapter(file)


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        ({"peft_type": "LOHA"}, NotBuilt, "is a LOHA adapter"),
        ({"init_lora_weights": "pissa_niter_4"}, NotBuilt, "changes the model's own weights"),
        ({"lora_alpha": "many"}, BadRequest, "lora_alpha 'many'; a finite number"),
        ({"lora_alpha": True}, BadRequest, "lora_alpha True; a finite number"),
        ({"lora_alpha": 3, "alpha_pattern": {"to_(q": 2}}, BadRequest, r"alpha_pattern 'to_\(q'"),
    ],
)
def test_bad_configs(tmp_path: Path, config: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        read_adapter(peft_folder(tmp_path, make_truth(BLOCKS), **config))


def test_config_that_is_no_json(tmp_path: Path) -> None:
    peft_folder(tmp_path, make_truth(BLOCKS))
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(BadRequest, match="cannot be read as JSON"):
        read_adapter(tmp_path)


TWO_ALPHAS = json.dumps({"transformer.lora_alpha": 1, "transformer_2.lora_alpha": 2})


@pytest.mark.parametrize(
    ("metadata", "error", "says"),
    [
        ({"alpha": "1", "network_alpha": "2"}, BadRequest, "says two alphas: network_alpha 1?2"),
        ({"lora_adapter_metadata": "{"}, BadRequest, "metadata that is no JSON"),
        ({"lora_adapter_metadata": "[]"}, BadRequest, "no JSON object"),
        ({"lora_adapter_metadata": TWO_ALPHAS}, NotBuilt, "other alphas for each transformer"),
    ],
)  # fmt: skip
def test_bad_metadata(tmp_path: Path, metadata: dict[str, str], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        read_adapter(write(tmp_path, FORMATS["plain"](make_truth(BLOCKS)), metadata))


# --------------------------------------------------------------------------------------------------------- places


def test_folders(tmp_path: Path) -> None:
    file = write(tmp_path, FORMATS["plain"](make_truth(BLOCKS)))
    assert read_adapter(tmp_path).file == file
    file.rename(tmp_path / "b.safetensors")
    write(tmp_path, FORMATS["plain"](make_truth(BLOCKS)))
    with pytest.raises(BadRequest, match=r"holds adapter\.safetensors, b\.safetensors; name one"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.pth", "a.ckpt"])
@pytest.mark.parametrize("whole", [True, False], ids=["folder", "file"])
def test_pickles_are_refused_unread(tmp_path: Path, name: str, whole: bool) -> None:
    file = tmp_path / name
    file.write_bytes(b"")
    with pytest.raises(BadRequest, match=f"'{name}' is a pickle, which may run code"):
        read_adapter(tmp_path if whole else file)


def test_other_places(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="no such file or folder"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(BadRequest, match=r"holds no \.safetensors file"):
        read_adapter(tmp_path)
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(BadRequest, match=r"'a\.txt' is no \.safetensors file"):
        read_adapter(tmp_path / "a.txt")
