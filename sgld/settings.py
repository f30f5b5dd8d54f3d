"""Settings: every knob of the process, in sections. Names are flat for users: `--port`, never `--server.port`."""

from __future__ import annotations

import re
from typing import Any

import attrs

from sgld.convert import Field, Values, fields_of, knob, knob_of, shorten
from sgld.errors import BadRequest
from sgld.params import LORA_TARGETS, MAX_LORA_STRENGTH

DEMO_MODEL = "sgld/demo"
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

    load_encoder: bool = knob(True, "keep the VAE's encoder, where the model has a use for it")
    load_decoder: bool = knob(True, "keep the VAE's decoder", pending="running without a decoder")
    use_tiling: bool | None = knob(None, "the same as vae_tiling")
    tile_sample_min_height: int | None = knob(None, "tile height in pixels", min=16)
    tile_sample_min_width: int | None = knob(None, "tile width in pixels", min=16)
    tile_sample_stride_height: int | None = knob(None, "pixels from tile to tile", min=16)
    tile_sample_stride_width: int | None = knob(None, "pixels from tile to tile", min=16)
    tile_sample_min_num_frames: int | None = knob(None, "tile length in frames", min=1, pending="tiling in time")
    tile_sample_stride_num_frames: int | None = knob(None, "frames from tile to tile", min=1, pending="tiling in time")
    blend_num_frames: int | None = knob(None, "frames blended between tiles", min=0, pending="tiling in time")
    use_temporal_tiling: bool = knob(False, "tile in time too", pending="tiling in time")
    use_parallel_tiling: bool = knob(False, "spread tiles over the workers", pending="parallel decode")
    use_parallel_decode: bool | None = knob(None, "the same as vae_sp")
    parallel_decode_mode: str | None = knob(
        None,
        "how to split the decode",
        choices=("tiled", "patch", "spatial_shard", "spatial", "auto"),
        pending="splitting the decode by patches",
        built=("tiled", "spatial_shard", "spatial", "auto"),
    )


@attrs.frozen
class ModelSettings:
    """What runs: the model and its parts."""

    model_path: str = knob(DEMO_MODEL, "local folder or Hugging Face id", aliases=("model",))
    revision: str | None = knob(None, "commit, tag or branch of the repository")
    model_subfolder: str | None = knob(None, "folder inside the repository", pending="model subfolders")
    model_variant: str | None = knob(None, "weights variant, such as fp16", pending="weight variants")
    served_model_name: str | None = knob(
        None, "model id shown by the server", serve_only=True, shown_default="model-path"
    )
    component_paths: dict[str, str] = knob(
        {}, "folder for a component, as in --vae-path; its key must stand in model_index.json"
    )
    dmd_denoising_steps: list[int] | None = knob(
        None,
        "times of a few-step model's steps, falling, as in 1000,757,522; any Wan checkpoint then runs as one",
        min=1,
        max=1000,
        shown_default="the model's own",
    )
    transformer_weights_path: str | None = knob(None, "quantized transformer weights", pending="quantized weights")
    quantization: str | None = knob(None, "quantize weights while loading", pending="quantized weights")
    backend: str = knob(
        "auto",
        "native code, or a diffusers pipeline; auto takes native code where there is some; sglang is native",
        choices=("auto", "native", "diffusers"),
        synonyms={"sglang": "native"},
    )
    trust_remote_code: bool = knob(False, "run a repository's own code")
    model_overlay_registry: str | None = knob(
        None,
        "JSON object, or a file of one: the overlay repository of each source repository of raw files",
        env="SGLANG_DIFFUSION_MODEL_OVERLAY_REGISTRY",
    )


