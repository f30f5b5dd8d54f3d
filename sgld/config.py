"""Values of the settings: their sources, their rules. The only module that reads `os.environ`."""

from __future__ import annotations

import itertools
import os
import re
import typing
from collections.abc import Mapping
from pathlib import Path

from sgld.convert import Kind, Values, fields_of, knob_of, shorten, structure
from sgld.errors import BadRequest, NotBuilt, nearest
from sgld.params import MAX_LORAS, SamplingParams
from sgld.settings import (
    COMPONENTS,
    DENSE_ATTENTION,
    SECTION_CLASSES,
    SPARSE_ATTENTION,
    RunOptions,
    Settings,
    settings_fields,
)

SETTINGS: tuple[type, ...] = tuple(SECTION_CLASSES.values())
SECTIONS: tuple[type, ...] = (*SETTINGS, SamplingParams, RunOptions)
_INT_DIGITS = 4000  # Python reads no longer ones


def _names() -> tuple[dict[str, type], dict[str, str]]:
    """Map every knob to its class, and every alias to its knob."""
    sections: dict[str, type] = {}
    aliases: dict[str, str] = {}
    for cls in SECTIONS:
        for name, field in fields_of(cls).items():
            sections[name] = cls
            aliases.update(dict.fromkeys(knob_of(field).aliases, name))
    return sections, aliases


SECTION_OF, ALIASES = _names()


def known_names() -> list[str]:
    """List every key that a config file may hold, aliases and component paths included."""
    return [*SECTION_OF, *ALIASES, *(f"{component}_path" for component in COMPONENTS)]


_INT = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?(inf|nan)", re.IGNORECASE)


def from_text(text: str, kind: Kind) -> object:
    """Convert a word of a command line or environment to a plain value; text that does not parse stays text."""
    options = [kind, *typing.get_args(kind)]
    if bool in options and text.lower() in ("true", "false", "1", "0"):
        return text.lower() in ("true", "1")
    if int in options and _INT.fullmatch(text) and len(text) < _INT_DIGITS:
        return int(text)
    if float in options and _FLOAT.fullmatch(text):
        return float(text)
    return text


def section(values: Mapping[str, object], cls: type) -> Values:
    """Select the merged values that belong to `cls`, a section of the settings or another class of knobs."""
    return {name: value for name, value in values.items() if SECTION_OF[name] is cls}


def settings_of(values: Mapping[str, object]) -> Settings:
    """Build settings from merged values, and check the rules that tie several fields together."""
    settings = Settings(*(structure(section(values, cls), cls) for cls in SETTINGS))
    _check_degrees(settings)
    _check_nodes(settings)
    _check_tiles(settings)
    _check_loras(settings)
    _check_offload(settings)
    _check_attention(settings)
    _check_steps(settings)
    if settings.memory.vae_config.parallel_decode_mode and not settings.memory.parallel_decode:
        path = "vae_config.parallel_decode_mode"
        raise BadRequest("it has no effect without vae_sp", field=path)
    unknown = [name for name in settings.model.component_paths if name not in COMPONENTS]
    if unknown:
        raise BadRequest(f"{unknown[0]!r} is no component{nearest(unknown[0], COMPONENTS)}", field="component_paths")
    return settings


def _check_tiles(settings: Settings) -> None:
    """Check that `vae_tiling` and `vae_config.use_tiling` agree."""
    one, other = settings.memory.vae_config.use_tiling, settings.memory.vae_tiling
    if None not in (one, other) and one != other:
        conflict = f"{one} contradicts vae_tiling {other}".lower()
        raise BadRequest(f"{conflict}; leave one out", field="vae_config.use_tiling")


def _check_offload(settings: Settings) -> None:
    """Check that pinning is set only with offloaded weights."""
    flags = [name for name in settings_fields() if name.endswith("_offload")]
    if not settings.memory.pin_cpu_memory and not any(settings.get(flag) for flag in flags):
        raise BadRequest(f"false has no effect without one of {', '.join(flags)}", field="pin_cpu_memory")


def _check_attention(settings: Settings) -> None:
    """Check the names of kernels. The worker checks that they can run."""
    known = DENSE_ATTENTION + SPARSE_ATTENTION
    for component, name in settings.attention.component_attention_backends.items():
        path = f"component_attention_backends.{component}"
        if name not in known:
            raise BadRequest(f"{name!r} is not one of {', '.join(known)}{nearest(name, known)}", field=path)
        if name in SPARSE_ATTENTION:
            raise NotBuilt(f"{name} is not built yet in this version of sgld (sparse attention)", field=path)


def _check_steps(settings: Settings) -> None:
    """Check for at least one time, each below the one before."""
    steps = settings.model.dmd_denoising_steps
    if steps is not None and (not steps or any(a <= b for a, b in itertools.pairwise(steps))):
        shown = ",".join(map(str, steps)) or "none"
        raise BadRequest(f"{shown}: give falling numbers, as in 1000,757,522", field="dmd_denoising_steps")


