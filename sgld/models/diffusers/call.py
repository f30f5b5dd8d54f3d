"""The call of a diffusers pipeline: which arguments it has, and what a request may give it in `diffusers_kwargs`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any

import attrs

from sgld.convert import shorten
from sgld.errors import BadRequest, ModelError, nearest
from sgld.models.base import Watch

PASSED = (  # fields of a request that a call may have an argument for, of the same name
    "negative_prompt", "max_sequence_length", "height", "width", "num_frames", "num_inference_steps", "guidance_scale",
    "guidance_scale_2", "true_cfg_scale", "cfg_normalization", "boundary_ratio", "flow_shift", "strength",
)  # fmt: skip
RATES = ("frame_rate", "fps")  # what calls that take frames a second name them
OWN_FIELDS = {**dict.fromkeys(RATES, "fps"), "prompt": "prompt", "image": "image_path", "mask_image": "mask_path"}
ENGINE_S = (
    "self", "generator", "output_type", "return_dict", "num_images_per_prompt", "num_videos_per_prompt", "callback",
    "callback_steps", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
)  # fmt: skip
ATTENTION_ARGUMENTS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")  # one thing, three names
TEXT = re.compile(r"\bstr\b|Literal\[")  # in the annotation of an argument that is text
OPENED = re.compile("image|video|frame|mask|picture|audio|font|file|path")  # in the name of one that may be a file
SOUND = ("num_waveforms_per_prompt", "audio_length_in_s", "audio_duration", "audio_duration_s")
FOREIGN = {  # arguments that only those calls have whose output is nothing here
    **dict.fromkeys(SOUND, "it makes sound alone"),
    "ensemble_size": "it measures a picture and makes none",
    "video_length": "it counts its frames in an argument of its own, video_length",
}


@attrs.frozen
class Call:
    """The signature of a pipeline's call."""

    name: str  # of the pipeline
    arguments: Mapping[str, Parameter]
    takes_more: bool = False  # whatever their names

    @classmethod
    def of(cls, pipeline: type) -> Call:
        """That of a class. None of diffusers' own takes more: `**kwargs` there drop what they do not know."""
        found = signature(pipeline.__call__).parameters
        arguments = {n: p for n, p in found.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        more = any(p.kind is p.VAR_KEYWORD for p in found.values())
        return cls(pipeline.__name__, arguments, more and not pipeline.__module__.startswith("diffusers."))

    def check(self) -> None:
        """Raise `ModelError` where the output, or the prompt, is not what one is here."""
        reasons = [reason for name, reason in FOREIGN.items() if name in self.arguments]
        if "prompt" in self.arguments and "Image" in str(self.arguments["prompt"].annotation):
            reasons.append("its prompt is a picture")
        if reasons:
            raise ModelError(f"{self.name} cannot run here: {reasons[0]}")

    def leaves(self, name: str) -> bool:
        """Whether that argument is None unless it is given: then the pipeline's code settles it."""
        return name in self.arguments and self.arguments[name].default is None

    def takes_text(self, name: str) -> bool:
        """Whether an argument is text by its annotation or default, and by its name nothing that is opened."""
        if name not in self.arguments or OPENED.search(name):
            return False
        told = str(self.arguments[name].annotation).partition("ict[")[0]
        return isinstance(self.arguments[name].default, str) or TEXT.search(told) is not None

    def further(self, given: Mapping[str, Any], watch: Watch) -> dict[str, Any]:
        """`diffusers_kwargs` by the names of this call.

        Raises:
            BadRequest: a key that it lacks, that stands for another one too, or that is sgld's own to give; text where
                the pipeline might open what it names: a file of this machine, or an address.
        """
        found: dict[str, Any] = {}
        for key, value in given.items():
            path = f"diffusers_kwargs.{key}"
            if key in PASSED or key in OWN_FIELDS:
                raise BadRequest(f"give it as {OWN_FIELDS.get(key, key)}, not among these", field=path)
            if key in ENGINE_S:
                raise BadRequest("sgld itself decides it; leave it out", field=path)
            name = self._known(key, path, watch)
            if name in found:
                raise BadRequest(f"{name} is given under another name too; give it once", field=path)
            if _has_text(value) and not self.takes_text(name):
                reason = "no text is taken here, for it may name a file or an address"
                raise BadRequest(f"{shorten(value)}: {reason}; pictures come in image_path and mask_path", field=path)
            if name in ATTENTION_ARGUMENTS and isinstance(value, dict) and "scale" in value:
                watch.note(f"{path}.scale: it does not reach adapters; each has a strength of its own")
            found[name] = value
        return found

    def _known(self, key: str, path: str, watch: Watch) -> str:
        """The argument's name here. Raises `BadRequest` for one that is none."""
        if key in self.arguments or (self.takes_more and key not in ATTENTION_ARGUMENTS):
            return key
        other = next((n for n in ATTENTION_ARGUMENTS if n in self.arguments), None)
        if key in ATTENTION_ARGUMENTS and other is not None:
            watch.note(f"{path}: {self.name} names it {other}")
            return other
        if self.takes_more:
            return key
        known = [name for name in self.arguments if name not in (*ENGINE_S, *PASSED, *OWN_FIELDS)]
        reason = f"the call of {self.name} has no such argument{nearest(key, known)}; it has {', '.join(known)}"
        raise BadRequest(f"{reason}", field=path)


def _has_text(value: Any) -> bool:
    """Whether a plain value is text, or holds some at any depth."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, str) or any(_has_text(item) for item in inner)
