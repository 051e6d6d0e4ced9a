"""The model catalogue: which models there are, their defaults, limits and prices, read from one YAML file.

Typed and checked at start. Everything the service knows of a model before it loads it stands here; weights are read from no
other place than the paths of this file.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

MODEL_ID = r"^[a-z0-9][a-z0-9._-]{0,63}$"  # as ImageSpec.model in jobs.proto
SIZE_MAX = 4096  # ImageSpec.width, ImageSpec.height
STEPS_MAX = 1000  # ImageSpec.steps
GUIDANCE_SCALE_MAX = 50.0  # ImageSpec.guidance_scale

INDEX_FILE = "model_index.json"  # what makes a directory a diffusers pipeline


class CatalogueError(Exception):
    """The catalogue file cannot be used; the message says where and why."""


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _no_control_characters(value: str) -> str:
    if re.search(r"[\x00-\x1f\x7f]", value):
        raise ValueError("must not contain control characters")
    return value


Label = Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_no_control_characters)]
Size = Annotated[int, Field(ge=1, le=SIZE_MAX)]
Steps = Annotated[int, Field(ge=1, le=STEPS_MAX)]


class Defaults(_Entry):
    """What a spec gets where it says nothing."""

    width: Size
    height: Size
    steps: Steps
    guidance_scale: float = Field(ge=0, le=GUIDANCE_SCALE_MAX, allow_inf_nan=False)


class Limits(_Entry):
    """What a spec may ask for. Sizes in pixels."""

    min_size: Size
    max_size: Size
    size_multiple: Size
    max_steps: Steps

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_size > self.max_size:
            raise ValueError("min_size is larger than max_size")
        for name, size in (("min_size", self.min_size), ("max_size", self.max_size)):
            if size % self.size_multiple:
                raise ValueError(f"{name} is not a multiple of size_multiple")
        return self

    def size_problem(self, size: int) -> str | None:
        """Why a width or height cannot be made, or None."""
        if not self.min_size <= size <= self.max_size:
            return f"must be {self.min_size} to {self.max_size}"
        if size % self.size_multiple:
            return f"must be a multiple of {self.size_multiple}"
        return None

    def steps_problem(self, steps: int) -> str | None:
        """Why a number of steps cannot be made, or None."""
        return None if 1 <= steps <= self.max_steps else f"must be 1 to {self.max_steps}"


class Price(_Entry):
    """What a model costs."""

    step_millicredits: int = Field(ge=0, le=10**12)


class Model(_Entry):
    """One model: a directory in the layout of diffusers, with safetensors weights."""

    id: str = Field(pattern=MODEL_ID)
    display_name: Label
    kind: Literal["image"]
    path: Path
    default: bool = False
    preload: bool = False
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    license: Label
    pool: str = Field("default", pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")
    defaults: Defaults
    limits: Limits
    price: Price

    @field_validator("path")
    @classmethod
    def _is_a_pipeline(cls, path: Path, info: ValidationInfo) -> Path:
        """Relative paths start at the catalogue's own directory."""
        directory = (Path(info.context["directory"]) / path).resolve() if info.context else path
        if not (directory / INDEX_FILE).is_file():
            raise ValueError(f"{directory} is not a model directory: it has no {INDEX_FILE}")
        return directory

    @model_validator(mode="after")
    def _defaults_are_allowed(self) -> Self:
        for name in ("width", "height"):
            if problem := self.limits.size_problem(getattr(self.defaults, name)):
                raise ValueError(f"defaults.{name} {problem}")
        if problem := self.limits.steps_problem(self.defaults.steps):
            raise ValueError(f"defaults.steps {problem}")
        return self


class Catalogue(_Entry):
    """All models, in the order of the file."""

    models: tuple[Model, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _ids_and_defaults(self) -> Self:
        ids = [model.id for model in self.models]
        if twice := sorted({name for name in ids if ids.count(name) > 1}):
            raise ValueError(f"two models have the id {', '.join(twice)}")
        for kind in {model.kind for model in self.models}:
            defaults = [model.id for model in self.models if model.kind == kind and model.default]
            if len(defaults) != 1:
                raise ValueError(f"kind {kind} needs exactly one model with `default: true`, not {len(defaults)}")
        return self

    @classmethod
    def read(cls, file: Path) -> Self:
        """The catalogue of a file. Raises CatalogueError with every problem found."""
        try:
            content: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise CatalogueError(f"{file}: {error.strerror or error}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise CatalogueError(f"{file} is not YAML: {error}") from error
        try:
            return cls.model_validate(content, context={"directory": file.resolve().parent})
        except ValidationError as error:
            raise CatalogueError("; ".join(_problems(file, error))) from error

    def find(self, model_id: str) -> Model | None:
        """The model with this id, or None."""
        return next((model for model in self.models if model.id == model_id), None)

    def default(self, kind: Literal["image"]) -> Model | None:
        """The model for specs of a kind that name none."""
        return next((model for model in self.models if model.kind == kind and model.default), None)

    @property
    def preloaded(self) -> tuple[Model, ...]:
        """Models that are loaded before the service says it is ready."""
        return tuple(model for model in self.models if model.preload)


def _problems(file: Path, error: ValidationError) -> Iterable[str]:
    for problem in error.errors(include_url=False, include_input=False):
        place = ".".join(str(part) for part in problem["loc"])
        yield f"{file}: {place + ': ' if place else ''}{problem['msg']}"