@attrs.frozen
class ParallelSettings:
    """Workers, and what they share."""

    num_gpus: int = knob(1, "workers: one a GPU, or that many processes on a CPU", min=1, max=1024)
    tp_size: int = knob(1, "workers that share the layers of the text encoder", min=1)
    sp_degree: int | None = knob(
        None,
        "workers that share one sequence: ulysses-degree x ring-degree",
        aliases=("sp_size",),
        min=1,
        shown_default="all, or half with enable-cfg-parallel",
    )
    ulysses_degree: int | None = knob(
        None, "workers that split attention heads", min=1, shown_default="as many as share the heads evenly"
    )
    ring_degree: int | None = knob(
        None, "workers that pass keys and values around", min=1, shown_default="what ulysses-degree leaves"
    )
    enable_cfg_parallel: bool | None = knob(
        None,
        "the prompt and the negative prompt on different workers",
        shown_default="yes if the model uses guidance, num-gpus is even and no other degree is given",
    )
    worker_retries: int = knob(0, "times that an output is tried again when a worker dies under it", min=0, max=10)
    worker_start: str = knob(
        "forkserver",
        "start workers by forking a process that has imported torch once, or each as a new interpreter",
        choices=("forkserver", "spawn"),
        env="SGLANG_DIFFUSION_WORKER_START",
    )
    dist_timeout: int = knob(3600, "seconds until a collective gives up", min=1)
    nnodes: int = knob(1, "machines that share the workers evenly", min=1, max=1024)
    node_rank: int = knob(
        0, "number of this machine; 0 takes the requests, `sgld serve` on the others follows it", min=0
    )
    dist_init_addr: str | None = knob(
        None, "host:port of machine 0, where the others find it", shown_default="none with one machine"
    )

    def node_address(self) -> tuple[str, int]:
        """Split `dist_init_addr` into host and port. Raises BadRequest where there is none."""
        if self.dist_init_addr is None:
            raise BadRequest("it is required when nnodes > 1", field="dist_init_addr")
        found = _ADDRESS.fullmatch(self.dist_init_addr)
        if not found or found[1] == "0.0.0.0" or not 0 < int(found[2]) < 2**16:
            reason = f"{shorten(self.dist_init_addr)} is no host:port that all nodes can reach, such as 10.0.0.1:29500"
            raise BadRequest(reason, field="dist_init_addr")
        return found[1], int(found[2])


@attrs.frozen
class DtypeSettings:
    """Data types of the weights."""

    precision: str | None = knob(
        None,
        "precision of every component that has none of its own",
        choices=DTYPES,
        shown_default="fp32 on a CPU, bf16 on CUDA",
    )
    dit_precision: str | None = knob(
        None, "precision of the diffusion transformer", choices=DTYPES, shown_default="precision"
    )
    vae_precision: str | None = knob(
        None, "precision of the VAE", choices=DTYPES, shown_default="fp32; of a diffusers pipeline, precision"
    )
    text_encoder_precisions: list[str] | None = knob(
        None, "precision of each text encoder", choices=DTYPES, shown_default="precision"
    )


@attrs.frozen
class AttentionSettings:
    """Attention kernels, and what speeds up the transformer."""

    attention_backend: str | None = knob(
        None,
        "attention kernel",
        choices=DENSE_ATTENTION + SPARSE_ATTENTION + DIFFUSERS_ATTENTION_BACKENDS,
        shown_default="fa where it can run, else torch_sdpa",
        pending="sparse attention",
        built=DENSE_ATTENTION + DIFFUSERS_ATTENTION_BACKENDS,
    )
    component_attention_backends: dict[str, str] = knob(
        {},
        "attention kernel of a component, or of a transformer's attention to itself or to the text, as in "
        "transformer=fa,transformer.cross=torch_sdpa",
    )
    attention_backend_config: Values | None = knob(None, "settings of the attention kernel; those that stand have none")
    diffusers_attention_backend: str | None = knob(
        None, "attention kernel of a diffusers pipeline", choices=DIFFUSERS_ATTENTION_BACKENDS, shown_default="native"
    )
    mask_strategy_file_path: str | None = knob(
        None, "mask file of sliding tile attention", pending="sliding tile attention"
    )
    cache_dit_config: str | None = knob(None, "Cache-DiT file of a diffusers pipeline", pending="step caching")
    enable_torch_compile: bool = knob(False, "compile the transformer with torch.compile", pending="torch.compile")


