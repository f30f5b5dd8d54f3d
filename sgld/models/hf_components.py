"""Components that are borrowed: text encoders of transformers, autoencoders of diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from sgld.errors import BadRequest, ModelError
from sgld.models.components import ComponentLoader
from sgld.models.vae import Tiling, join_tiles, levels
from sgld.nn.formats import Source
from sgld.nn.parallel import Axis
from sgld.nn.weights import listed, read_json
from sgld.params import SamplingParams
from sgld.settings import Settings

# ------------------------------------------------------------------------------------------------ text encoders

COLUMNS = (  # a rank has some of their outputs
    "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1", "q", "k", "v", "wi", "wi_0", "wi_1",
)  # fmt: skip
ROWS = ("o_proj", "down_proj", "out_proj", "fc2", "o", "wo")  # and of these some of the inputs
COUNTS = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "d_ff")  # what must divide
HEAD_COLUMNS = "relative_attention_bias"  # a table with a column for each head
Part = Callable[[Any], nn.Module]  # a model, to what is needed of it


def tokenizer(parts: ComponentLoader, name: str) -> Any:
    """Load a component as the tokenizer of transformers that its files name.

    Raises:
        ModelError: files that are missing or broken.
    """
    from transformers import AutoTokenizer

    folder = parts.path(name)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the bindings raise nothing narrower
        raise ModelError(f"{folder}: cannot be read: {_first_line(error)}") from None


def tokenize(tokenizer: Any, prompt: str, length: int) -> tuple[Tensor, int]:
    """Tokenize once: token ids [1, length], cut or padded as the tokenizer does, and how many the prompt has."""
    ids = tokenizer(prompt).input_ids
    count = len(ids)
    if count > length:
        end = ids[-1:] if ids[-1] == tokenizer.eos_token_id else []
        ids = ids[: length - len(end)] + end
    padded = tokenizer.pad({"input_ids": [ids]}, padding="max_length", max_length=length, return_tensors="pt")
    return padded.input_ids, count


@attrs.frozen
class Reread(Source):
    """A module that is read from its folder anew, after the first time where it was `made` already."""

    make: Callable[[], nn.Module]  # on the CPU
    kinds: Mapping[str, torch.dtype]  # of its tensors, some of which may be more precise than the others
    made: list[nn.Module] = attrs.field(factory=list)

    def kind(self, name: str) -> torch.dtype:
        return self.kinds[name]

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        found = (self.made.pop() if self.made else self.make()).state_dict()
        for name in names:
            yield name, found[name].to(self.device)


def text_encoder(
    parts: ComponentLoader, name: str, cls: Any, layers: str = "", part: Part = lambda whole: whole
) -> Any:
    """Load a component strictly as a `PreTrainedModel` of class `cls`, ready for inference.

    `part` takes what is needed of it; the rest is let go.
    With `tp_size` the ranks share the heads and hidden channels of the blocks under the submodule `layers` (tensor
    parallelism, Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053); a model that names none cannot be shared.

    Raises:
        ModelError: weights that are missing, unexpected or of another shape.
        BadRequest: `tp_size` ranks cannot share it evenly; an attention backend other than torch's.
    """
    parts.torch_only(name, "its attention is built into it")
    axis = parts.mesh.axis(parts.settings.parallel.tp_size)
    if axis.size > 1 and not layers:
        raise BadRequest(f"{axis.size} workers cannot share this model's {name}; use 1", field="tp_size")
    make = partial(_read, cls, parts.path(name), parts.dtype(name), layers, part, axis)
    module = make()
    if (keeper := parts.offloader.keeper(name)) is not None:
        made = [] if parts.platform.offloads_to_files else [module]
        kinds = {key: x.dtype for key, x in module.state_dict().items()}
        keeper(module, Reread(parts.dtype(name), parts.mesh.device, make, kinds, made))
    return parts.loaded(module.to(parts.mesh.device))


def _read(cls: Any, folder: Path, dtype: torch.dtype, layers: str, part: Part, axis: Axis) -> nn.Module:
    from huggingface_hub.errors import StrictDataclassError
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    file, needed = folder / "config.json", cls.config_class.model_type
    if (kind := read_json(file).get("model_type")) != needed:  # else a model of its default size would be built
        raise ModelError(f"{file}: model_type is {kind!r}; only {needed!r} is supported")
    try:
        module, report = cls.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: cannot be read: {_first_line(error)}") from None
    except StrictDataclassError as error:  # its cause says what is wrong in the config
        raise ModelError(f"{file}: {_first_line(error.__cause__ or error)}") from None
    wrong = sorted(report["mismatched_keys"], key=str)
    faults = [
        listed("missing", sorted(report["missing_keys"])),
        listed("unexpected", sorted(report["unexpected_keys"])),
        listed("of the wrong shape", [f"{name} {list(a)} instead of {list(b)}" for name, a, b in wrong]),
    ]
    if any(faults):
        raise ModelError(f"{folder}: {'; '.join(filter(None, faults))}")
    found = part(module.eval().requires_grad_(False))
    if axis.size > 1:
        share(found.get_submodule(layers), axis)
    return found


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def share(blocks: nn.Module, axis: Axis) -> None:
    """Leave this rank its part of the linear layers of these blocks, whose sums are then taken over all ranks.

    Raises:
        BadRequest: heads or hidden channels that do not divide.
    """
    config: Any = next(module.config for module in blocks.modules() if hasattr(module, "config"))
    counts = [getattr(config, n, 0) for n in COUNTS]
    both = math.gcd(*(count or 0 for count in counts))
    if both % axis.size:
        allowed = ", ".join(str(n) for n in range(1, both + 1) if both % n == 0)
        raise BadRequest(
            f"{axis.size} workers cannot share the attention heads and hidden channels of the text encoder "
            f"evenly; allowed: {allowed}",
            field="tp_size",
        )
    for name, layer in blocks.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(layer, nn.Linear) and leaf in COLUMNS:
            layer.weight = _part(layer.weight, 0, axis)
            if layer.bias is not None:
                layer.bias = _part(layer.bias, 0, axis)
        elif isinstance(layer, nn.Linear) and leaf in ROWS:
            layer.weight = _part(layer.weight, 1, axis)
            if layer.bias is not None and axis.index:
                layer.bias = nn.Parameter(torch.zeros_like(layer.bias), requires_grad=False)  # it counts once
            layer.register_forward_hook(lambda module, args, y: axis.total(y.contiguous()))
        elif isinstance(layer, nn.Embedding) and leaf == HEAD_COLUMNS:
            layer.weight = _part(layer.weight, 1, axis)


def _part(x: Tensor, dim: int, axis: Axis) -> nn.Parameter:
    return nn.Parameter(axis.shard(x, dim).clone(), requires_grad=False)


# ------------------------------------------------------------------------------------------------- autoencoders


class Autoencoder:
    """An autoencoder of diffusers. Latents are as it takes them: scaling them is the family's.

    `spatial` and `temporal` are how many pixels and frames one latent stands for. Where `tiled`, large pictures are
    decoded tile by tile unless the settings say otherwise; so are all when ranks share the decoding, each some tiles.
    `least` is how many latents a side it can decode: where there are fewer, the last one is repeated.
    """

    def __init__(
        self, parts: ComponentLoader, cls: Any, spatial: int, temporal: int = 1, *, tiled: bool = False, least: int = 1
    ):
        s = parts.settings
        if not s.memory.vae_config.load_decoder:
            raise BadRequest("vae_config.load_decoder: this model cannot work without the decoder", "load_decoder")
        config = parts.config("vae")
        if (name := config.get("_class_name")) != cls.__name__:
            raise ModelError(f"{parts.path('vae') / 'config.json'}: _class_name is {name!r}; only {cls.__name__!r}")
        self.module: Any = parts.module("vae", partial(cls.from_config, config))
        self.config = config
        self.spatial, self.temporal, self.least = spatial, temporal, least
        self.rows = parts.mesh.all if s.memory.parallel_decode else Axis()
        if s.memory.parallel_decode:
            _check_shared_in_tiles(s)
        tiled |= s.memory.parallel_decode  # on one worker too, so that any number of them makes the same picture
        self.tiling = Tiling.of(s.memory.vae_config, spatial) if s.memory.tiles(by_default=tiled) else None

    def grid(self, params: SamplingParams) -> tuple[int, int, int]:
        """Return the frames, rows and columns of an output's latents."""
        frames = (params.num_frames - 1) // self.temporal + 1
        return frames, params.height // self.spatial, params.width // self.spatial

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the weights."""
        found: torch.dtype = self.module.dtype
        return found

    def decode(self, z: Tensor, raise_if_cancelled: Callable[[], None] = lambda: None) -> Tensor:
        """Decode latents [1, C, h, w] or [1, C, T, h, w] to frames u8 [N, H, W, 3] on the CPU.

        Ranks that share it all call it, and the first of them has the frames. `raise_if_cancelled` is called before
        each tile, by all ranks equally often.
        """

        def whole(part: Tensor) -> Tensor:
            raise_if_cancelled()
            height, width = part.shape[-2:]
            lack = [max(0, self.least - n) for n in (height, width)]
            if any(lack):
                part = F.pad(part, (0, lack[1], 0, lack[0], *[0] * 2 * (part.ndim - 4)), mode="replicate")
            y: Tensor = self.module.decode(part, return_dict=False)[0]
            return y[..., : height * self.spatial, : width * self.spatial]

        z = z.to(self.dtype)
        t = self.tiling
        large = t is not None and (z.shape[-2] * self.spatial > t.height or z.shape[-1] * self.spatial > t.width)
        if t is not None and large:
            y = self._in_tiles(whole, z, t, raise_if_cancelled)
        elif self.rows.index:
            raise_if_cancelled()  # it is too small to be shared
        else:
            y = whole(z)
        if self.rows.index:
            return torch.empty(0, 0, 0, 3, dtype=torch.uint8)
        video = y.transpose(1, 2).flatten(0, 1) if y.ndim == 5 else y  # [N, 3, H, W]
        return levels(video).permute(0, 2, 3, 1).cpu()

    @property
    def pixel_bytes(self) -> int:
        """Return the bytes that an autoencoder of pictures takes for each pixel it decodes at once.

        Five copies of its widest level, measured on a tiny twin.
        """
        widths = self.config["block_out_channels"]
        widest = max(width / 4**i for i, width in enumerate([*widths[1:2], *widths[1:]]))
        return int(5 * widest * self.dtype.itemsize)

    def encode(self, pictures: Tensor) -> Tensor:
        """Encode a picture [1, 3, H, W] or clip [1, 3, N, H, W] in [-1, 1] to the mode of its latents [1, C, ...]."""
        weight = next(self.module.parameters())
        z: Tensor = self.module.encode(pictures.to(weight)).latent_dist.mode()
        return z

    def _in_tiles(
        self, decode: Callable[[Tensor], Tensor], z: Tensor, t: Tiling, raise_if_cancelled: Callable[[], None]
    ) -> Tensor:
        """Tile by tile, each rank its share; the first joins them, the others' answer means nothing."""
        s = self.spatial
        H, W = z.shape[-2:]
        tops, lefts = range(0, H, t.stride_height // s), range(0, W, t.stride_width // s)
        cells = [z[..., i : i + t.height // s, j : j + t.width // s] for i in tops for j in lefts]
        ranks = self.rows if len(cells) >= self.rows.size else Axis()
        own = ranks.share_list(cells)
        tiles = [_filled(decode(cell), t) for cell in own]
        for _ in range(len(own), -(-len(cells) // ranks.size)):
            raise_if_cancelled()  # other ranks have a tile more
        whole = ranks.join(torch.stack(tiles), 0, len(cells))
        if ranks.index or self.rows.index:
            return whole[0]
        cut = [tile[..., : cell.shape[-2] * s, : cell.shape[-1] * s] for tile, cell in zip(whole, cells, strict=True)]
        rows = [cut[i : i + len(lefts)] for i in range(0, len(cut), len(lefts))]
        return join_tiles(rows, t)[..., : H * s, : W * s]


def _filled(tile: Tensor, t: Tiling) -> Tensor:
    """Pad a tile to the full size, so that all tiles can be stacked."""
    return F.pad(tile, (0, t.width - tile.shape[-1], 0, t.height - tile.shape[-2]))


def _check_shared_in_tiles(s: Settings) -> None:
    """Refuse settings for a decode that is shared otherwise: its norms see the whole picture."""
    if not s.memory.tiles(by_default=True):
        path = "vae_config.use_tiling" if s.memory.vae_tiling is None else "vae_tiling"
        raise BadRequest("false: this model's decode is shared tile by tile; leave it or vae_sp out", field=path)
    if (mode := s.memory.vae_config.parallel_decode_mode) not in (None, "auto", "tiled"):
        path = "vae_config.parallel_decode_mode"
        raise BadRequest(f"{mode!r}: this model's decode is shared tile by tile; use auto or tiled", field=path)
