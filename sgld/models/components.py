"""The components of a model folder, loaded as the settings ask."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import attrs
import torch
from torch import nn

from sgld.convert import structure
from sgld.errors import BadRequest, ModelError
from sgld.messages import Load
from sgld.models.vae import Tiling
from sgld.nn.attention import CROSS, SELF, Chooser
from sgld.nn.blocks import DiffusionTransformer
from sgld.nn.lora import LoraLayers
from sgld.nn.lora_formats import Renames
from sgld.nn.offload import Offloader
from sgld.nn.parallel import Degrees, Mesh
from sgld.nn.weights import Architecture, load_module, read_architecture, read_json
from sgld.params import Memory, SamplingParams
from sgld.platform import Platform
from sgld.settings import TRANSFORMERS, Settings

M = TypeVar("M", bound=nn.Module)
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NO_TRUE_CFG = {"true_cfg_scale": "its guidance_scale is classifier-free guidance already"}
NO_NORMALIZATION = {"cfg_normalization": "it is of another family's guidance"}
EULER = "FlowMatchEulerDiscreteScheduler"
LORA_SHARE = 4  # one part in so many of the free memory may keep merged weights, until an output needs it


@attrs.frozen
class Component:
    """A family's transformer: how it is built from its config.json, and what its weights hold."""

    build: Callable[..., DiffusionTransformer]  # of the config, the mesh, and a kernel for each kind of attention
    config: type[Architecture]
    blocks: tuple[str, ...] = ("blocks",)  # its lists of blocks, in the order in which they run
    crosses: bool = True  # whether it has attention from latents to text; else text and latents are one sequence
    unused: tuple[str, ...] = ()  # prefixes, with wildcards, of tensors that nothing reads
    precise: tuple[str, ...] = ()  # parts of the names of tensors that are float32 in every precision


