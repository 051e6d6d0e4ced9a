"""Where a model process begins.

Its own module, and one that imports next to nothing: a spawned process imports the module of its entry first, and must not
load the server's gRPC and S3 before it gets to torch.
"""

import multiprocessing
import os
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from inference_service.messages import Options


@dataclass(frozen=True, slots=True)
class Spawned:
    """A model process that was started, and this side's end of its pipe."""

    process: BaseProcess
    connection: Connection


def spawn(options: Options) -> Spawned:
    """Start a model process. It takes seconds to load torch: whoever has something else to load should do this first."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=enter, args=(theirs, options), name="model", daemon=True)
    process.start()
    theirs.close()  # or the end of the process would never be seen as the end of the pipe
    return Spawned(process, ours)  # pyright: ignore[reportArgumentType]  # the pipe of Windows, in the stubs


def enter(connection: Connection, options: Options) -> None:
    """First code of the model process: what has to be set before torch is imported."""
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    # Idle OpenMP threads that spin take the cores from everyone else.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Quiet from the first import on: see model_process.main for the reason.
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["DIFFUSERS_VERBOSITY"] = "error"
    from inference_service import model_process

    model_process.main(
        connection,
        device=options.device,
        threads=options.threads,
        max_loaded=options.max_loaded,
        memory_bytes=options.memory_bytes,
    )
