"""One case for each family: a tiny twin, a request, and how diffusers makes its picture.

`test_contract.py` holds every case to the same contract. A new family adds its `Case` to `CASES`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor

from sgld.models import qwen_image
from tests.models.parity import Request, levels, quiet, theirs
from tests.models.references import flux2_pipeline, qwen_pipeline, their_qwen

WHOLE = {"text_encoder_cpu_offload": True, "dit_cpu_offload": True, "vae_cpu_offload": True}
LAYERWISE = {"dit_layerwise_offload": True}
PROMPT = {"prompt": "a red cat on the green ball", "height": 32, "width": 48, "num_inference_steps": 3, "seed": 7}


def their_clip(pipeline: Any, request: Request) -> Tensor:
    """Return the clip u8 [N, H, W, 3] of a video pipeline of diffusers."""
    given = dict(request)
    generator = torch.Generator().manual_seed(given.pop("seed"))
    return levels(np.asarray(pipeline(**given, generator=generator, output_type="np").frames[0]))


def their_ltx2(pipeline: Any, request: Request) -> Tensor:
    """Return the clip u8 [N, H, W, 3] of LTX-2 with diffusers, whose default guidance is LTX-2.3's."""
    return their_clip(pipeline, {**request, **LTX2_GUIDANCE, "frame_rate": 24})


def their_pipeline(folder: Path) -> Any:
    """Load a pipeline of diffusers, in float32."""
    from diffusers import DiffusionPipeline

    return quiet(DiffusionPipeline.from_pretrained(folder))


def no_patch(patch: pytest.MonkeyPatch) -> None:
    """Leave the family and diffusers as they are."""


def small_pictures(patch: pytest.MonkeyPatch) -> None:
    """Let Qwen-Image's input pictures have a few thousand pixels, here and in diffusers."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as one
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as several

    area, glance, real = 64 * 64, 32 * 32, one.calculate_dimensions
    patch.setattr(qwen_image, "PICTURE_AREA", area)
    patch.setattr(qwen_image, "GLANCE_AREA", glance)
    patch.setattr(one, "calculate_dimensions", lambda _, ratio: real(area, ratio))
    patch.setattr(several, "VAE_IMAGE_SIZE", area)
    patch.setattr(several, "CONDITION_IMAGE_SIZE", glance)


@attrs.frozen(eq=False)  # hashed by identity: requests are dicts
class Case:
    """A family's twin and what is asked of it."""

    twin: str  # of tools.tiny.makers()
    pipeline: str  # of the registry
    task: str  # that the request proves
    request: Request  # under guidance, so that both branches take part
    reference: Callable[[Any, Request], Tensor] = theirs  # makes the picture with a pipeline of diffusers
    also: Sequence[Mapping[str, Any]] = ()  # changes of the request that must equal diffusers too
    unguided: Mapping[str, Any] = attrs.field(factory=lambda: {"guidance_scale": 1.0})  # turns guidance off
    splits: Mapping[int, Sequence[Mapping[str, Any]]] = attrs.field(factory=dict)  # by the number of ranks
    offloads: Sequence[Mapping[str, Any]] = (WHOLE, LAYERWISE)
    large: Mapping[str, Any] | None = None  # changes of the request that make memory matter
    one_step: Mapping[str, Any] | None = attrs.field(  # changes with which a single step makes the first preview
        default=attrs.Factory(lambda self: self.unguided, takes_self=True)
    )
    approaches: bool = False  # whether later previews are nearer to the picture, as not with all random weights
    estimate_below: float = 1.3  # times the estimate that the measured peak may reach
    pipeline_of: Callable[[Path], Any] = their_pipeline  # loads diffusers' pipeline of the twin's folder
    pictures: Sequence[tuple[int, int]] = ()  # sizes of input pictures; the request gets their files as image_path
    patch: Callable[[pytest.MonkeyPatch], None] = no_patch  # changes constants of the family and of diffusers


TWO = ({"ulysses_degree": 2}, {"ring_degree": 2, "tp_size": 2}, {"enable_cfg_parallel": True})
FOUR = ({"ulysses_degree": 2, "ring_degree": 2}, {"enable_cfg_parallel": True, "ring_degree": 2})
FLUX = PROMPT | {"max_sequence_length": 16, "true_cfg_scale": 2.5, "negative_prompt": "blurred dog"}
NO_TRUE_GUIDANCE = {"true_cfg_scale": 1.0}
Z_IMAGE = {
    "prompt": "a red cat & the green ball, 猫", "negative_prompt": "blurred", "height": 32, "width": 48,
    "num_inference_steps": 4, "guidance_scale": 5.0, "cfg_normalization": 1.0, "seed": 7,
}  # fmt: skip
WAN = PROMPT | {"num_frames": 9, "guidance_scale": 5.0, "negative_prompt": "blurred"}
FLUX2 = PROMPT | {
    "prompt": "a red cat & the green ball, 猫", "max_sequence_length": 64, "guidance_scale": 4.0,
}  # fmt: skip
FLUX2_EDGES = (
    {"height": 80, "width": 64}, {"num_inference_steps": 1}, {"max_sequence_length": 512}, {"prompt": ""},
    {"max_sequence_length": 20},  # which cuts the prompt off
    {"prompt": "a [IMG] cat <|im_end|> [INST]"},
)  # fmt: skip
QWEN = PROMPT | {
    "prompt": "a red cat over the green ball", "negative_prompt": "blurred", "num_inference_steps": 4,
    "guidance_scale": 4.0,
}  # fmt: skip
QWEN_EDIT = QWEN | {"guidance_scale": 8.0}  # beside a picture the words count for less

