"""Adapters at work on a model: as diffusers and PEFT fuse them, and gone without a trace."""

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sgld.errors import BadRequest, NotBuilt
from sgld.models import names
from sgld.models.wan_transformer import WanConfig, WanTransformer
from sgld.nn import lora
from sgld.nn.attention import TORCH
from sgld.nn.blocks import set_compute_dtype
from sgld.nn.lora import AdapterCache, Change, LoraLayers, Mode, WeightedAdapter
from sgld.nn.lora_formats import Adapter, read_adapter
from sgld.nn.parallel import Mesh
from tools.tiny import TRANSFORMER

X, TEXT, TIME = torch.randn(1, 4, 3, 4, 6), torch.randn(1, 7, 32), torch.tensor(700)
LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "proj_out", "time_proj", "linear_1", "linear_2"]
Q_BYTES = 4 * 48 * 48 * 2  # of all to_q: two blocks, two attentions, two bytes a number
Twin = Any  # of diffusers
Make = Callable[..., Adapter]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models are faster without threads, the more so beside other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def weights() -> dict[str, Tensor]:
    """Of a tiny model of diffusers."""
    return make_twin().state_dict()


def make_twin(weights: dict[str, Tensor] | None = None) -> Twin:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(3)
    twin = WanTransformer3DModel(**TRANSFORMER)
    if weights is not None:
        twin.load_state_dict(weights)
    return twin.eval().requires_grad_(False)


def make_ours(weights: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> WanTransformer:
    model = WanTransformer(WanConfig(**TRANSFORMER), Mesh.solo(), TORCH)
    model.load_state_dict(weights)
    set_compute_dtype(model, lambda name: dtype)
    return model.to(dtype).eval().requires_grad_(False)


@pytest.fixture
def model(weights: dict[str, Tensor]) -> WanTransformer:
    """Ours, in float32."""
    return make_ours(weights)


@pytest.fixture
def layers(model: WanTransformer) -> LoraLayers:
    """The adapters of `model`."""
    return LoraLayers(model, names.WAN)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, Tensor]) -> Make:
    """Makes adapters with PEFT, of random values, saved by diffusers; the same again is read from the same file."""
    folders: dict[str, Path] = {}

    def make(name: str = "one", targets: list[str] = LINEAR, **config: Any) -> Adapter:
        wanted = repr((name, targets, config))
        if wanted not in folders:
            folders[wanted] = tmp_path_factory.mktemp(name)
            train(weights, folders[wanted], name, targets, config)
        return read_adapter(folders[wanted])

    return make


