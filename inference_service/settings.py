"""Settings of inference_service."""

from pathlib import Path

from pydantic import Field

from inference_service.messages import Options
from servicekit.settings import ObjectSettings, ServerSettings


class InferenceSettings(ServerSettings, ObjectSettings):
    """Settings of `python -m inference_service serve`."""

    models_file: Path = Field(Path("models/catalogue.yaml"), description="Catalogue of models (YAML)")
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d{1,3})?)$",
        description="Where models run: `cpu`, `cuda:0` …; `auto`: the GPU if there is one",
    )
    torch_threads: int = Field(1, ge=1, le=256, description="CPU threads of the model process; more than the idle cores make it slower")
    max_waiting: int = Field(64, ge=0, le=10_000, description="Attempts that may wait for the model; more are refused")
    max_loaded_models: int = Field(2, ge=1, le=100, description="Models in memory at once; the one unused for longest makes room")
    model_memory_bytes: int | None = Field(
        None, ge=2**28, description="Memory the model process may take on a CPU device; what needs more fails alone. Unset: no limit"
    )
    load_timeout_s: float = Field(120.0, gt=0, le=3600, description="How long an attempt waits for the model process to be ready")
    cancel_timeout_s: float = Field(30.0, gt=0, le=3600, description="A model that has not stopped by then after a cancel is killed")

    def model_options(self) -> Options:
        """What the model process is told."""
        return Options(
            device=self.device, threads=self.torch_threads, max_loaded=self.max_loaded_models, memory_bytes=self.model_memory_bytes
        )
