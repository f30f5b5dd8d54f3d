"""Offload: the same picture, bit for bit, and less memory; precision and attention of each component."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import sgld
from sgld.errors import BadRequest, ModelError
from sgld.messages import Load
from sgld.models import load_family
from sgld.models.wan import Wan
from sgld.nn.lora import Mode, WeightedAdapter
from sgld.nn.lora_formats import read_adapter
from sgld.nn.parallel import Mesh
from sgld.platform import Cpu, Prefetcher
from sgld.resolve import resolve
from sgld.settings import Settings
from tests.adapters import write_adapter
from tests.models.conftest import REQUEST, generate, levels_apart, load
from tests.nn.ranks import in_fresh_process, on_ranks
from tools import tiny

T = TypeVar("T")
WHOLE: dict[str, Any] = {"text_encoder_cpu_offload": True, "dit_cpu_offload": True, "vae_cpu_offload": True}
MIB = 2**20
DEMO = Path(sgld.__file__).parent / "demo"
SMALL: dict[str, Any] = {"height": 96, "width": 96, "num_frames": 1, "num_inference_steps": 2}
MODES: tuple[Mode, ...] = ("auto", "merge", "dynamic")


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pictures") / "slope.png"
    Image.fromarray(np.linspace(0, 255, 32 * 48 * 3).reshape(32, 48, 3).astype(np.uint8)).save(file)
    return file


@pytest.mark.proves("WanPipeline", "offload")
@pytest.mark.parametrize(
    "settings",
    [WHOLE, {"dit_layerwise_offload": True}, WHOLE | {"dit_layerwise_offload": True}, {"dit_cpu_offload": True}],
    ids=lambda settings: "+".join(settings),
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_picture(twins: Path, picture: Path, settings: dict[str, Any], precision: str) -> None:
    """Both experts, a picture to start from, and twice in a row; the twins' files hold fp32."""
    plain = load(twins / "wan22-a14b", precision=precision)
    expected = generate(plain)
    assert levels_apart(expected, generate(plain, seed=8)) > 20
    family = load(twins / "wan22-a14b", precision=precision, **settings)
    for _ in range(2):
        assert torch.equal(generate(family), expected)
        assert torch.equal(
            generate(family, image_path=[str(picture)], strength=0.6),
            generate(plain, image_path=[str(picture)], strength=0.6),
        )


def _pictures(mesh: Mesh, folder: Path) -> Any:
    split = {"num_gpus": 2, "ulysses_degree": 2, "tp_size": 2}
    plain = generate(load(folder, mesh, **split), mesh)
    offloaded = generate(load(folder, mesh, **split, **WHOLE, dit_layerwise_offload=True), mesh)
    return plain.numpy(), offloaded.numpy()


def test_the_same_picture_on_two_ranks(twins: Path, tmp_path: Path) -> None:
    (plain, offloaded), _ = on_ranks(2, tmp_path / "store", _pictures, twins / "wan22-a14b")
    assert plain.size
    assert (plain == offloaded).all()