def train(weights: dict[str, Tensor], folder: Path, name: str, targets: list[str], config: dict[str, Any]) -> None:
    from peft import LoraConfig

    twin = make_twin(weights)
    twin.add_adapter(LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": targets} | config), name)
    randomize(twin, seed=sum(map(ord, name)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*invalid shape.*lora_B.bias")  # PEFT misreads its own biases
        twin.save_lora_adapter(folder, name)


def randomize(twin: nn.Module, seed: int) -> None:
    """Give every LoRA parameter a value as training might."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in twin.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(0.7 + 0.6 * torch.rand(parameter.shape, generator=draw))
        elif "lora" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=draw)


def fused(weights: dict[str, Tensor], uses: Sequence[tuple[Adapter, float]]) -> dict[str, Tensor]:
    """The weights of diffusers' model with these adapters fused."""
    twin = make_twin(weights)
    names = [f"a{i}" for i in range(len(uses))]
    for name, (adapter, _) in zip(names, uses, strict=True):
        give(twin, adapter, name)
    twin.set_adapters(names, [strength for _, strength in uses])
    twin.fuse_lora(adapter_names=names)
    return {key.replace(".base_layer.", "."): tensor for key, tensor in twin.state_dict().items() if "lora" not in key}


def give(twin: Twin, adapter: Adapter, name: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is meant
        twin.load_lora_adapter(adapter.file.parent, prefix=None, adapter_name=name, weight_name=adapter.file.name)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def places(model: nn.Module) -> dict[str, int]:
    """Where each parameter's numbers lie."""
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two models' weights."""
    assert set(one) == set(other)
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """torch.equal would take -0.0 for 0.0."""
    return all(torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one)


def velocity(model: WanTransformer) -> Tensor:
    with torch.inference_mode():
        return model(X, TIME, model.text_keys(TEXT)).float()


# ---------------------------------------------------------------------------------------------------- as diffusers

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha of a half": {"lora_alpha": 0.5},
    "patterns": {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 7, "ffn.net.2": 1}},
    "rank-stabilized": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "convolution": {"targets": ["patch_embedding", "to_q"]},
    "convolution, dora": {"targets": ["patch_embedding", "to_q"], "use_dora": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_diffusers(
    weights: dict[str, Tensor], layers: LoraLayers, model: WanTransformer, trained: Make, kind: str
) -> None:
    adapter = trained(**KINDS[kind])
    layers.apply([WeightedAdapter(layers.fit(adapter))], "merge")
    expected = fused(weights, [(adapter, 1.0)])
    assert furthest(snapshot(model), expected) < 1e-6
    assert furthest(weights, expected) > 0.05


def test_several_adapters_are_diffusers_with_strengths(
    weights: dict[str, Tensor], layers: LoraLayers, model: WanTransformer, trained: Make
) -> None:
    one, two = trained("one"), trained("two", ["to_q", "net.2"], lora_alpha=2, use_rslora=True)
    layers.apply([WeightedAdapter(layers.fit(one), 0.7), WeightedAdapter(layers.fit(two), -1.3)], "merge")
    expected = fused(weights, [(one, 0.7), (two, -1.3)])
    assert furthest(snapshot(model), expected) < 1e-6
    assert furthest(fused(weights, [(one, 0.7)]), expected) > 0.05


@pytest.mark.proves("WanPipeline", "LoRA")
@pytest.mark.parametrize("mode", ["merge", "dynamic"])
def test_same_velocity_as_an_unfused_diffusers_model(
    weights: dict[str, Tensor], layers: LoraLayers, model: WanTransformer, trained: Make, mode: Mode
) -> None:
    twin = make_twin(weights)
    adapter = trained()
    layers.apply([WeightedAdapter(layers.fit(adapter))], mode)
    give(twin, adapter, "one")
    with torch.inference_mode():
        expected = twin(X, TIME[None], TEXT, return_dict=False)[0]
    assert (velocity(model) - expected).abs().max() < 1e-4
    layers.clear()
    assert (velocity(model) - expected).abs().max() > 0.1


def test_folders_of_peft_itself(
    weights: dict[str, Tensor], layers: LoraLayers, model: WanTransformer, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_v"], alpha_pattern={"attn2.to_q": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a model without a name on the hub
        peft = get_peft_model(make_twin(weights), config)
        randomize(peft, 1)
        peft.save_pretrained(tmp_path)
    layers.apply([WeightedAdapter(layers.fit(read_adapter(tmp_path)))])
    assert furthest(snapshot(model), dict(peft.merge_and_unload().state_dict())) < 1e-6


def test_magnitudes_across_inputs(layers: LoraLayers, model: WanTransformer, tmp_path: Path) -> None:
    """kohya's other DoRA: a magnitude for each input."""
    base, m = model.proj_out.weight.clone(), torch.rand(1, 48) + 0.5
    down, up = torch.randn(3, 48), torch.randn(16, 3)
    tensors = {"proj_out.lora_A.weight": down, "proj_out.lora_B.weight": up, "proj_out.dora_scale": m}
    save_file(tensors, tmp_path / "a.safetensors")
    layers.apply([WeightedAdapter(layers.fit(read_adapter(tmp_path)))])
    changed = base + up @ down
    assert (model.proj_out.weight - m * changed / changed.norm(dim=0, keepdim=True)).abs().max() < 1e-6


# -------------------------------------------------------------------------------------------------- without a trace


@pytest.mark.parametrize("keep", [0, 100_000, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hundred_swaps_leave_no_trace(
    weights: dict[str, Tensor], trained: Make, dtype: torch.dtype, keep: int
) -> None:
    model = make_ours(weights, dtype)
    with torch.no_grad():
        model.proj_out.weight[0, :2] = torch.tensor([-0.0, float("nan")])  # bits that arithmetic would lose
    layers, before = LoraLayers(model, keep_bytes=keep), snapshot(model)
    kinds = [trained("one"), trained("two", ["to_q"], use_dora=True), trained("three", ["patch_embedding", "net.2"])]
    fitted = [layers.fit(adapter) for adapter in kinds]
    draw, modes = random.Random(0), ("merge", "dynamic")
    for _ in range(100):
        uses = [WeightedAdapter(one, draw.choice([-2, 0.3, 1])) for one in draw.sample(fitted, draw.randint(0, 3))]
        layers.apply(uses, draw.choice(modes))  # type: ignore[arg-type]
    layers.apply([WeightedAdapter(fitted[0])], "merge")
    assert not same_bits(snapshot(model), before)
    layers.clear()
    assert same_bits(snapshot(model), before)
    assert layers.active == ()
    layers.clear()
    assert same_bits(snapshot(model), before)


def test_adding_and_subtracting_would_leave_a_trace(weights: dict[str, Tensor], trained: Make) -> None:
    """Why the base is kept."""
    model = make_ours(weights, torch.bfloat16)
    layers = LoraLayers(model)
    layers.apply([WeightedAdapter(layers.fit(trained(targets=["proj_out"])))])
    delta = model.proj_out.weight - weights["proj_out.weight"].bfloat16()
    assert not torch.equal(model.proj_out.weight - delta, weights["proj_out.weight"].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_swap_is_what_a_fresh_model_gives(weights: dict[str, Tensor], trained: Make, dtype: torch.dtype) -> None:
    one, two = trained("one"), trained("two", ["to_q"], use_dora=True)
    used, fresh = make_ours(weights, dtype), make_ours(weights, dtype)
    layers = LoraLayers(used)
    layers.apply([WeightedAdapter(layers.fit(one))])
    layers.apply([WeightedAdapter(layers.fit(two), 0.5)])
    other = LoraLayers(fresh)
    other.apply([WeightedAdapter(other.fit(two), 0.5)])
    assert same_bits(snapshot(used), snapshot(fresh))


def test_coming_back_to_a_setting_copies_nothing(weights: dict[str, Tensor], trained: Make) -> None:
    model = make_ours(weights, torch.bfloat16)
    layers = LoraLayers(model, keep_bytes=2 * Q_BYTES)
    one, two = (WeightedAdapter(layers.fit(trained(name, ["to_q"])), 0.5) for name in ("one", "two"))
    base = places(model)
    layers.apply([one])
    first, there = snapshot(model), places(model)
    assert {name for name in base if base[name] != there[name]} == {f"{n}.weight" for n in one.adapter.layers}
    layers.apply([two])
    assert not same_bits(snapshot(model), first)
    layers.apply([one])
    assert same_bits(snapshot(model), first) and places(model) == there
    layers.clear()
    assert places(model) == base


def test_kept_settings_stay_in_their_limit(weights: dict[str, Tensor], trained: Make) -> None:
    layers = LoraLayers(make_ours(weights, torch.bfloat16), keep_bytes=2 * Q_BYTES)
    one, two, three = (WeightedAdapter(layers.fit(trained(name, ["to_q"])), 0.5) for name in ("one", "two", "three"))
    seen = {}
    for use in (one, two, one, three):
        layers.apply([use])
        seen[use] = places(layers.module)
    assert layers.kept_bytes == 2 * Q_BYTES
    assert seen[three] == seen[two], "what was used least recently is written over"
    large = [WeightedAdapter(layers.fit(trained())), one]
    layers.apply(large)
    assert layers.kept_bytes > 2 * Q_BYTES, "the active one is held whatever its size"
    layers.apply([one])
    assert layers.kept_bytes == Q_BYTES
    layers.apply([two])
    layers.release()
    assert layers.kept_bytes == Q_BYTES
    layers.apply(large)
    layers.clear()
    assert layers.kept_bytes == 0


def test_offloaded_weights_are_changed_when_they_come(weights: dict[str, Tensor], trained: Make) -> None:
    """Whoever holds the stored weights gets what merging would make of each, and never has its own overwritten."""
    merged, absent = make_ours(weights, torch.bfloat16), make_ours(weights, torch.bfloat16)
    adapters, plain = [trained(use_dora=True), trained("three", lora_bias=True)], trained("two", ["to_q"])
    told: list[Mapping[str, Change]] = []
    layers, other = LoraLayers(merged), LoraLayers(absent, offload=told.append)
    layers.apply([WeightedAdapter(layers.fit(adapter), 0.5) for adapter in adapters])
    other.apply(
        [WeightedAdapter(other.fit(adapter), 0.5) for adapter in adapters], "dynamic"
    )  # DoRA needs the weights: it waits for them, too
    before = snapshot(absent)
    assert not same_bits(snapshot(merged), before)
    result = {name: told[-1][name](tensor) if name in told[-1] else tensor for name, tensor in before.items()}
    assert same_bits(result, snapshot(merged)) and same_bits(snapshot(absent), before)
    unchanged = velocity(absent)
    other.apply([WeightedAdapter(other.fit(plain))], "dynamic")
    assert told[-1] == {} and not torch.equal(velocity(absent), unchanged)
    other.apply([WeightedAdapter(other.fit(plain))], "merge")
    assert set(told[-1]) == {f"{name}.weight" for name in other.fit(plain).layers}
    other.clear()
    assert told[-1] == {} and torch.equal(velocity(absent), unchanged)


@pytest.mark.parametrize("mode", ["auto", "merge", "dynamic"])
@pytest.mark.parametrize("dora", [False, True])
def test_strength_zero_is_no_adapter(
    layers: LoraLayers, model: WanTransformer, trained: Make, mode: Mode, dora: bool
) -> None:
    before, unchanged = snapshot(model), velocity(model)
    fitted = layers.fit(trained(use_dora=dora))
    layers.apply([WeightedAdapter(fitted)], mode)
    assert not torch.equal(velocity(model), unchanged)
    layers.apply([WeightedAdapter(fitted, 0.0)], mode)
    assert same_bits(snapshot(model), before)
    assert torch.equal(velocity(model), unchanged)
    assert layers.active == ()


def test_a_failure_leaves_the_model_without_adapters(
    layers: LoraLayers, model: WanTransformer, trained: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, fitted = snapshot(model), layers.fit(trained())
    layers.apply([WeightedAdapter(fitted, 0.5)])
    calls = iter(range(9))
    real = lora.merged_weight

    def run_out(base: Tensor, parts: Any, out: Tensor) -> Tensor:
        if next(calls) == 5:
            raise MemoryError
        return real(base, parts, out)

    monkeypatch.setattr(lora, "merged_weight", run_out)
    with pytest.raises(MemoryError):
        layers.apply([WeightedAdapter(fitted)])
    assert same_bits(snapshot(model), before)
    assert layers.active == ()


def test_an_adapter_that_does_not_fit_changes_nothing(
    layers: LoraLayers, model: WanTransformer, trained: Make, tmp_path: Path
) -> None:
    layers.apply([WeightedAdapter(layers.fit(trained()))])
    with_one = snapshot(model)
    save_file({"blocks.9.attn1.to_q.lora_A.weight": torch.ones(2, 48)}, tmp_path / "x.safetensors")
    with pytest.raises(BadRequest, match="no such layer"):
        layers.fit(read_adapter(tmp_path / "x.safetensors"))
    assert same_bits(snapshot(model), with_one)
    assert len(layers.active) == 1


# -------------------------------------------------------------------------------------------------------- together


def test_the_order_does_not_matter_beyond_rounding(weights: dict[str, Tensor], trained: Make) -> None:
    adapters = [trained("one"), trained("two", ["to_q"], use_dora=True), trained("three", ["to_q", "proj_out"])]
    results = []
    for order in (adapters, adapters[::-1]):
        model = make_ours(weights)
        layers = LoraLayers(model)
        layers.apply([WeightedAdapter(layers.fit(adapter), 0.8) for adapter in order])
        results.append(snapshot(model))
    assert furthest(*results) < 1e-6


def test_an_adapter_twice_is_one_of_both_strengths(layers: LoraLayers, model: WanTransformer, trained: Make) -> None:
    fitted = layers.fit(trained())
    layers.apply([WeightedAdapter(fitted, 0.25), WeightedAdapter(fitted, 0.5)])
    twice = snapshot(model)
    layers.apply([WeightedAdapter(fitted, 0.75)])
    assert furthest(snapshot(model), twice) < 1e-6


def test_several_merge_with_one_rounding(weights: dict[str, Tensor], trained: Make) -> None:
    """In bfloat16 the sum is the float32 sum, rounded; not rounded after each adapter."""
    model, exact = make_ours(weights, torch.bfloat16), make_ours(weights, torch.bfloat16).float()
    names = ["one", "two", "three"]
    for merged in (model, exact):
        layers = LoraLayers(merged)
        layers.apply([WeightedAdapter(layers.fit(trained(name)), 0.9) for name in names])
    assert same_bits(snapshot(model), {name: tensor.bfloat16() for name, tensor in snapshot(exact).items()})


@pytest.mark.parametrize("strength", [0.5, 1.0, -2.0])
def test_dora_goes_in_a_straight_line(
    layers: LoraLayers, model: WanTransformer, trained: Make, weights: dict[str, Tensor], strength: float
) -> None:
    """At strength 1 it is PEFT's, at 0 there is nothing, between and beyond it is in proportion."""
    fitted = layers.fit(trained(use_dora=True))
    layers.apply([WeightedAdapter(fitted)])
    whole = model.proj_out.weight - weights["proj_out.weight"]
    layers.apply([WeightedAdapter(fitted, strength)])
    assert (model.proj_out.weight - weights["proj_out.weight"] - strength * whole).abs().max() < 1e-6


# --------------------------------------------------------------------------------------------------------- dynamic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_dynamic_is_merged_within_rounding(
    weights: dict[str, Tensor], trained: Make, kind: str, dtype: torch.dtype
) -> None:
    model = make_ours(weights, dtype)
    layers, before, plain = LoraLayers(model), snapshot(model), velocity(model)
    uses = [
        WeightedAdapter(layers.fit(trained("one", **KINDS[kind])), 0.6),
        WeightedAdapter(layers.fit(trained("two", ["to_q"])), 0.5),
    ]
    layers.apply(uses, "merge")
    merged = velocity(model)
    layers.apply(uses, "dynamic")
    dynamic = velocity(model)
    assert same_bits(snapshot(model), before)
    exact = make_ours({name: tensor.float() for name, tensor in before.items()})
    other = LoraLayers(exact)
    other.apply(
        [
            WeightedAdapter(other.fit(trained("one", **KINDS[kind])), 0.6),
            WeightedAdapter(other.fit(trained("two", ["to_q"])), 0.5),
        ]
    )
    rounding = (merged - velocity(exact)).abs().max()
    assert (dynamic - velocity(exact)).abs().max() < max(3 * rounding, 1e-4)
    assert (plain - velocity(exact)).abs().max() > max(6 * rounding, 0.02)


def test_dynamic_takes_full_deltas_norms_and_modulations(
    layers: LoraLayers, model: WanTransformer, tmp_path: Path
) -> None:
    before = snapshot(model)
    shapes = {
        "head.head.diff": "proj_out.weight",
        "head.head.diff_b": "proj_out.bias",
        "head.diff_m": "scale_shift_table",
        "patch_embedding.diff": "patch_embedding.weight",
        "patch_embedding.diff_b": "patch_embedding.bias",
        "blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
    }
    tensors = {f"diffusion_model.{key}": 0.1 * torch.randn(before[name].shape) for key, name in shapes.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    uses = [WeightedAdapter(layers.fit(read_adapter(tmp_path)), 0.7)]
    layers.apply(uses, "merge")
    merged = velocity(model)
    for key, name in shapes.items():
        change = model.get_parameter(name) - before[name]
        assert (change - 0.7 * tensors[f"diffusion_model.{key}"]).abs().max() < 1e-6
    layers.apply(uses, "dynamic")
    assert (velocity(model) - merged).abs().max() < 1e-5
    assert torch.equal(model.proj_out.weight, before["proj_out.weight"])
    layers.clear()
    assert same_bits(snapshot(model), before)


def test_weights_that_cannot_be_merged(trained: Make, tmp_path: Path) -> None:
    """What quantized layers will be: auto goes beside them, merge is refused, and the weights stay."""

    class Quantized(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.to(x.dtype))

    model = nn.ModuleDict({"a": Quantized(8, 4, bias=False)}).requires_grad_(False)
    model["a"].weight = nn.Parameter(torch.randn(4, 8).to(torch.float8_e4m3fn), requires_grad=False)
    x, down, up = torch.randn(5, 8).bfloat16(), torch.randn(2, 8), torch.randn(4, 2)
    save_file({"a.lora_A.weight": down, "a.lora_B.weight": up}, tmp_path / "a.safetensors")
    layers, before = LoraLayers(model), model["a"](x)
    uses = [WeightedAdapter(layers.fit(read_adapter(tmp_path)))]
    with pytest.raises(NotBuilt, match="float8_e4m3fn cannot be merged; use dynamic"):
        layers.apply(uses, "merge")
    layers.apply(uses, "auto")
    assert layers.mode == "dynamic"
    dora = {"a.lora_A.weight": down, "a.lora_B.weight": up, "a.dora_scale": torch.ones(4)}
    save_file(dora, tmp_path / "a.safetensors")
    with pytest.raises(NotBuilt, match="DoRA on weights of type float8_e4m3fn"):
        layers.apply([WeightedAdapter(layers.fit(read_adapter(tmp_path)))], "auto")
    assert list(layers.active) == uses
    expected = before.float() + x.float() @ down.T @ up.T
    assert (model["a"](x).float() - expected).abs().max() < 0.02 * expected.abs().max()


def test_grouped_convolutions(tmp_path: Path) -> None:
    model = nn.ModuleDict({"c": nn.Conv2d(4, 6, 3, groups=2, padding=1)}).requires_grad_(False)
    tensors = {"c.lora_down.weight": torch.randn(2, 2, 3, 3), "c.lora_up.weight": torch.randn(6, 2, 1, 1)}
    save_file(tensors, tmp_path / "a.safetensors")
    layers, x = LoraLayers(model), torch.randn(1, 4, 5, 7)
    uses = [WeightedAdapter(layers.fit(read_adapter(tmp_path)))]
    layers.apply(uses, "merge")
    merged = model["c"](x)
    layers.apply(uses, "dynamic")
    assert (model["c"](x) - merged).abs().max() < 1e-4


# ------------------------------------------------------------------------------------------------------------ uses


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_strengths_are_finite(layers: LoraLayers, trained: Make, strength: float) -> None:
    with pytest.raises(BadRequest, match="strength: (nan|inf); a finite number"):
        WeightedAdapter(layers.fit(trained(targets=["to_q"])), strength)


def test_the_same_again_writes_nothing(weights: dict[str, Tensor], trained: Make) -> None:
    told: list[Mapping[str, Change]] = []
    layers = LoraLayers(make_ours(weights), offload=told.append)
    fitted = layers.fit(trained(targets=["to_q"]))
    layers.apply([WeightedAdapter(fitted, 0.5)])
    layers.apply([WeightedAdapter(fitted, 0.5), WeightedAdapter(fitted, 0.0)])
    assert len(told) == 1
    layers.apply([WeightedAdapter(fitted, 0.6)])
    assert len(told) == 2


# ----------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three files, each of an adapter of 1,600 bytes."""
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for i, path in enumerate(paths):
        save_file({"x.lora_A.weight": torch.full((4, 50), float(i)), "x.lora_B.weight": torch.ones(50, 4)}, path)
    return paths


def test_unchanged_adapters_are_read_once(files: list[Path]) -> None:
    cache = AdapterCache(10_000)
    first = cache.read(files[0])
    assert cache.read(files[0]) is first
    assert cache.nbytes == first.nbytes == 1600


def test_changed_files_are_read_again(files: list[Path]) -> None:
    cache = AdapterCache(10_000)
    first = cache.read(files[0])
    save_file({"y.lora_A.weight": torch.ones(2, 2), "y.lora_B.weight": torch.ones(2, 2)}, files[0])
    again = cache.read(files[0])
    assert again is not first and set(again.part("transformer")) == {"y"}
    assert cache.nbytes == again.nbytes == 32


def test_a_changed_config_is_read_again(tmp_path: Path) -> None:
    save_file({"x.lora_A.weight": torch.ones(2, 3), "x.lora_B.weight": torch.ones(3, 2)}, tmp_path / "a.safetensors")
    cache = AdapterCache(10_000)
    assert cache.read(tmp_path).rules.alpha is None
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 0.5}')
    assert cache.read(tmp_path).rules.alpha == 0.5


def test_the_least_recently_used_goes_first(files: list[Path]) -> None:
    cache = AdapterCache(3_200)
    a, b = cache.read(files[0]), cache.read(files[1])
    assert cache.read(files[0]) is a
    cache.read(files[2])
    assert cache.nbytes == 3_200
    assert cache.read(files[0]) is a
    assert cache.read(files[1]) is not b  # dropped, and read again


def test_an_adapter_over_the_limit_is_not_kept_and_drops_no_other(files: list[Path], tmp_path: Path) -> None:
    cache = AdapterCache(3_200)
    a = cache.read(files[0])
    save_file({"x.lora_A.weight": torch.ones(1000, 1)}, tmp_path / "large.safetensors")
    assert cache.read(tmp_path / "large.safetensors").nbytes == 4000
    assert cache.nbytes == 1600
    assert cache.read(files[0]) is a


def test_the_tensors_outlive_their_file(files: list[Path]) -> None:
    adapter = AdapterCache(10_000).read(files[1])
    files[1].write_bytes(bytes(files[1].stat().st_size))
    down = adapter.part("transformer")["x"]["down"].tensor
    assert torch.equal(down, torch.ones(4, 50))
