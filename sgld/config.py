"""Settings: every knob of the process. The only module that reads `os.environ`."""

from __future__ import annotations

import itertools
import os
import re
import typing
from collections.abc import Mapping
from pathlib import Path

import attrs

from sgld.convert import Kind, Values, fields_of, knob, knob_of, shorten, structure
from sgld.errors import BadRequest, NotBuilt, nearest
from sgld.params import LORA_TARGETS, MAX_LORA_STRENGTH, MAX_LORAS, SamplingParams

DEMO_MODEL = "sgld/demo"
MODEL, PARALLEL, PRECISION, ATTENTION, MEMORY, LORA, SERVER, STORAGE, LOGGING = (
    "model",
    "parallelism",
    "precision",
    "attention",
    "memory",
    "LoRA",
    "server",
    "storage",
    "logging",
)
_ADDRESS = re.compile(r"([^:\s]+):([0-9]{1,5})")  # IPv4 or a name
DTYPES = ("fp32", "fp16", "bf16")
DENSE_ATTENTION = ("torch_sdpa", "fa", "fa2", "fa3", "fa4", "torch_cudnn_sdpa", "sage_attn", "sage_attn_3", "aiter")
SPARSE_ATTENTION = (
    "sliding_tile_attn", "video_sparse_attn", "sparse_video_gen_2_attn", "vmoba_attn", "sla_attn",
)  # fmt: skip
ATTENTION_ROLES = ("self", "cross")  # of a transformer: to its own tokens, and to the text's
DIFFUSERS_ATTENTION_BACKENDS = ("flash", "_flash_3_hub", "sage", "xformers", "native")
TRANSFORMERS = ("transformer", "transformer_2")
COMPONENTS = (
    *TRANSFORMERS,
    "vae",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "text_encoder_4",
    "tokenizer",
    "tokenizer_2",
    "tokenizer_3",
    "tokenizer_4",
    "scheduler",
    "image_encoder",
    "image_processor",
    "feature_extractor",
    "audio_vae",
    "vocoder",
    "connectors",
    "unet",
    "controlnet",
    "safety_checker",
    "movq",
    "processor",
)


@attrs.frozen
class VaeConfig:
    """Fields of `vae_config`, by the names of the replaced system."""

    load_encoder: bool = knob(True, "keep the VAE's encoder, where the model has a use for it", group=MEMORY)
    load_decoder: bool = knob(True, "keep the VAE's decoder", group=MEMORY, pending="running without a decoder")
    use_tiling: bool | None = knob(None, "the same as vae_tiling", group=MEMORY)
    tile_sample_min_height: int | None = knob(None, "tile height in pixels", group=MEMORY, min=16)
    tile_sample_min_width: int | None = knob(None, "tile width in pixels", group=MEMORY, min=16)
    tile_sample_stride_height: int | None = knob(None, "pixels from tile to tile", group=MEMORY, min=16)
    tile_sample_stride_width: int | None = knob(None, "pixels from tile to tile", group=MEMORY, min=16)
    tile_sample_min_num_frames: int | None = knob(
        None, "tile length in frames", group=MEMORY, min=1, pending="tiling in time"
    )
    tile_sample_stride_num_frames: int | None = knob(
        None, "frames from tile to tile", group=MEMORY, min=1, pending="tiling in time"
    )
    blend_num_frames: int | None = knob(
        None, "frames blended between tiles", group=MEMORY, min=0, pending="tiling in time"
    )
    use_temporal_tiling: bool = knob(False, "tile in time too", group=MEMORY, pending="tiling in time")
    use_parallel_tiling: bool = knob(False, "spread tiles over the workers", group=MEMORY, pending="parallel decode")
    use_parallel_decode: bool | None = knob(None, "the same as vae_sp", group=MEMORY)
    parallel_decode_mode: str | None = knob(
        None,
        "how to split the decode",
        group=MEMORY,
        choices=("tiled", "patch", "spatial_shard", "spatial", "auto"),
        pending="splitting the decode by patches",
        built=("tiled", "spatial_shard", "spatial", "auto"),
    )