def test_the_next_block_is_read_while_one_computes(twins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the first one of the next step, while the last one computes."""
    seen: list[str] = []

    class Recorder(Cpu):
        def prefetcher(self) -> Prefetcher:
            threads = super().prefetcher()

            class Recording:
                def start(self, read: Callable[[], T]) -> Callable[[], T]:
                    assert isinstance(read, partial)
                    seen.append(f"read {read.args[0][0].split('.')[1]}")
                    return threads.start(read)

            return Recording()

    family = load_family(
        Load(Settings.of(dit_layerwise_offload=True), twins / "wan21"),
        Mesh.solo(),
        Recorder(),
        lambda step, total: None,
    )
    assert isinstance(family, Wan)
    blocks = family.transformers["transformer"].blocks
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda module, args, i=i: seen.append(f"compute {i}"))
    generate(family, num_inference_steps=2)
    denoising = seen[seen.index("compute 0") - 1 :]  # before it the blocks read the prompts
    assert denoising == ["read 1", "compute 0", "read 0", "compute 1"] * 2, "two steps, both guidance branches at once"


def weights_held(family: Wan) -> int:
    """Bytes of all weights that are there, placeholders left out."""
    assert family.vae.encoder is not None
    modules = (
        family.text.encoder,
        family.transformers["transformer"],
        family.transformers["transformer_2"],
        family.vae.decoder.module,
        family.vae.encoder.module,
    )
    parameters = [p for module in modules for p in module.parameters()]
    return sum(p.nbytes for p in parameters if p.untyped_storage().nbytes() >= p.nbytes)


def test_nothing_is_held_at_rest_not_even_after_a_failure(twins: Path, picture: Path) -> None:
    family, plain = load(twins / "wan22-a14b", **WHOLE), load(twins / "wan22-a14b")
    assert isinstance(family, Wan)
    assert isinstance(plain, Wan)
    generate(family, image_path=[str(picture)])
    generate(plain, image_path=[str(picture)])
    assert (weights_held(family), weights_held(plain) > 2**17) == (0, True)
    family.parts.train_steps = None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        generate(family)
    assert weights_held(family) == 0


def test_weights_that_come_count_among_what_an_output_takes(twins: Path) -> None:
    plain = load(twins / "wan22-a14b").info.memory
    whole = load(twins / "wan22-a14b", **WHOLE)
    blocks = load(twins / "wan22-a14b", dit_layerwise_offload=True).info.memory
    assert isinstance(whole, Wan)
    assert plain is not None and blocks is not None and whole.info.memory is not None
    sizes = [
        sum(p.nbytes for p in module.parameters())
        for module in (whole.text.encoder, whole.transformers["transformer"], whole.vae.decoder.module)
    ]
    weights = [
        (memory.text_weights, memory.denoiser_weights, memory.decoder_weights)
        for memory in (plain, whole.info.memory, blocks)
    ]
    assert weights[:2] == [(0, 0, 0), tuple(sizes)]
    assert weights[2] == (0, sizes[1], 0)  # a twin has two blocks, and no more are there at a time


def test_a_model_that_is_gone_is_an_error_and_no_crash(tmp_path: Path) -> None:
    folder = tiny.make_wan21(tmp_path / "model")
    family = load(folder, dit_cpu_offload=True)
    generate(family)
    (folder / "transformer").rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model\.safetensors: no such file"):
        generate(family)
    (tmp_path / "elsewhere").rename(folder / "transformer")
    generate(family)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A twin whose text encoder and transformer have about 130 MiB of weights each."""
    size = {"num_attention_heads": 8, "attention_head_dim": 64, "ffn_dim": 2048, "text_dim": 512, "num_layers": 8}
    text = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 8, "num_heads": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "TEXT", tiny.TEXT | text)
        return tiny.make_wan21(tmp_path_factory.mktemp("large") / "wan21", **size)


def _peak(mesh: Mesh, folder: Path, warm: Path, settings: dict[str, Any]) -> tuple[int, int]:
    """Most MiB from the loading on, above what the process held before; and what was foreseen."""
    generate(load(warm, mesh), mesh, num_frames=1)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = Cpu().peak_memory()
    family = load(folder, mesh, **settings)
    generate(family, mesh, num_frames=1, num_inference_steps=2)
    params = resolve(REQUEST | {"num_frames": 1}, family.info).params
    return (Cpu().peak_memory() - before) // MIB, max(family.info.memory_needs(params).values()) // MIB


def test_peak_memory_falls(large: Path, twins: Path, tmp_path: Path) -> None:
    """Without flags text encoder and transformer are both there; with them one, or of the transformer two blocks.

    The same holds where the weights are not the mapped files, but copies in another precision.
    """

    def peak(**settings: Any) -> int:
        store = tmp_path / str(len(list(tmp_path.iterdir())))
        measured, foreseen = in_fresh_process(store, _peak, large, twins / "wan21", settings)
        print(f"\n{settings}: {measured} MiB; foreseen beside what stays: {foreseen}")
        return int(measured)

    both, one = peak(), peak(text_encoder_cpu_offload=True, dit_cpu_offload=True)
    blocks = peak(dit_layerwise_offload=True)
    assert 240 < both < 400
    assert one < both - 100
    assert blocks < both - 80
    copies = peak(precision="bf16"), peak(precision="bf16", text_encoder_cpu_offload=True, dit_cpu_offload=True)
    assert copies[1] < copies[0] - 30