@attrs.frozen
class MemorySettings:
    """Offload of weights, and decoding piece by piece."""

    text_encoder_cpu_offload: bool = knob(
        False, "keep text encoders in host memory between uses; on a CPU, in their files"
    )
    image_encoder_cpu_offload: bool = knob(False, "the same for the image encoder")
    dit_cpu_offload: bool = knob(False, "the same for the transformer")
    vae_cpu_offload: bool = knob(False, "the same for the VAE")
    dit_layerwise_offload: bool = knob(
        False, "the same for the transformer, and while it works two of its blocks at a time"
    )
    pin_cpu_memory: bool = knob(True, "pin host memory of offloaded weights, for faster copies to a GPU")
    vae_tiling: bool | None = knob(None, "decode large outputs tile by tile", shown_default="as the model's authors do")
    vae_slicing: bool = knob(False, "decode one output at a time; native models always do")
    vae_sp: bool = knob(False, "decode on all workers, each some rows or tiles of the pictures")
    vae_config: VaeConfig = knob(VaeConfig(), "settings of the VAE")

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
class LoraSettings:
    """Adapters that hold from the start."""

    lora_path: list[str] | None = knob(
        None, "LoRA adapters that hold from the start: file, folder, Hugging Face id, or id:file"
    )
    lora_nickname: list[str] | None = knob(None, "name of each adapter", shown_default="default, default_2 and so on")
    lora_scale: list[float] | None = knob(
        None, "strength of all adapters, or of each", shown_default="1", min=-MAX_LORA_STRENGTH, max=MAX_LORA_STRENGTH
    )
    lora_target: list[str] | None = knob(
        None, "part of the model that all adapters change, or that each does", shown_default="all", choices=LORA_TARGETS
    )


@attrs.frozen
class ServerSettings:
    """The HTTP server and its queue."""

    host: str = knob("127.0.0.1", "address to listen on", serve_only=True)
    port: int = knob(30010, "port to listen on; 0 takes any free one", serve_only=True, min=0, max=65535)
    warmup: str = knob(
        "server",
        "one generation before the server says healthy",
        serve_only=True,
        choices=("server", "off"),
        aliases=("warmup_mode",),
    )
    api_key: str | None = knob(
        None, "key that clients must send; it may do everything", serve_only=True, secret=True, env="SGLANG_API_KEY"
    )
    api_key_file: str | None = knob(
        None, "YAML file of keys: a name for each, its key and its tier (user or admin)", serve_only=True
    )
    allow_unauthenticated: bool = knob(False, "listen beyond this machine without any key", serve_only=True)
    max_queue: int = knob(64, "jobs that may wait; one more is refused with 429", serve_only=True, min=1, max=100_000)
    job_ttl: int = knob(
        604_800,
        "seconds until a finished job, its files and its uploads are removed; 0 keeps them",
        serve_only=True,
        min=0,
    )
    ephemeral: bool = knob(False, "keep no journal: jobs are forgotten when the server stops", serve_only=True)
    shutdown_timeout: int = knob(
        30,
        "seconds that SIGTERM leaves to the running job before it goes back to the journal",
        serve_only=True,
        min=0,
        aliases=("http_graceful_shutdown_timeout",),
    )
    max_request_mb: int = knob(64, "largest request body, uploads included, in MiB", serve_only=True, min=1, max=4096)
    allow_private_urls: bool = knob(
        False, "let requests and webhooks name addresses of private networks", serve_only=True
    )
    enable_metrics: bool = knob(True, "Prometheus metrics at /metrics", serve_only=True)


