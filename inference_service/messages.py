"""What server and model process say to each other over their pipe. Plain data, importable without torch.

Every command is a task with an id and ends with exactly one `Ended`; other messages of a task come before it.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Literal


@dataclass(frozen=True, slots=True)
class Options:
    """How a model process runs."""

    device: str
    threads: int
    max_loaded: int
    memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What the model process has to know to load a model."""

    model_id: str
    directory: str
    dtype: Literal["float32", "float16", "bfloat16"]
    size_multiple: int
    default_width: int
    default_height: int


@dataclass(frozen=True, slots=True)
class Load:
    """Load a model and keep it."""

    task_id: int
    model: ModelFiles


@dataclass(frozen=True, slots=True)
class Unload:
    """Free what a model holds."""

    task_id: int
    model_id: str


@dataclass(frozen=True, slots=True)
class ImageRun:
    """Make pictures; every value resolved and inside the model's limits."""

    task_id: int
    model: ModelFiles
    prompt: str
    negative_prompt: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    seed: int
    image_count: int
    format: Literal["png", "webp"]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop a task within one step. A task that has ended is none of its business."""

    task_id: int


Task = Load | Unload | ImageRun
Command = Task | Cancel


class FailureKind(Enum):
    """Why a task did not come to its end."""

    CANCELLED = "cancelled"
    OUT_OF_MEMORY = "out_of_memory"
    OUTPUT_INVALID = "output_invalid"
    MODEL_FAILED = "model_failed"
    PROCESS_LOST = "process_lost"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a task failed; `detail` is for the log, never for callers."""

    kind: FailureKind
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Ready:
    """The process takes tasks; models run on `device`."""

    device: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """The models in memory from now on."""

    model_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Started:
    """The model of a run is in memory and begins."""

    task_id: int


@dataclass(frozen=True, slots=True)
class Step:
    """A step is done: `step` counts over all pictures of the run, `done_time` is Unix time."""

    task_id: int
    step: int
    seconds: float
    done_time: float


@dataclass(frozen=True, slots=True)
class PreviewPicture:
    """What the picture looks like so far."""

    task_id: int
    jpeg: bytes
    blurhash: str


@dataclass(frozen=True, slots=True)
class Encoding:
    """All steps are done, the last picture is being encoded."""

    task_id: int


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A picture as a file."""

    body: bytes
    content_type: str
    suffix: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Picture:
    """A finished picture of a run."""

    task_id: int
    index: int
    image: EncodedImage
    thumbnail: EncodedImage
    blurhash: str


@dataclass(frozen=True, slots=True)
class Ended:
    """Nothing more comes of a task."""

    task_id: int
    failure: Failure | None = None
    steps_done: int = 0
    pipeline_s: float = 0.0


RunMessage = Started | Step | PreviewPicture | Encoding | Picture
Message = Ready | Loaded | RunMessage | Ended
