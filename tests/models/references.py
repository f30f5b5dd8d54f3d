"""Pipelines of diffusers that its own loader cannot build here, because they want torchvision."""

from pathlib import Path
from typing import Any

from torch import Tensor

from sgld import inputs
from sgld.nn.weights import read_json
from tests.models import parity


def flux2_pipeline(folder: Path) -> Any:
    """Load a FLUX.2 in float32; its own loader wants torchvision for dev's processor, which wraps a tokenizer."""
    import diffusers
    import transformers

    index = read_json(folder / "model_index.json")
    index["tokenizer"][1] = "AutoTokenizer"
    libraries = {"diffusers": diffusers, "transformers": transformers}
    parts = {
        name: getattr(libraries[value[0]], value[1]).from_pretrained(folder / name)
        for name, value in index.items()
        if isinstance(value, list)
    }
    flags = {name: index[name] for name in ("is_distilled",) if name in index}
    return parity.quiet(getattr(diffusers, index["_class_name"])(**parts, **flags))


class Processor:
    """What diffusers' pipelines ask of Qwen2VLProcessor, which itself needs torchvision."""

    def __init__(self, folder: Path, tokenizer: Any):
        from transformers import Qwen2VLImageProcessorPil

        self.tokenizer, self.pictures = tokenizer, Qwen2VLImageProcessorPil.from_pretrained(folder)

    def __call__(self, text: list[str], images: Any, padding: bool, return_tensors: str) -> Any:
        from transformers import BatchFeature

        seen, (words,) = self.pictures(images, return_tensors="pt"), text
        first, *rest = words.split("<|image_pad|>")
        counts = (seen["image_grid_thw"].prod(-1) // 4).tolist()
        words = first + "".join("<|image_pad|>" * n + after for n, after in zip(counts, rest, strict=True))
        return BatchFeature({**self.tokenizer([words], return_tensors="pt"), **seen})


def qwen_pipeline(folder: Path, name: str | None = None) -> Any:
    """Load a Qwen-Image in float32, as the pipeline class `name` or its own.

    Its text encoder is also told which tokens are a picture's: the pipelines leave that out, and without it
    transformers 5 gives them the places of words (https://github.com/huggingface/diffusers/issues/14194).
    """
    import diffusers
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder").eval()
    image = encoder.config.image_token_id

    def kinds(module: Any, args: Any, given: dict[str, Any]) -> Any:
        return args, given | {"mm_token_type_ids": (given["input_ids"] == image).int()}

    encoder.register_forward_pre_hook(kinds, with_kwargs=True)
    editor = {"processor": Processor(folder / "processor", tokenizer)} if (folder / "processor").is_dir() else {}
    return parity.quiet(
        getattr(diffusers, name or read_json(folder / "model_index.json")["_class_name"])(
            tokenizer=tokenizer,
            text_encoder=encoder,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
            vae=diffusers.AutoencoderKLQwenImage.from_pretrained(folder / "vae"),
            transformer=diffusers.QwenImageTransformer2DModel.from_pretrained(folder / "transformer"),
            **editor,
        )
    )


def their_qwen(pipeline: Any, request: parity.Request) -> Tensor:
    """Return the picture u8 [1, H, W, 3] of a Qwen-Image pipeline of diffusers."""
    given = dict(request)
    given["true_cfg_scale"] = given.pop("guidance_scale")
    if files := given.pop("image_path", None):
        pictures = [inputs.upright(file) for file in files]
        given["image"] = pictures if type(pipeline).__name__ == "QwenImageEditPlusPipeline" else pictures[0]
    return parity.theirs(pipeline, given)