class ComponentLoader:
    """One model folder: what its index names, and the loader of each component.

    Call `share` before a transformer is made.

    Raises:
        ModelError: `needs` names a component that the index lacks.
        BadRequest: a setting that this model has no component for.
    """

    def __init__(
        self,
        load: Load,
        mesh: Mesh,
        platform: Platform,
        progress: Callable[[int, int], None],
        needs: Iterable[str] = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer"),
        few_steps: bool = False,
    ):
        self.folder, self.settings, self.platform = load.folder, load.settings, platform
        self.index = read_json(load.folder / "model_index.json")
        for name in needs:
            self.need(name)
        self.names = tuple(name for name, value in self.index.items() if isinstance(value, list) and value[0])
        self._replaced = load.component_folders
        self.scheduler = read_json(self.path("scheduler") / "scheduler_config.json")
        self.train_steps: int = self.scheduler.get("num_train_timesteps", 1000)
        self.mesh, self.degrees = mesh, Degrees()
        self.encoders = tuple(name for name in self.names if name.startswith("text_encoder"))
        check_precisions(self.settings, len(self.encoders))
        if self.settings.model.dmd_denoising_steps and not few_steps:
            raise BadRequest("it is of Wan checkpoints; leave it out", field="dmd_denoising_steps")
        self.offloader = Offloader.of(self.settings, platform, self.names)
        self.kernels: dict[str, str] = {}  # by transformer and role
        self._chooser = Chooser(self.settings, platform)
        others = (name for name in (*TRANSFORMERS, "connectors") if name in self.names)
        self._chooser.check((*self.encoders, *others, "vae"))
        weighed = [name for name in self.names if (self.path(name) / "config.json").is_file()]
        self._progress, self._loaded, self._total = progress, 0, len(weighed)

    def need(self, name: str) -> None:
        """Raise `ModelError` for a component that the index lacks."""
        if not (self.index.get(name) or [None])[0]:
            raise ModelError(f"{self.folder / 'model_index.json'}: lacks {name}")

    def needs_euler(self) -> None:
        """Raise `ModelError` for a scheduler that takes no noise levels of a family's own."""
        if (name := self.scheduler.get("_class_name")) != EULER:
            file = self.path("scheduler") / "scheduler_config.json"
            raise ModelError(f"{file}: _class_name is {name!r}; only {EULER!r} is supported")

    def path(self, name: str) -> Path:
        """Return the folder of a component: its own, or the replacement."""
        folder = self._replaced.get(name, self.folder / name)
        if not folder.is_dir():
            raise ModelError(f"{folder}: no such folder; the model lacks its {name}")
        return folder

    def config(self, name: str) -> dict[str, Any]:
        """Read a component's config.json."""
        return read_json(self.path(name) / "config.json")

    def loaded(self, part: M) -> M:
        """Count `part` as loaded, for whoever watches."""
        self._loaded += 1
        self._progress(self._loaded, self._total)
        return part

    def share(self, heads: int, guided: bool) -> Mesh:
        """Divide the work among the ranks, for a transformer with so many heads, and guidance by default or not.

        Raises:
            BadRequest: heads that do not divide.
        """
        self.degrees = Degrees.of(self.settings, heads, guided)
        self.mesh = self.mesh.split(self.degrees)
        return self.mesh

    def dtype(self, component: str) -> torch.dtype:
        """Return the precision of a component: its kind's, else that of all, else the platform's. A VAE's is fp32."""
        s = self.settings
        if component in self.encoders:
            own = (
                s.dtypes.text_encoder_precisions[self.encoders.index(component)]
                if s.dtypes.text_encoder_precisions
                else None
            )
        elif component in (*TRANSFORMERS, "connectors"):
            own = s.dtypes.dit_precision
        else:
            own = None if component == "image_encoder" else s.dtypes.vae_precision or "fp32"
        name = own or s.dtypes.precision
        return PRECISIONS[name] if name else self.platform.dtype

    def architecture(self, name: str, spec: Component) -> Any:
        """Read a transformer's config.json as its family's `Architecture`."""
        return read_architecture(self.path(name) / "config.json", spec.config)

    def transformer(self, name: str, spec: Component) -> DiffusionTransformer:
        """Build and fill a transformer, with a kernel for its attention to itself and, if it crosses, to the text."""
        c, dtype, ring = self.architecture(name, spec), self.dtype(name), self.mesh.ring.size > 1
        head, choose = c.attention_head_dim, self._chooser.choose
        kernels = {SELF: choose(name, SELF, dtype, head, ring)}
        if spec.crosses:
            kernels[CROSS] = choose(name, CROSS, dtype, head)
        else:
            self._chooser.refuse(f"{name}.{CROSS}", "it attends to picture and text as one sequence")
        self.kernels |= {f"{name}.{role}": kernel.name for role, kernel in kernels.items()}
        module = load_module(
            partial(spec.build, c, self.mesh, *kernels.values()),
            self.path(name),
            dtype,
            self.mesh.device,
            unused=spec.unused,
            offload=self.offloader.keeper(name, spec.blocks),
            precise=spec.precise,
        )
        module.runner = self.offloader.runner(name)
        return self.loaded(module)

    def module(self, name: str, make: Callable[[], M], **options: Any) -> M:
        """Build another component by `make`, and fill it by `load_module` with these options."""
        self.torch_only(name, "its attention is built into it")
        keeper = self.offloader.keeper(name)
        return self.loaded(
            load_module(make, self.path(name), self.dtype(name), self.mesh.device, offload=keeper, **options)
        )

    def torch_only(self, component: str, why: str) -> None:
        """Raise `BadRequest` where another attention backend is asked for a component that torch alone computes."""
        self._chooser.torch_only(component, why)

    def lora(self, modules: Mapping[str, nn.Module | None], original: Renames) -> dict[str, LoraLayers]:
        """Prepare LoRA for transformers. `original` has the names of the layers in the authors' code."""
        keep_bytes = self.platform.free_memory() // (LORA_SHARE * self.mesh.local_world * len(TRANSFORMERS))
        return {
            name: LoraLayers(module, original, name, keep_bytes, self.offloader.changer(name))
            for name, module in modules.items()
            if module is not None
        }

    def defaults(self, known: Mapping[str, object]) -> dict[str, Any]:
        """Return the values of generation_config.json, or else `known`."""
        return folder_defaults(self.folder) or dict(known)

    def memory(self, tiling: Tiling | None, **estimate: int) -> Memory:
        """Estimate the memory of an output, with the free memory and the offloaded weights that are loaded for it."""
        copies = self.mesh.local_world if self.platform.ranks_share_memory else 1
        coming = self.offloader.held_bytes
        return Memory(
            free=self.platform.free_memory(),
            text_weights=copies * max((coming(name) for name in self.encoders), default=0),
            denoiser_weights=copies * max(coming(name) for name in TRANSFORMERS),
            decoder_weights=copies * coming("vae"),
            tile_pixels=None if tiling is None else tiling.height * tiling.width,
            **estimate,
        )

    def token_bytes(self, width: int, hidden: int, dtype: torch.dtype) -> int:
        """Return the bytes that a block takes for each token of the sequence.

        In units of the weights' precision, measured in float32: 8 C and 5 C + 2 F in its two halves, and a float32
        copy where that is not its precision. Ranks of one machine add up; elsewhere each has its share.
        """
        block = max(8 * width, 5 * width + 2 * hidden) * dtype.itemsize + 8 * width * (dtype.itemsize < 4)
        if self.platform.ranks_share_memory:
            return block * self.mesh.cfg.size
        return block // self.mesh.tokens.size


def check_precisions(settings: Settings, encoders: int) -> None:
    """Raise `BadRequest` unless `text_encoder_precisions`, where it is given, has one for each text encoder."""
    given = settings.dtypes.text_encoder_precisions
    if given is not None and len(given) != encoders:
        reason = f"{len(given)} given; this model has {encoders} text encoder{'s'[: encoders != 1]}"
        raise BadRequest(reason, field="text_encoder_precisions")


def folder_defaults(folder: Path) -> dict[str, Any]:
    """Read a model's values of SamplingParams from its generation_config.json, if there is one.

    Raises:
        ModelError: the file holds what SamplingParams does not know.
    """
    file = folder / "generation_config.json"
    given = read_json(file) if file.is_file() else {}
    try:
        structure(given, SamplingParams)
    except BadRequest as error:
        raise ModelError(f"{file}: {error.message}") from None
    return given


@attrs.frozen
class Length:
    """How the time shift grows from a short sequence to a long one, as in scheduler_config.json."""

    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15