LTX2 = {
    "prompt": " a red cat ", "negative_prompt": "blurred", "height": 64, "width": 96, "num_frames": 9,
    "num_inference_steps": 3, "guidance_scale": 3.5, "max_sequence_length": 32, "seed": 7,
}  # fmt: skip
LTX2_GUIDANCE: Mapping[str, Any] = {
    "use_cross_timestep": False, "stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0,
    "audio_guidance_scale": None, "audio_stg_scale": 0.0, "audio_modality_scale": 1.0, "audio_guidance_rescale": 0.0,
}  # fmt: skip
HUNYUAN = PROMPT | {
    "prompt": "a red cat {over} the green ball &amp; 2 dogs", "negative_prompt": "blurred", "num_frames": 9,
    "height": 80,  # 45 tokens, which no number of ranks divides
}  # fmt: skip
HUNYUAN_FOUR = (FOUR[0], {"enable_cfg_parallel": True, "ulysses_degree": 2})
CLIP_256 = {"height": 256, "width": 256, "num_frames": 17}


def hunyuan15_pipeline(folder: Path) -> Any:
    """Load diffusers' HunyuanVideo 1.5, whose adapters only its transformer can load."""
    pipeline = their_pipeline(folder)
    pipeline.load_lora_weights = pipeline.transformer.load_lora_adapter
    pipeline.unload_lora_weights = pipeline.transformer.unload_lora
    return pipeline


def their_hunyuan15(pipeline: Any, request: Request) -> Tensor:
    """Return the clip of diffusers, whose guider has the guidance scale."""
    given = dict(request)
    pipeline.guider = pipeline.guider.new(guidance_scale=given.pop("guidance_scale"))
    return their_clip(pipeline, given)