def _check_loras(settings: Settings) -> None:
    """Check that each adapter has a name of its own, and that strengths and targets are one, or one each."""
    paths, names = settings.lora.lora_path or [], settings.lora.lora_nickname
    if len(paths) > MAX_LORAS:
        raise BadRequest(f"{len(paths)} adapters are too many; at most {MAX_LORAS} are allowed", field="lora_path")
    if "" in paths:
        raise BadRequest("it is empty; name a file, a folder or a Hugging Face id", field="lora_path")
    for name in ("lora_nickname", "lora_scale", "lora_target"):
        given = settings.get(name)
        if given is None:
            continue
        if not paths:
            raise BadRequest("it has no effect without lora_path", field=name)
        allowed = {len(paths)} if name == "lora_nickname" else {1, len(paths)}
        if len(given) not in allowed:
            raise BadRequest(
                f"{len(given)} given for {len(paths)} in lora_path; allowed: {' or '.join(map(str, sorted(allowed)))}",
                field=name,
            )
    if names is not None and ("" in names or len(set(names)) < len(names)):
        raise BadRequest(f"{shorten(names)}: each adapter needs a name of its own", field="lora_nickname")


def _check_degrees(settings: Settings) -> None:
    """Check num_gpus = (2 with enable_cfg_parallel, else 1) * ulysses_degree * ring_degree."""
    s = settings.parallel
    if s.enable_cfg_parallel and s.num_gpus % 2:
        raise BadRequest(f"it needs an even number of workers; num_gpus is {s.num_gpus}", field="enable_cfg_parallel")
    sequence = s.num_gpus // 2 if s.enable_cfg_parallel else s.num_gpus
    among = (
        f"the {sequence} that share a sequence (num_gpus {s.num_gpus}{', in 2 branches' * bool(s.enable_cfg_parallel)})"
    )
    named = s.sp_degree or (s.ulysses_degree or 1) * (s.ring_degree or 1)
    halves = s.enable_cfg_parallel is None and 2 * named == s.num_gpus
    hint = ", or set enable_cfg_parallel" * halves
    if s.sp_degree not in (None, sequence):
        raise BadRequest(f"{s.sp_degree} workers are not {among}; leave it out{hint}", field="sp_degree")
    for name in ("ulysses_degree", "ring_degree"):
        degree = settings.get(name)
        if degree is not None and sequence % degree:
            raise BadRequest(f"{degree} workers do not divide {among}", field=name)
    if s.ulysses_degree and s.ring_degree and s.ulysses_degree * s.ring_degree != sequence:
        product = f"{s.ulysses_degree} x ring_degree {s.ring_degree}"
        raise BadRequest(f"{product} workers are not {among}; leave one out{hint}", field="ulysses_degree")
    if settings.memory.vae_sp and settings.memory.vae_config.use_parallel_decode is False:
        path = "vae_config.use_parallel_decode"
        raise BadRequest("false contradicts vae_sp true; leave one out", field=path)
    if s.num_gpus % s.tp_size:
        raise BadRequest(f"{s.tp_size} does not divide num_gpus ({s.num_gpus})", field="tp_size")


def _check_nodes(settings: Settings) -> None:
    """Check that several machines share the workers evenly, have a number each, and one address to meet."""
    s = settings.parallel
    if s.node_rank >= s.nnodes:
        raise BadRequest(f"{s.node_rank} must be less than nnodes ({s.nnodes})", field="node_rank")
    if s.num_gpus % s.nnodes:
        raise BadRequest(f"{s.nnodes} does not divide num_gpus ({s.num_gpus}), the total over nodes", field="nnodes")
    if s.nnodes > 1:
        s.node_address()
    elif s.dist_init_addr is not None:
        raise BadRequest("it has no effect without nnodes above 1", field="dist_init_addr")


def user_path(text: str, param: str) -> Path:
    """Expand `~` and `~name` in a path. Raises BadRequest for text that is no path."""
    if "\0" in text:
        raise BadRequest(f"{shorten(text)} holds a NUL byte, which no path can", field=param)
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise BadRequest(f"{shorten(text)}: there is no such user, so no such home", field=param) from None


def cache_root() -> Path:
    """Return the folder of models made of an overlay and its source: $SGLANG_DIFFUSION_CACHE_ROOT, if set."""
    name = "SGLANG_DIFFUSION_CACHE_ROOT"
    if os.environ.get(name):
        return user_path(os.environ[name], name).absolute()
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME").absolute() / "sgl_diffusion"


def environment(*names: str) -> dict[str, str]:
    """Read the variables among `names` that are set. Other modules see the environment only by this."""
    return {name: os.environ[name] for name in names if name in os.environ}


def set_default_environment(**values: str) -> None:
    """Set what is not set, for libraries that read the environment themselves."""
    for name, value in values.items():
        os.environ.setdefault(name, value)
