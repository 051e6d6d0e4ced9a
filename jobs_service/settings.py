"""Settings of the processes of jobs_service."""

from pydantic import Field

from servicekit.settings import DatabaseSettings, HostPort, MeshSettings, ObjectSettings, RedisSettings, ServerSettings


class JobsSettings(MeshSettings, DatabaseSettings, RedisSettings, ObjectSettings):
    """What every process of jobs_service needs."""

    credits_address: HostPort = Field(description="credit_service")
    lease_seconds: float = Field(
        30.0, ge=0.5, le=3600, description="A worker silent for this long has lost its job; live workers renew at a third of it"
    )
    max_attempts: int = Field(3, ge=1, le=100, description="Attempts before a job fails for good")
    hold_ttl_s: int = Field(7 * 24 * 3600, ge=60, le=30 * 24 * 3600, description="Life of a credit hold that nobody settles")
    event_retention_s: int = Field(600, ge=10, le=24 * 3600, description="How far back a watch can resume; older tokens get snapshots")


class ServeSettings(JobsSettings, ServerSettings):
    """`jobs_service serve`."""

    checkpoint_interval_s: float = Field(10.0, gt=0, le=15, description="Silence on a watch before a checkpoint is sent")
    quote_ttl_s: int = Field(300, ge=1, le=24 * 3600, description="Life of a quote")


class DispatchSettings(JobsSettings):
    """`jobs_service dispatch`."""

    inference_address: HostPort = Field(description="The inference_service this dispatcher feeds")
    worker_id: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Name of this worker, unique in the mesh")
    dispatch_slots: int = Field(1, ge=1, le=64, description="Jobs in flight at once")
    drain_s: float = Field(
        10.0, ge=0, le=300, description="How long running jobs may take to end after SIGTERM; then they go back to the queue"
    )


class RelaySettings(JobsSettings):
    """`jobs_service relay`."""
