"""Settings of the processes of jobs_service."""

from pydantic import Field

from jobs_service.lifecycle import Priority
from servicekit.settings import DatabaseSettings, HostPort, MeshSettings, ObjectSettings, RedisSettings, ServerSettings


class JobsSettings(MeshSettings, DatabaseSettings, RedisSettings, ObjectSettings):
    """What every process of jobs_service needs."""

    credits_address: HostPort = Field(description="credit_service")
    lease_seconds: float = Field(
        30.0, ge=0.5, le=3600, description="A worker silent for this long has lost its job; live workers renew at a third of it"
    )
    max_attempts: int = Field(3, ge=1, le=100, description="Attempts that may fail or be lost before a job fails for good")
    owner_concurrency_free: int = Field(
        4, ge=0, le=10_000, description="Jobs of one owner of the free plan that may run at once; 0: any number"
    )
    owner_concurrency_pro: int = Field(
        16, ge=0, le=10_000, description="Jobs of one owner of the paid plan that may run at once; 0: any number"
    )
    hold_ttl_s: int = Field(7 * 24 * 3600, ge=60, le=30 * 24 * 3600, description="Life of a credit hold that nobody settles")
    event_retention_s: int = Field(600, ge=10, le=24 * 3600, description="How far back a watch can resume; older tokens get snapshots")

    @property
    def owner_limits(self) -> dict[Priority, int]:
        """Jobs of one owner that may run at once, by level; 0: any number."""
        return {Priority.FREE: self.owner_concurrency_free, Priority.PRO: self.owner_concurrency_pro}


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

    job_retention_days: float = Field(90, ge=0, le=36_500, description="Ended jobs older than this are deleted with their media; 0: never")
    orphan_media_hours: float = Field(
        24, ge=1, le=8760, description="Media that belong to no job are deleted when they are older than this"
    )