@pytest.mark.parametrize(
    ("setting", "component"),
    [("dit_precision", "transformer"), ("vae_precision", "vae"), ("text_encoder_precisions", "text_encoder")],
)
@pytest.mark.parametrize("offload", [{}, WHOLE], ids=["resident", "offloaded"])
def test_each_precision_is_its_component_s(twins: Path, setting: str, component: str, offload: dict[str, Any]) -> None:
    def dtypes(**settings: Any) -> dict[str, torch.dtype]:
        family = load(twins / "wan21", **settings, **offload)
        assert isinstance(family, Wan)
        parts = {
            "transformer": family.transformers["transformer"],
            "vae": family.vae.decoder.module,
            "text_encoder": family.text.encoder,
        }
        found = {name: {p.dtype for p in module.parameters()} for name, module in parts.items()}
        generate(family, num_frames=1, num_inference_steps=1)
        kept = {torch.float32}  # in every precision by the transformer, and in fp16 by the text encoder
        return {name: (kinds - kept or kinds).pop() for name, kinds in found.items()}

    value = ["fp16"] if setting == "text_encoder_precisions" else "fp16"
    everything = {"transformer": torch.float32, "vae": torch.float32, "text_encoder": torch.float32}
    assert dtypes(**{setting: value}) == everything | {component: torch.float16}
    lowered = {"transformer": torch.bfloat16, "vae": torch.float32, "text_encoder": torch.bfloat16}
    assert dtypes(precision="bf16", **{setting: value}) == lowered | {component: torch.float16}


@pytest.mark.parametrize("given", [[], ["fp32", "fp32"]])
def test_precisions_of_another_number_of_text_encoders(twins: Path, given: list[str]) -> None:
    with pytest.raises(BadRequest, match=f"text_encoder_precisions: {len(given)} given; this model has 1 text encoder"):
        load(twins / "wan21", text_encoder_precisions=given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_backend": "fa"}, "attention_backend: fa cannot run here: .* these can: torch_sdpa$"),
        ({"component_attention_backends": {"transformer_2": "torch_sdpa"}},
         "component_attention_backends: 'transformer_2' is none of text_encoder, transformer, vae, "),
        ({"component_attention_backends": {"vae": "fa"}},
         r"component_attention_backends.vae: fa cannot be used: .*; use torch_sdpa"),
        ({"attention_backend_config": {"a": 1}}, "attention_backend_config: 'a' is no setting of torch_sdpa"),
        ({"image_encoder_cpu_offload": True}, "image_encoder_cpu_offload: this model has no image_encoder"),
    ],
)  # fmt: skip
def test_what_the_model_cannot_use_is_refused_at_load(twins: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        load(twins / "wan21", **settings)


def test_the_seeds_own_choice_of_attention_loads(twins: Path) -> None:
    """`fa` for all does not bind the text encoder, whose attention torch alone computes."""
    named = {"text_encoder": "torch_sdpa", "transformer.cross": "torch_sdpa", "transformer": "torch_sdpa"}
    family = load(twins / "wan21", attention_backend="fa", component_attention_backends=named)
    assert torch.equal(generate(family), generate(load(twins / "wan21")))


@pytest.mark.parametrize("layerwise", [False, True])
def test_adapters_hold_on_weights_that_come_and_go(tmp_path: Path, layerwise: bool) -> None:
    """Merged ones give the picture of a resident model, bit for bit; and the plain one again when they are gone."""
    adapter = read_adapter(write_adapter(tmp_path / "a.safetensors", 1))
    resident = load(DEMO)
    offloaded = load(DEMO, dit_layerwise_offload=layerwise, dit_cpu_offload=not layerwise)
    pictures: list[list[Tensor]] = []
    for family in (resident, offloaded):
        layers = family.lora["transformer"]
        made = [generate(family, **SMALL)]
        for mode in MODES:
            layers.apply([WeightedAdapter(layers.fit(adapter))], mode)
            assert layers.mode == ("dynamic" if mode == "dynamic" else "merge")
            made.append(generate(family, **SMALL))
        layers.clear()
        pictures.append([*made, generate(family, **SMALL)])
    assert all(torch.equal(a, b) for a, b in zip(*pictures, strict=True))
    plain, auto, merged, dynamic, again = pictures[1]
    assert levels_apart(plain, auto) > 20
    assert levels_apart(merged, dynamic) <= 2
    assert torch.equal(plain, again)