@attrs.frozen
class Settings:
    """What one process runs: model, workers, server. Requests bring `SamplingParams`."""

    model_path: str = knob(DEMO_MODEL, "local folder or Hugging Face id", group=MODEL, aliases=("model",))
    revision: str | None = knob(None, "commit, tag or branch of the repository", group=MODEL)
    model_subfolder: str | None = knob(None, "folder inside the repository", group=MODEL, pending="model subfolders")
    model_variant: str | None = knob(None, "weights variant, such as fp16", group=MODEL, pending="weight variants")
    served_model_name: str | None = knob(
        None, "model id shown by the server", group=MODEL, serve_only=True, shown_default="model-path"
    )
    component_paths: dict[str, str] = knob(
        {}, "folder for a component, as in --vae-path; its key must stand in model_index.json", group=MODEL
    )
    dmd_denoising_steps: list[int] | None = knob(
        None,
        "times of a few-step model's steps, falling, as in 1000,757,522; any Wan checkpoint then runs as one",
        group=MODEL,
        min=1,
        max=1000,
        shown_default="the model's own",
    )
    transformer_weights_path: str | None = knob(
        None, "quantized transformer weights", group=MODEL, pending="quantized weights"
    )
    quantization: str | None = knob(None, "quantize weights while loading", group=MODEL, pending="quantized weights")
    backend: str = knob(
        "auto",
        "native code, or a diffusers pipeline; auto takes native code where there is some; sglang is native",
        group=MODEL,
        choices=("auto", "native", "diffusers"),
        synonyms={"sglang": "native"},
    )
    trust_remote_code: bool = knob(False, "run a repository's own code", group=MODEL)
    model_overlay_registry: str | None = knob(
        None,
        "JSON object, or a file of one: the overlay repository of each source repository of raw files",
        group=MODEL,
        env="SGLANG_DIFFUSION_MODEL_OVERLAY_REGISTRY",
    )

    num_gpus: int = knob(1, "workers: one a GPU, or that many processes on a CPU", group=PARALLEL, min=1, max=1024)
    tp_size: int = knob(1, "workers that share the layers of the text encoder", group=PARALLEL, min=1)
    sp_degree: int | None = knob(
        None,
        "workers that share one sequence: ulysses-degree x ring-degree",
        group=PARALLEL,
        aliases=("sp_size",),
        min=1,
        shown_default="all, or half with enable-cfg-parallel",
    )
    ulysses_degree: int | None = knob(
        None,
        "workers that split attention heads",
        group=PARALLEL,
        min=1,
        shown_default="as many as share the heads evenly",
    )
    ring_degree: int | None = knob(
        None, "workers that pass keys and values around", group=PARALLEL, min=1,
        shown_default="what ulysses-degree leaves",
    )  # fmt: skip
    enable_cfg_parallel: bool | None = knob(
        None, "the prompt and the negative prompt on different workers", group=PARALLEL,
        shown_default="yes if the model uses guidance, num-gpus is even and no other degree is given",
    )  # fmt: skip
    worker_retries: int = knob(
        0, "times that an output is tried again when a worker dies under it", group=PARALLEL, min=0, max=10
    )
    worker_start: str = knob(
        "forkserver",
        "start workers by forking a process that has imported torch once, or each as a new interpreter",
        group=PARALLEL,
        choices=("forkserver", "spawn"),
        env="SGLANG_DIFFUSION_WORKER_START",
    )
    dist_timeout: int = knob(3600, "seconds until a collective gives up", group=PARALLEL, min=1)
    nnodes: int = knob(1, "machines that share the workers evenly", group=PARALLEL, min=1, max=1024)
    node_rank: int = knob(
        0, "number of this machine; 0 takes the requests, `sgld serve` on the others follows it", group=PARALLEL, min=0
    )
    dist_init_addr: str | None = knob(
        None, "host:port of machine 0, where the others find it", group=PARALLEL, shown_default="none with one machine"
    )

    precision: str | None = knob(
        None,
        "precision of every component that has none of its own",
        group=PRECISION,
        choices=DTYPES,
        shown_default="fp32 on a CPU, bf16 on CUDA",
    )
    dit_precision: str | None = knob(
        None, "precision of the diffusion transformer", group=PRECISION, choices=DTYPES, shown_default="precision"
    )
    vae_precision: str | None = knob(
        None,
        "precision of the VAE",
        group=PRECISION,
        choices=DTYPES,
        shown_default="fp32; of a diffusers pipeline, precision",
    )
    text_encoder_precisions: list[str] | None = knob(
        None, "precision of each text encoder", group=PRECISION, choices=DTYPES, shown_default="precision"
    )

    attention_backend: str | None = knob(
        None,
        "attention kernel",
        group=ATTENTION,
        choices=DENSE_ATTENTION + SPARSE_ATTENTION + DIFFUSERS_ATTENTION_BACKENDS,
        shown_default="fa where it can run, else torch_sdpa",
        pending="sparse attention",
        built=DENSE_ATTENTION + DIFFUSERS_ATTENTION_BACKENDS,
    )
    component_attention_backends: dict[str, str] = knob(
        {},
        "attention kernel of a component, or of a transformer's attention to itself or to the text, as in "
        "transformer=fa,transformer.cross=torch_sdpa",
        group=ATTENTION,
    )
    attention_backend_config: Values | None = knob(
        None, "settings of the attention kernel; those that stand have none", group=ATTENTION
    )
    diffusers_attention_backend: str | None = knob(
        None,
        "attention kernel of a diffusers pipeline",
        group=ATTENTION,
        choices=DIFFUSERS_ATTENTION_BACKENDS,
        shown_default="native",
    )
    mask_strategy_file_path: str | None = knob(
        None, "mask file of sliding tile attention", group=ATTENTION, pending="sliding tile attention"
    )
    cache_dit_config: str | None = knob(
        None, "Cache-DiT file of a diffusers pipeline", group=ATTENTION, pending="step caching"
    )
    enable_torch_compile: bool = knob(
        False, "compile the transformer with torch.compile", group=ATTENTION, pending="torch.compile"
    )

    text_encoder_cpu_offload: bool = knob(
        False, "keep text encoders in host memory between uses; on a CPU, in their files", group=MEMORY
    )
    image_encoder_cpu_offload: bool = knob(False, "the same for the image encoder", group=MEMORY)
    dit_cpu_offload: bool = knob(False, "the same for the transformer", group=MEMORY)
    vae_cpu_offload: bool = knob(False, "the same for the VAE", group=MEMORY)
    dit_layerwise_offload: bool = knob(
        False, "the same for the transformer, and while it works two of its blocks at a time", group=MEMORY
    )
    pin_cpu_memory: bool = knob(True, "pin host memory of offloaded weights, for faster copies to a GPU", group=MEMORY)
    vae_tiling: bool | None = knob(
        None, "decode large outputs tile by tile", group=MEMORY, shown_default="as the model's authors do"
    )
    vae_slicing: bool = knob(False, "decode one output at a time; native models always do", group=MEMORY)
    vae_sp: bool = knob(False, "decode on all workers, each some rows or tiles of the pictures", group=MEMORY)
    vae_config: VaeConfig = knob(VaeConfig(), "settings of the VAE", group=MEMORY)

    lora_path: list[str] | None = knob(
        None, "LoRA adapters that hold from the start: file, folder, Hugging Face id, or id:file", group=LORA
    )
    lora_nickname: list[str] | None = knob(
        None, "name of each adapter", group=LORA, shown_default="default, default_2 and so on"
    )
    lora_scale: list[float] | None = knob(
        None, "strength of all adapters, or of each", group=LORA, shown_default="1", min=-MAX_LORA_STRENGTH,
        max=MAX_LORA_STRENGTH,
    )  # fmt: skip
    lora_target: list[str] | None = knob(
        None, "part of the model that all adapters change, or that each does", group=LORA, shown_default="all",
        choices=LORA_TARGETS,
    )  # fmt: skip

    host: str = knob("127.0.0.1", "address to listen on", group=SERVER, serve_only=True)
    port: int = knob(30010, "port to listen on; 0 takes any free one", group=SERVER, serve_only=True, min=0, max=65535)
    warmup: str = knob(
        "server",
        "one generation before the server says healthy",
        group=SERVER,
        serve_only=True,
        choices=("server", "off"),
        aliases=("warmup_mode",),
    )

    api_key: str | None = knob(
        None, "key that clients must send; it may do everything", group=SERVER, serve_only=True, secret=True,
        env="SGLANG_API_KEY",
    )  # fmt: skip
    api_key_file: str | None = knob(
        None, "YAML file of keys: a name for each, its key and its tier (user or admin)", group=SERVER, serve_only=True
    )
    allow_unauthenticated: bool = knob(
        False, "listen beyond this machine without any key", group=SERVER, serve_only=True
    )
    max_queue: int = knob(
        64, "jobs that may wait; one more is refused with 429", group=SERVER, serve_only=True, min=1, max=100_000
    )
    job_ttl: int = knob(
        604_800, "seconds until a finished job, its files and its uploads are removed; 0 keeps them", group=SERVER,
        serve_only=True, min=0,
    )  # fmt: skip
    ephemeral: bool = knob(
        False, "keep no journal: jobs are forgotten when the server stops", group=SERVER, serve_only=True
    )
    shutdown_timeout: int = knob(
        30, "seconds that SIGTERM leaves to the running job before it goes back to the journal", group=SERVER,
        serve_only=True, min=0, aliases=("http_graceful_shutdown_timeout",),
    )  # fmt: skip
    max_request_mb: int = knob(
        64, "largest request body, uploads included, in MiB", group=SERVER, serve_only=True, min=1, max=4096
    )
    allow_private_urls: bool = knob(
        False, "let requests and webhooks name addresses of private networks", group=SERVER, serve_only=True
    )
    enable_metrics: bool = knob(True, "Prometheus metrics at /metrics", group=SERVER, serve_only=True)

    output_path: str = knob("outputs", "folder of the results", group=STORAGE)
    input_save_path: str = knob("inputs/uploads", "folder of uploaded pictures", group=STORAGE, serve_only=True)
    cloud_storage_type: str | None = knob(
        None,
        "object storage for results",
        group=STORAGE,
        serve_only=True,
        env="SGLANG_CLOUD_STORAGE_TYPE",
        choices=("s3",),
        pending="object storage",
    )
    s3_bucket_name: str | None = knob(
        None, "bucket", group=STORAGE, serve_only=True, env="SGLANG_S3_BUCKET_NAME", pending="object storage"
    )
    s3_endpoint_url: str | None = knob(
        None,
        "endpoint other than AWS",
        group=STORAGE,
        serve_only=True,
        env="SGLANG_S3_ENDPOINT_URL",
        pending="object storage",
    )
    s3_access_key_id: str | None = knob(
        None,
        "access key",
        group=STORAGE,
        serve_only=True,
        secret=True,
        env="SGLANG_S3_ACCESS_KEY_ID",
        pending="object storage",
    )
    s3_secret_access_key: str | None = knob(
        None,
        "secret key",
        group=STORAGE,
        serve_only=True,
        secret=True,
        env="SGLANG_S3_SECRET_ACCESS_KEY",
        pending="object storage",
    )

    log_level: str = knob(
        "info",
        "least level that is logged; debug adds tracebacks",
        group=LOGGING,
        choices=("debug", "info", "warning", "error"),
    )
    log_format: str = knob(
        "text", "lines for people, or one JSON object a line", group=LOGGING, choices=("text", "json")
    )

    def node_address(self) -> tuple[str, int]:
        """Split `dist_init_addr` into host and port. Raises BadRequest where there is none."""
        if self.dist_init_addr is None:
            raise BadRequest("it is required when nnodes > 1", field="dist_init_addr")
        found = _ADDRESS.fullmatch(self.dist_init_addr)
        if not found or found[1] == "0.0.0.0" or not 0 < int(found[2]) < 2**16:
            told = f"{shorten(self.dist_init_addr)} is no host:port that all nodes can reach, such as 10.0.0.1:29500"
            raise BadRequest(f"{told}", field="dist_init_addr")
        return found[1], int(found[2])

    def tiles(self, by_default: bool = False) -> bool:
        """Decide if the VAE works tile by tile; `by_default` is the model's own choice.

        Raises:
            BadRequest: it does not, but sizes of tiles are given.
        """
        vae = self.vae_config
        asked = vae.use_tiling if self.vae_tiling is None else self.vae_tiling
        tiled = by_default if asked is None else asked
        for name in ("min_height", "min_width", "stride_height", "stride_width"):
            if not tiled and getattr(vae, f"tile_sample_{name}") is not None:
                path = f"vae_config.tile_sample_{name}"
                raise BadRequest("it has no effect without vae_tiling", field=path)
        return tiled

    @property
    def parallel_decode(self) -> bool:
        """Check that several workers decode together."""
        return self.vae_sp or bool(self.vae_config.use_parallel_decode)


