"""The model process: loads pipelines, runs them step by step, makes previews, stops when told to.

The only module that imports torch and diffusers. The server starts it (model_host) and talks to it over a pipe (messages);
it knows no network, no store and no job.
"""

import gc
import inspect
import os
import queue
import resource
import signal
import threading
import time
import traceback
from collections import OrderedDict
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.auto_pipeline import AutoPipelineForText2Image
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers.utils import logging as transformers_logging

from inference_service import images
from inference_service.messages import (
    Cancel,
    Command,
    Encoding,
    Ended,
    Failure,
    FailureKind,
    ImageRun,
    Load,
    Loaded,
    Message,
    ModelFiles,
    Picture,
    PreviewPicture,
    Ready,
    Started,
    Step,
    Task,
    Unload,
)

PREVIEW_SHARE = 0.02
"""Part of the denoising time that previews may take."""
PROMISED_PART = 0.6
"""A picture without a preview by then gets one, whatever it costs."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class ModelError(Exception):
    """A model that cannot be used as the catalogue says."""


class CancelledRun(Exception):  # noqa: N818  # no error: somebody wished it
    """Leaves a pipeline that was told to stop."""


class InvalidOutputError(Exception):
    """The model made NaN or infinite values."""


class Previewer:
    """Small pictures of latents on their way, within a budget of time.

    The pipeline's own VAE decodes them: right colours for every model, nothing to fit. Latents are shrunk first so that the
    preview has at most 256 px, which bounds the cost whatever the size of the picture. Previews may take 2 % of the
    denoising time so far; that also spares the first steps, which show noise. Whatever the budget, each picture gets one when
    60 % of its steps are done, and none after the last step: the picture follows.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        vae = getattr(pipeline, "vae", None)
        self._vae = vae if getattr(getattr(vae, "config", None), "scaling_factor", None) is not None else None
        self._second_per_pixel = 0.0
        self._spent_s = 0.0
        self._promised = False

    def measure(self, width: int, height: int) -> None:
        """Learn what a preview costs. A VAE that cannot do it this way means a model without previews."""
        if self._vae is None:
            return
        try:
            scale = self._pipeline.vae_scale_factor
            latents = torch.zeros(
                (1, self._vae.config.latent_channels, height // scale, width // scale), device=self._vae.device, dtype=self._vae.dtype
            )
            for _ in range(2):  # the first one warms up
                self._make(latents)
        except Exception:  # whatever a VAE of another make raises
            self._vae = None

    def begin(self) -> None:
        """Start a new run: what earlier ones saved is not there to spend."""
        self._spent_s = 0.0

    def begin_picture(self) -> None:
        """Start the next picture of a run: it has no preview yet."""
        self._promised = True

    @property
    def spent_s(self) -> float:
        """Seconds spent on previews in this run."""
        return self._spent_s

    def preview(self, latents: torch.Tensor, denoising_s: float, *, part_done: float) -> tuple[bytes, str] | None:
        """JPEG and BlurHash, or None when the budget does not allow it or the latents do not show a picture."""
        if self._vae is None or latents.ndim != 4:  # packed latents (FLUX) have no rows and columns
            return None
        height, width = self._preview_latent_size(latents)
        cost_s = self._second_per_pixel * height * width
        promised = self._promised and part_done >= PROMISED_PART
        if not promised and self._spent_s + cost_s > PREVIEW_SHARE * denoising_s:
            return None
        self._promised = False
        started = time.perf_counter()
        try:
            image = self._make(latents)
            if image is None:
                self._vae = None  # a half-precision VAE that overflows does so every time
                return None
            return images.preview(image), images.blurhash_of(image)
        finally:
            self._spent_s += time.perf_counter() - started

    def _preview_latent_size(self, latents: torch.Tensor) -> tuple[int, int]:
        side = max(latents.shape[-2:])
        limit = max(1, images.PREVIEW_SIDE_PX // int(self._pipeline.vae_scale_factor))
        scale = min(1.0, limit / side)
        return max(1, round(latents.shape[-2] * scale)), max(1, round(latents.shape[-1] * scale))

    def _make(self, latents: torch.Tensor) -> Image.Image | None:
        assert self._vae is not None
        started = time.perf_counter()
        size = self._preview_latent_size(latents)
        with torch.inference_mode():
            small = latents[:1].to(self._vae.dtype)
            if size != tuple(latents.shape[-2:]):
                small = torch.nn.functional.interpolate(small, size=size, mode="area")
            config = self._vae.config
            decoded = self._vae.decode(small / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0), return_dict=False)[0]
            pixels = self._pipeline.image_processor.postprocess(decoded, output_type="np")[0]
        if not np.isfinite(pixels).all():
            return None
        image = _to_image(pixels)
        cost = (time.perf_counter() - started) / (size[0] * size[1])
        # The dearer of the newest and the smoothed cost: a budget is kept by pessimists.
        self._second_per_pixel = max(cost, (self._second_per_pixel + cost) / 2)
        return image


class LoadedModel:
    """A pipeline in memory."""

    def __init__(self, files: ModelFiles, device: torch.device) -> None:
        """Load it from its local directory: safetensors only, no code from the checkpoint, no network."""
        directory = Path(files.directory)
        pipeline: Any = AutoPipelineForText2Image.from_pretrained(
            str(directory), dtype=DTYPES[files.dtype], local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
        self.accepts = frozenset(inspect.signature(pipeline.__call__).parameters)
        if "callback_on_step_end" not in self.accepts:
            raise ModelError(f"{type(pipeline).__name__} does not report its steps")
        scale = int(getattr(pipeline, "vae_scale_factor", 1))
        if files.size_multiple % scale:
            raise ModelError(f"size_multiple {files.size_multiple} is not a multiple of the pipeline's {scale}")
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(device)
        self.pipeline = pipeline
        self.previewer = Previewer(pipeline)
        self.previewer.measure(files.default_width, files.default_height)


class ModelProcess:
    """Takes tasks from the pipe one after the other."""

    def __init__(self, connection: Connection, *, device: torch.device, max_loaded: int) -> None:
        self._connection = connection
        self._device = device
        self._max_loaded = max_loaded
        self._models: OrderedDict[str, LoadedModel] = OrderedDict()
        self._tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self._cancelled: set[int] = set()

    def serve(self) -> None:
        """Run tasks until the server hangs up, or memory ran out and a fresh process has to take over."""
        threading.Thread(target=self._listen, name="commands", daemon=True).start()
        self._send(Ready(str(self._device)))
        while True:
            task = self._tasks.get()
            ended = self._perform(task)
            self._cancelled.discard(task.task_id)
            self._send(ended)
            if ended.failure is not None and ended.failure.kind is FailureKind.OUT_OF_MEMORY:
                return

    def _listen(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                command: Command = self._connection.recv()
                if isinstance(command, Cancel):
                    self._cancelled.add(command.task_id)
                else:
                    self._tasks.put(command)
        # The server is gone: nobody is left to tell, and a running pipeline holds the device for nothing.
        os._exit(0)

    def _send(self, message: Message) -> None:
        self._connection.send(message)

    def _perform(self, task: Task) -> Ended:
        counter = _Counter()
        try:
            match task:
                case Load():
                    self._model(task.model)
                case Unload():
                    self._unload(task.model_id)
                case ImageRun():
                    self._run(task, counter)
        except CancelledRun:
            failure = Failure(FailureKind.CANCELLED)
        except InvalidOutputError as error:
            failure = Failure(FailureKind.OUTPUT_INVALID, str(error))
        except Exception as error:  # whatever a model raises, its job gets an answer
            kind = FailureKind.OUT_OF_MEMORY if _is_out_of_memory(error) else FailureKind.MODEL_FAILED
            failure = Failure(kind, _traceback(error, task))
        else:
            failure = None
        return Ended(task.task_id, failure, counter.steps_done, counter.pipeline_s)

    def _model(self, files: ModelFiles) -> LoadedModel:
        model = self._models.get(files.model_id)
        if model is None:
            while len(self._models) >= self._max_loaded:
                self._unload(next(iter(self._models)))
            model = self._models[files.model_id] = LoadedModel(files, self._device)
            self._send(Loaded(tuple(self._models)))
        self._models.move_to_end(files.model_id)
        return model

    def _unload(self, model_id: str) -> None:
        if self._models.pop(model_id, None) is not None:
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            self._send(Loaded(tuple(self._models)))

    def _run(self, run: ImageRun, counter: "_Counter") -> None:
        model = self._model(run.model)
        self._send(Started(run.task_id))
        model.previewer.begin()
        for index in range(run.image_count):
            pixels = self._denoise(run, index, model, counter)
            if index == run.image_count - 1:
                self._send(Encoding(run.task_id))
            image = _to_image(pixels)
            picture = Picture(run.task_id, index, images.encode(image, run.format), images.thumbnail(image), images.blurhash_of(image))
            self._check_cancelled(run.task_id)
            self._send(picture)

    def _denoise(self, run: ImageRun, index: int, model: LoadedModel, counter: "_Counter") -> np.ndarray:
        """One picture as floats 0 to 1, height by width by 3. Checked before they become bytes: NaN would turn into black."""
        started = step_started = time.perf_counter()
        before = counter.steps_done

        def on_step_end(pipeline: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal step_started
            latents: torch.Tensor = tensors["latents"]
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # a step counts, and is charged, when it is done and not when it is launched
            if not bool(torch.isfinite(latents).all()):
                raise InvalidOutputError(f"latents are not finite after step {step + 1}")
            now = time.perf_counter()
            # Some schedulers take more turns than steps asked for; callers count what they asked for.
            turns = max(int(getattr(pipeline, "num_timesteps", run.steps)), step + 1)
            done = before + (step + 1) * run.steps // turns
            if done > counter.steps_done:
                counter.steps_done = done
                self._send(Step(run.task_id, done, now - step_started, time.time()))
                step_started = now
            self._check_cancelled(run.task_id)
            if step + 1 < turns:
                spent = model.previewer.spent_s
                made = model.previewer.preview(
                    latents, counter.pipeline_s + now - started - (spent - spent_before), part_done=(step + 1) / turns
                )
                if made is not None:
                    self._send(PreviewPicture(run.task_id, *made))
                step_started += model.previewer.spent_s - spent
            return tensors

        arguments: dict[str, Any] = {
            "prompt": run.prompt,
            "negative_prompt": run.negative_prompt or None,
            "width": run.width,
            "height": run.height,
            "num_inference_steps": run.steps,
            "guidance_scale": run.guidance_scale,
            # Random numbers from the CPU are the same on every device.
            "generator": torch.Generator("cpu").manual_seed(run.seed + index),
            "output_type": "np",
            "callback_on_step_end": on_step_end,
        }
        self._check_cancelled(run.task_id)
        model.previewer.begin_picture()
        spent_before = model.previewer.spent_s
        try:
            pixels: np.ndarray = model.pipeline(**{name: value for name, value in arguments.items() if name in model.accepts}).images[0]
        finally:
            counter.pipeline_s += time.perf_counter() - started - (model.previewer.spent_s - spent_before)
        if not np.isfinite(pixels).all():
            raise InvalidOutputError("the picture is not finite")
        return pixels

    def _check_cancelled(self, task_id: int) -> None:
        if task_id in self._cancelled:
            raise CancelledRun


class _Counter:
    """What a run has done so far, whichever way it ends."""

    def __init__(self) -> None:
        self.steps_done = 0
        self.pipeline_s = 0.0


def _to_image(pixels: np.ndarray) -> Image.Image:
    """Floats 0 to 1 as an RGB picture, rounded as diffusers does (VaeImageProcessor.numpy_to_pil)."""
    return Image.fromarray((pixels * 255).round().astype("uint8")).convert("RGB")


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # torch has no type of its own for the host's memory (c10/core/impl/alloc_cpu.cpp).
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _traceback(error: BaseException, task: Task) -> str:
    """For the log, which must not have prompts."""
    text = "".join(traceback.format_exception(error))
    if isinstance(task, ImageRun):
        for secret in (task.prompt, task.negative_prompt):
            if secret:
                text = text.replace(secret, "[prompt]").replace(repr(secret)[1:-1], "[prompt]")
    return text


def main(connection: Connection, *, device: str, threads: int, max_loaded: int, memory_bytes: int | None) -> None:
    """Body of the model process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # A signal to the whole group must not end a step that the server still lets run; the server hangs up when it is time.
        signal.signal(number, signal.SIG_IGN)
    # Below errors these libraries log prompts (the truncated part of a long one, for example).
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if memory_bytes is not None and chosen.type == "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    ModelProcess(connection, device=chosen, max_loaded=max_loaded).serve()
