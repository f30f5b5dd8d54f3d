"""One case for each family: a tiny twin, a request, and how diffusers makes its picture.

`test_contract.py` holds every case to the same contract. A new family adds its `Case` to `CASES`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from tests.models.parity import Request, levels, theirs

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
    estimate_below: float = 1.3  # times the estimate that the measured peak may reach


TWO = ({"ulysses_degree": 2}, {"ring_degree": 2, "tp_size": 2}, {"enable_cfg_parallel": True})
FOUR = ({"ulysses_degree": 2, "ring_degree": 2}, {"enable_cfg_parallel": True, "ring_degree": 2})
FLUX = PROMPT | {"max_sequence_length": 16, "true_cfg_scale": 2.5, "negative_prompt": "blurred dog"}
NO_TRUE_GUIDANCE = {"true_cfg_scale": 1.0}
Z_IMAGE = {
    "prompt": "a red cat & the green ball, 猫", "negative_prompt": "blurred", "height": 32, "width": 48,
    "num_inference_steps": 4, "guidance_scale": 5.0, "cfg_normalization": 1.0, "seed": 7,
}  # fmt: skip
WAN = PROMPT | {"num_frames": 9, "guidance_scale": 5.0, "negative_prompt": "blurred"}

LTX2 = {
    "prompt": " a red cat ", "negative_prompt": "blurred", "height": 64, "width": 96, "num_frames": 9,
    "num_inference_steps": 3, "guidance_scale": 3.5, "max_sequence_length": 32, "seed": 7,
}  # fmt: skip
LTX2_GUIDANCE: Mapping[str, Any] = {
    "use_cross_timestep": False, "stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0,
    "audio_guidance_scale": None, "audio_stg_scale": 0.0, "audio_modality_scale": 1.0, "audio_guidance_rescale": 0.0,
}  # fmt: skip

CASES = (
    Case(
        "flux1-dev", "FluxPipeline", "text-to-image", FLUX | {"guidance_scale": 3.5},
        also=(
            {"guidance_scale": 6.0, "num_inference_steps": 1, "height": 16},
            {"prompt": "a red dog " * 60, "max_sequence_length": 512},
        ),
        unguided=NO_TRUE_GUIDANCE,
        splits={2: TWO, 4: FOUR},
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
        offloads=(WHOLE, LAYERWISE, WHOLE | LAYERWISE),
        large={"height": 768, "width": 768},
    ),
    Case(
        "z-image-turbo", "ZImagePipeline", "text-to-image", Z_IMAGE | {"guidance_scale": 3.0},
        also=({"guidance_scale": 0.0},),
        unguided={"guidance_scale": 0.0},
    ),
    Case(  # with sound, and with its other guidance: test_ltx2.py
        "ltx2", "LTX2Pipeline", "text-to-video", LTX2, their_ltx2,
        also=({"guidance_scale": 1.0}, {"num_frames": 1}),
        offloads=(WHOLE | LAYERWISE,),
    ),
)  # fmt: skip