CASES = (
    Case(
        "flux1-dev", "FluxPipeline", "text-to-image", FLUX | {"guidance_scale": 3.5},
        also=(
            {"guidance_scale": 6.0, "num_inference_steps": 1, "height": 16},
            {"prompt": "a red dog " * 60, "max_sequence_length": 512},
        ),
        unguided=NO_TRUE_GUIDANCE,
        splits={2: TWO, 4: FOUR},
        estimate_below=1.5,  # the allocator's fragments differ from run to run: 1.36 was seen
        large={"height": 768, "width": 768, **NO_TRUE_GUIDANCE},
    ),
    Case(
        "flux1-schnell", "FluxPipeline", "text-to-image", FLUX,
        also=({"num_inference_steps": 4, **NO_TRUE_GUIDANCE},),
        unguided=NO_TRUE_GUIDANCE,
    ),
    Case(
        "flux1-kontext", "FluxKontextPipeline", "text-to-image", FLUX | {"guidance_scale": 2.5},
        reference=lambda pipeline, request: theirs(
            pipeline, {**request, "max_area": request["height"] * request["width"]}
        ),
        unguided=NO_TRUE_GUIDANCE,
    ),
    Case(
        "wan21", "WanPipeline", "text-to-video", WAN, their_clip,
        also=(
            {"guidance_scale": 1.0}, {"num_frames": 1}, {"num_inference_steps": 1}, {"max_sequence_length": 6},
        ),
        splits={2: TWO},
    ),
    Case("wan22-a14b", "WanPipeline", "text-to-video", WAN | {"guidance_scale_2": 2.5}, their_clip),
    Case(
        "z-image", "ZImagePipeline", "text-to-image", Z_IMAGE,
        also=(
            {"cfg_normalization": 0.0},
            {"cfg_normalization": 0.6},
            {"guidance_scale": 0.5},  # from 0 on it counts, not from 1
            {"height": 64, "width": 144},  # 36 tokens, filled up to 64
            {"height": 64, "width": 128},  # 32 tokens
            {"num_inference_steps": 1},
            {"max_sequence_length": 12},
            {"prompt": ""},
            {"prompt": "cat " * 20, "negative_prompt": ""},  # other multiples of 32 tokens for each prompt
        ),
        unguided={"guidance_scale": 0.0},
        splits={2: TWO, 4: FOUR},
        offloads=(WHOLE, LAYERWISE, WHOLE | {"precision": "bf16"}, WHOLE | LAYERWISE),
        large={"height": 768, "width": 768},
    ),
    Case(
        "z-image-turbo", "ZImagePipeline", "text-to-image", Z_IMAGE | {"guidance_scale": 3.0},
        also=({"guidance_scale": 0.0},),
        unguided={"guidance_scale": 0.0},
    ),
    Case(  # with sound, and with its other guidance: test_ltx2.py
        "ltx2", "LTX2Pipeline", "text-to-video", LTX2, their_ltx2,
        one_step=None,  # whose first preview has sound's guidance too
        also=({"guidance_scale": 1.0}, {"num_frames": 1}),
        offloads=(WHOLE | LAYERWISE,),
    ),
    Case(  # its true guidance, which diffusers has not: test_flux2.py
        "flux2-dev", "Flux2Pipeline", "text-to-image", FLUX2,
        one_step={},
        also=({"guidance_scale": 1.5}, *FLUX2_EDGES),
        unguided={"true_cfg_scale": 3.0},
        splits={2: ({"ulysses_degree": 2, "tp_size": 2}, {"ring_degree": 2})},
        offloads=(WHOLE, LAYERWISE, WHOLE | LAYERWISE),
        pipeline_of=flux2_pipeline,
    ),
    Case(
        "flux2-klein", "Flux2KleinPipeline", "text-to-image", FLUX2 | {"guidance_scale": 1.0},
        one_step={},
        unguided={"guidance_scale": 4.0},  # which it does not need, but which is done
        pipeline_of=flux2_pipeline,
    ),
    Case(
        "flux2-klein-base", "Flux2KleinPipeline", "text-to-image", FLUX2,
        also=({"guidance_scale": 1.0}, *FLUX2_EDGES),
        splits={2: TWO[1:], 4: ({"enable_cfg_parallel": True, "ulysses_degree": 2},)},
        pipeline_of=flux2_pipeline,
    ),
    Case(
        "qwen-image", "QwenImagePipeline", "text-to-image", QWEN, their_qwen,
        also=(
            {"guidance_scale": 1.0}, {"width": 80, "height": 48}, {"num_inference_steps": 2},
            {"max_sequence_length": 4}, {"prompt": "\n 猫 on  the ball \n", "negative_prompt": ""},
        ),
        splits={
            2: ({"enable_cfg_parallel": True}, {"ulysses_degree": 2, "vae_sp": True}, {"ring_degree": 2}),
            4: ({"ulysses_degree": 2, "ring_degree": 2, "vae_sp": True},),
        },
        pipeline_of=qwen_pipeline,
        approaches=True,
    ),
    Case(
        "qwen-image-edit", "QwenImageEditPipeline", "image-to-image", QWEN_EDIT, their_qwen,
        splits={2: ({"enable_cfg_parallel": True}, {"ulysses_degree": 2})},
        offloads=(WHOLE | LAYERWISE,),
        pipeline_of=qwen_pipeline,
        approaches=True,
        pictures=((90, 50),),
        patch=small_pictures,
    ),
    Case(
        "qwen-image-edit-2509", "QwenImageEditPlusPipeline", "image-to-image", QWEN_EDIT, their_qwen,
        splits={2: ({"enable_cfg_parallel": True},)},
        pipeline_of=qwen_pipeline,
        approaches=True,
        pictures=((90, 50), (40, 70), (64, 64)),
        patch=small_pictures,
    ),
    Case(
        "qwen-image-edit-2511", "QwenImageEditPlusPipeline", "image-to-image", QWEN_EDIT, their_qwen,
        splits={
            2: ({"ulysses_degree": 2}, {"ring_degree": 2, "tp_size": 2}),
            4: ({"enable_cfg_parallel": True, "ring_degree": 2},),
        },
        offloads=(WHOLE,),
        pipeline_of=qwen_pipeline,
        pictures=((90, 50), (40, 70)),
        patch=small_pictures,
    ),
    Case(
        "hunyuan-video", "HunyuanVideoPipeline", "text-to-video",
        HUNYUAN | {"true_cfg_scale": 3.0, "guidance_scale": 2.5}, their_clip,
        also=({"true_cfg_scale": 1.0}, {"negative_prompt": ""}),
        unguided=NO_TRUE_GUIDANCE,
        splits={2: TWO, 4: HUNYUAN_FOUR},
        large=CLIP_256 | NO_TRUE_GUIDANCE,
        one_step=None,  # a clip's first frame is decoded alone
    ),
    Case(
        "hunyuan-video15", "HunyuanVideo15Pipeline", "text-to-video",
        HUNYUAN | {"prompt": 'a red cat {over} the "ball", “2 dogs” &amp; a "ball"', "guidance_scale": 6.0},
        their_hunyuan15,
        splits={2: TWO, 4: HUNYUAN_FOUR[1:]},
        large=CLIP_256,
        pipeline_of=hunyuan15_pipeline,
    ),
)  # fmt: skip
