"""The call of a diffusers pipeline: its arguments, and the keys of `diffusers_kwargs` that may fill them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any

import attrs

from sgld.convert import shorten
from sgld.errors import BadRequest, ModelError, nearest
from sgld.models.base import Watch

REQUEST_FIELDS = (  # fields of a request that a call may have an argument for, under one name
    "negative_prompt", "max_sequence_length", "height", "width", "num_frames", "num_inference_steps", "guidance_scale",
    "guidance_scale_2", "true_cfg_scale", "cfg_normalization", "boundary_ratio", "flow_shift", "strength",
)  # fmt: skip
FRAME_RATES = ("frame_rate", "fps")  # arguments that take frames a second
RENAMED_FIELDS = {
    **dict.fromkeys(FRAME_RATES, "fps"), "prompt": "prompt", "image": "image_path", "mask_image": "mask_path",
}  # fmt: skip
ENGINE_ARGUMENTS = (
    "self", "generator", "output_type", "return_dict", "num_images_per_prompt", "num_videos_per_prompt", "callback",
    "callback_steps", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
)  # fmt: skip
ATTENTION_ARGUMENTS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")  # synonyms
TEXT = re.compile(r"\bstr\b|Literal\[")  # in the annotation of an argument that is text
FILE_LIKE = re.compile("image|video|frame|mask|picture|audio|font|file|path")  # in the name of one that may be a file
SOUND = ("num_waveforms_per_prompt", "audio_length_in_s", "audio_duration", "audio_duration_s")
REJECTED = {  # arguments of calls whose output is neither a picture nor a clip
    **dict.fromkeys(SOUND, "it makes sound alone"),
    "ensemble_size": "it measures a picture and makes none",
    "video_length": "it counts its frames in an argument of its own, video_length",
}


@attrs.frozen
class CallSignature:
    """The signature of a pipeline's `__call__`."""

    name: str  # of the pipeline's class
    arguments: Mapping[str, Parameter]
    takes_any: bool = False  # arguments of any name

    @classmethod
    def of(cls, pipeline: type) -> CallSignature:
        """Read the signature of a class. `**kwargs` of diffusers' own classes count for nothing: they are dropped."""
        found = signature(pipeline.__call__).parameters
        arguments = {n: p for n, p in found.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        takes_any = any(p.kind is p.VAR_KEYWORD for p in found.values())
        return cls(pipeline.__name__, arguments, takes_any and not pipeline.__module__.startswith("diffusers."))

    def check(self) -> None:
        """Raise `ModelError` for a call without text prompt, or without a picture or clip as output."""
        reasons = [reason for name, reason in REJECTED.items() if name in self.arguments]
        if "prompt" in self.arguments and "Image" in str(self.arguments["prompt"].annotation):
            reasons.append("its prompt is a picture")
        if reasons:
            raise ModelError(f"{self.name} cannot run here: {reasons[0]}")

    def is_optional(self, name: str) -> bool:
        """Return true for an argument whose default is None: the pipeline's code then chooses the value."""
        return name in self.arguments and self.arguments[name].default is None

    def takes_text(self, name: str) -> bool:
        """Return true for an argument that is text by annotation or default, and no file by its name."""
        if name not in self.arguments or FILE_LIKE.search(name):
            return False
        annotation = str(self.arguments[name].annotation).partition("ict[")[0]
        return isinstance(self.arguments[name].default, str) or TEXT.search(annotation) is not None

    def extra_arguments(self, given: Mapping[str, object], context: Watch) -> dict[str, Any]:
        """Map the keys of `diffusers_kwargs` to arguments of this call.

        Raises:
            BadRequest: a key that the call lacks, that repeats an argument, or that sgld fills itself. Text for an
                argument that the pipeline might open as a file or an address.
        """
        found: dict[str, Any] = {}
        for key, value in given.items():
            path = f"diffusers_kwargs.{key}"
            if key in REQUEST_FIELDS or key in RENAMED_FIELDS:
                raise BadRequest(f"give it as {RENAMED_FIELDS.get(key, key)}, not among these", field=path)
            if key in ENGINE_ARGUMENTS:
                raise BadRequest("sgld itself decides it; leave it out", field=path)
            name = self._argument_name(key, path, context)
            if name in found:
                raise BadRequest(f"{name} is given under another name too; give it once", field=path)
            if _has_text(value) and not self.takes_text(name):
                reason = "no text is taken here, for it may name a file or an address"
                raise BadRequest(f"{shorten(value)}: {reason}; pictures come in image_path and mask_path", field=path)
            if name in ATTENTION_ARGUMENTS and isinstance(value, dict) and "scale" in value:
                context.note(f"{path}.scale: it does not reach adapters; each has a strength of its own")
            found[name] = value
        return found

    def _argument_name(self, key: str, path: str, context: Watch) -> str:
        """Return the argument that a key means. Raise `BadRequest` for a key that means none."""
        if key in self.arguments:
            return key
        synonym = next((n for n in ATTENTION_ARGUMENTS if n in self.arguments), None)
        if key in ATTENTION_ARGUMENTS and synonym is not None:
            context.note(f"{path}: {self.name} names it {synonym}")
            return synonym
        if self.takes_any:
            return key
        known = [n for n in self.arguments if n not in (*ENGINE_ARGUMENTS, *REQUEST_FIELDS, *RENAMED_FIELDS)]
        reason = f"the call of {self.name} has no such argument{nearest(key, known)}; it has {', '.join(known)}"
        raise BadRequest(reason, field=path)


def _has_text(value: Any) -> bool:
    """Return true for text, and for a list or map that holds text at any depth."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, str) or any(_has_text(item) for item in inner)