@attrs.frozen
class StorageSettings:
    """Where results and uploads go."""

    output_path: str = knob("outputs", "folder of the results")
    input_save_path: str = knob("inputs/uploads", "folder of uploaded pictures", serve_only=True)
    cloud_storage_type: str | None = knob(
        None,
        "object storage for results",
        serve_only=True,
        env="SGLANG_CLOUD_STORAGE_TYPE",
        choices=("s3",),
        pending="object storage",
    )
    s3_bucket_name: str | None = knob(
        None, "bucket", serve_only=True, env="SGLANG_S3_BUCKET_NAME", pending="object storage"
    )
    s3_endpoint_url: str | None = knob(
        None, "endpoint other than AWS", serve_only=True, env="SGLANG_S3_ENDPOINT_URL", pending="object storage"
    )
    s3_access_key_id: str | None = knob(
        None, "access key", serve_only=True, secret=True, env="SGLANG_S3_ACCESS_KEY_ID", pending="object storage"
    )
    s3_secret_access_key: str | None = knob(
        None, "secret key", serve_only=True, secret=True, env="SGLANG_S3_SECRET_ACCESS_KEY", pending="object storage"
    )


@attrs.frozen
class LoggingSettings:
    """The log."""

    log_level: str = knob(
        "info", "least level that is logged; debug adds tracebacks", choices=("debug", "info", "warning", "error")
    )
    log_format: str = knob("text", "lines for people, or one JSON object a line", choices=("text", "json"))


@attrs.frozen
class Settings:
    """What one process runs: model, workers, server. Requests bring `SamplingParams`."""

    model: ModelSettings = attrs.field(factory=ModelSettings)
    parallel: ParallelSettings = attrs.field(factory=ParallelSettings)
    dtypes: DtypeSettings = attrs.field(factory=DtypeSettings)
    attention: AttentionSettings = attrs.field(factory=AttentionSettings)
    memory: MemorySettings = attrs.field(factory=MemorySettings)
    lora: LoraSettings = attrs.field(factory=LoraSettings)
    server: ServerSettings = attrs.field(factory=ServerSettings)
    storage: StorageSettings = attrs.field(factory=StorageSettings)
    logging: LoggingSettings = attrs.field(factory=LoggingSettings)

    @classmethod
    def of(cls, **values: object) -> Settings:
        """Build settings from values under the flat names of the knobs."""
        return cls().evolve(**values)

    def evolve(self, **values: object) -> Settings:
        """Copy the settings with other values, given by flat names."""
        sections = {section_of(name): Values() for name in values}
        for name, value in values.items():
            sections[section_of(name)][name] = value
        changed = {section: attrs.evolve(getattr(self, section), **new) for section, new in sections.items()}
        return attrs.evolve(self, **changed)

    def get(self, name: str) -> Any:
        """Return the value of a knob by its flat name."""
        return getattr(getattr(self, section_of(name)), name)

    def flat(self) -> Values:
        """Map the flat name of every knob to its value."""
        return {name: self.get(name) for name in settings_fields()}


SECTION_CLASSES: dict[str, type] = {name: cls for name, field in fields_of(Settings).items() if (cls := field.type)}
TITLES: dict[type, str] = {cls: name for name, cls in SECTION_CLASSES.items()}
"""Titles of the sections in `--help`."""
TITLES |= {ParallelSettings: "parallelism", DtypeSettings: "precision", LoraSettings: "LoRA"}
_SECTIONS = {name: section for section, cls in SECTION_CLASSES.items() for name in fields_of(cls)}


def section_of(name: str) -> str:
    """Return the section of a knob. Raises KeyError for a name that is no knob of `Settings`."""
    return _SECTIONS[name]


def settings_fields() -> dict[str, Field]:
    """Map the flat name of every knob of `Settings` to its field."""
    return {name: field for cls in SECTION_CLASSES.values() for name, field in fields_of(cls).items()}


def without_secrets(settings: Settings) -> Settings:
    """Drop the secrets, for workers that may be on another machine."""
    return settings.evolve(**{name: None for name, field in settings_fields().items() if knob_of(field).secret})


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