@attrs.frozen
class RunOptions:
    """What only `sgld generate` knows: files in, files out."""

    prompt_path: str | None = knob(None, "text file with one prompt a line", group="files")
    output_file_name: str | None = knob(
        None,
        "name as you want it; its extension decides the format",
        group="files",
        shown_default="from prompt, time and seed",
    )
    output_file_path: str | None = knob(None, "folder and name in one", group="files")
    overwrite: bool = knob(False, "replace an existing file", group="files")
    save_output: bool = knob(True, "write the result; false only measures", group="files")
    return_frames: bool = knob(False, "write raw frames u8 [N,H,W,3] as .npy instead of an encoded file", group="files")
    return_file_paths_only: bool = knob(True, "print paths only; the replaced system's name, always so", group="files")
    data_type: str | None = knob(
        None,
        "make a video or an image",
        group="files",
        choices=("video", "image"),
        shown_default="by extension, then by the number of frames",
    )
    json: bool = knob(False, "print one JSON object per output instead of its path", group="files")
    perf_dump_path: str | None = knob(
        None, "write milliseconds per stage and step, and peak memory, as JSON", group="debugging"
    )


SECTIONS: tuple[type, ...] = (Settings, SamplingParams, RunOptions)
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
    """Select the merged values that belong to `cls`."""
    return {name: value for name, value in values.items() if SECTION_OF[name] is cls}


def settings_of(values: Mapping[str, object]) -> Settings:
    """Build settings from merged values, and check the rules that tie several fields together."""
    settings = structure(section(values, Settings), Settings)
    _check_degrees(settings)
    _check_nodes(settings)
    _check_tiles(settings)
    _check_loras(settings)
    _check_offload(settings)
    _check_attention(settings)
    _check_steps(settings)
    if settings.vae_config.parallel_decode_mode and not settings.parallel_decode:
        path = "vae_config.parallel_decode_mode"
        raise BadRequest("it has no effect without vae_sp", field=path)
    unknown = [name for name in settings.component_paths if name not in COMPONENTS]
    if unknown:
        raise BadRequest(f"{unknown[0]!r} is no component{nearest(unknown[0], COMPONENTS)}", field="component_paths")
    return settings


def without_secrets(settings: Settings) -> Settings:
    """Drop the secrets, for workers that may be on another machine."""
    secrets: Values = {name: None for name, field in fields_of(Settings).items() if knob_of(field).secret}
    return attrs.evolve(settings, **secrets)


def _check_tiles(settings: Settings) -> None:
    """Check that `vae_tiling` and `vae_config.use_tiling` agree."""
    one, other = settings.vae_config.use_tiling, settings.vae_tiling
    if None not in (one, other) and one != other:
        told = f"{one} contradicts vae_tiling {other}".lower()
        raise BadRequest(f"{told}; leave one out", field="vae_config.use_tiling")


def _check_offload(settings: Settings) -> None:
    """Check that pinning is set only with offloaded weights."""
    flags = [name for name in fields_of(Settings) if name.endswith("_offload")]
    if not settings.pin_cpu_memory and not any(getattr(settings, flag) for flag in flags):
        raise BadRequest(f"false has no effect without one of {', '.join(flags)}", field="pin_cpu_memory")


def _check_attention(settings: Settings) -> None:
    """Check the names of kernels. The worker checks that they can run."""
    known = DENSE_ATTENTION + SPARSE_ATTENTION
    for component, name in settings.component_attention_backends.items():
        path = f"component_attention_backends.{component}"
        if name not in known:
            raise BadRequest(f"{name!r} is not one of {', '.join(known)}{nearest(name, known)}", field=path)
        if name in SPARSE_ATTENTION:
            raise NotBuilt(f"{name} is not built yet in this version of sgld (sparse attention)", field=path)


def _check_steps(settings: Settings) -> None:
    """Check for at least one time, each below the one before."""
    steps = settings.dmd_denoising_steps
    if steps is not None and (not steps or any(a <= b for a, b in itertools.pairwise(steps))):
        shown = ",".join(map(str, steps)) or "none"
        raise BadRequest(f"{shown}: give falling numbers, as in 1000,757,522", field="dmd_denoising_steps")


def _check_loras(settings: Settings) -> None:
    """Check that each adapter has a name of its own, and that strengths and targets are one, or one each."""
    paths, names = settings.lora_path or [], settings.lora_nickname
    if len(paths) > MAX_LORAS:
        raise BadRequest(f"{len(paths)} adapters are too many; at most {MAX_LORAS} are allowed", field="lora_path")
    if "" in paths:
        raise BadRequest("it is empty; name a file, a folder or a Hugging Face id", field="lora_path")
    for name in ("lora_nickname", "lora_scale", "lora_target"):
        given = getattr(settings, name)
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
    s = settings
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
        degree = getattr(s, name)
        if degree is not None and sequence % degree:
            raise BadRequest(f"{degree} workers do not divide {among}", field=name)
    if s.ulysses_degree and s.ring_degree and s.ulysses_degree * s.ring_degree != sequence:
        product = f"{s.ulysses_degree} x ring_degree {s.ring_degree}"
        raise BadRequest(f"{product} workers are not {among}; leave one out{hint}", field="ulysses_degree")
    if s.vae_sp and s.vae_config.use_parallel_decode is False:
        path = "vae_config.use_parallel_decode"
        raise BadRequest("false contradicts vae_sp true; leave one out", field=path)
    if s.num_gpus % s.tp_size:
        raise BadRequest(f"{s.tp_size} does not divide num_gpus ({s.num_gpus})", field="tp_size")


def _check_nodes(settings: Settings) -> None:
    """Check that several machines share the workers evenly, have a number each, and one address to meet."""
    s = settings
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
