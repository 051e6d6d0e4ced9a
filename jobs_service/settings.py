"""Settings of the processes of jobs_service."""

from dataclasses import dataclass

from pydantic import Field

from jobs_service.lifecycle import Priority
from jobs_service.uploads.media import MediaLimits, UploadLimits
from servicekit.settings import DatabaseSettings, HostPort, MeshSettings, ObjectSettings, RedisSettings, ServerSettings

MIB = 1024 * 1024
DAY_S = 24 * 3600


@dataclass(frozen=True, slots=True)
class PlanLimits:
    """What one user of a plan may ask for; 0: any amount."""

    submits_per_minute: int
    open_jobs: int
    """Jobs that wait or run."""
    queued_millicredits: int
    """What those jobs may cost together."""
    watches: int
    """Open watches, over all replicas."""


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
    submits_per_minute_free: int = Field(
        300, ge=0, le=1_000_000, description="Jobs that a user of the free plan may submit or retry in a minute; 0: any number"
    )
    submits_per_minute_pro: int = Field(1_200, ge=0, le=1_000_000, description="The same for the paid plan")
    open_jobs_free: int = Field(
        200, ge=0, le=100_000, description="Jobs of a user of the free plan that may wait or run at a time; 0: any number"
    )
    open_jobs_pro: int = Field(2_000, ge=0, le=100_000, description="The same for the paid plan")
    queued_millicredits_free: int = Field(
        5_000_000,
        ge=0,
        le=10**15,
        description="What those jobs of a user of the free plan may cost together; more than the dearest job; 0: any amount",
    )
    queued_millicredits_pro: int = Field(100_000_000, ge=0, le=10**15, description="The same for the paid plan")
    watches_free: int = Field(
        50, ge=0, le=5_000, description="Watches of jobs that a user of the free plan may have open, over all replicas; 0: any number"
    )
    watches_pro: int = Field(500, ge=0, le=5_000, description="The same for the paid plan")

    upload_max_bytes: int = Field(100 * MIB, ge=1, le=5 * 1024 * MIB, description="Largest file that may be uploaded")
    upload_max_pixels: int = Field(64_000_000, ge=1, le=268_000_000, description="Most pixels of an uploaded picture")
    upload_max_duration_s: int = Field(7200, ge=1, le=24 * 3600, description="Longest uploaded audio")
    upload_url_ttl_s: int = Field(900, ge=1, le=1800, description="How long the URL of an upload can be written to")
    upload_incomplete_max: int = Field(20, ge=1, le=1000, description="Uploads of one user that may be incomplete")
    upload_stored_max_bytes: int = Field(10 * 1024 * MIB, ge=1, description="Bytes of uploads that are kept for one user")
    upload_retention_days: float = Field(7, gt=0, le=36_500, description="How long a complete upload is kept")
    upload_checks_at_once: int = Field(2, ge=1, le=64, description="Uploaded files that a server checks at once, each in a process")
    upload_checks_waiting: int = Field(16, ge=0, le=1000, description="Files that may wait for that; more are refused")
    upload_check_memory_bytes: int = Field(
        2 * 1024 * MIB, ge=512 * MIB, description="Address space of a check: decoding the largest WebP takes about 1.5 GB"
    )
    upload_check_cpu_s: int = Field(60, ge=1, le=240, description="Processor time of a check; more means that the file is refused")
    upload_check_wall_s: float = Field(120, gt=0, le=180, description="Time of a check; more means that it has to be tried again")

    @property
    def media_limits(self) -> MediaLimits:
        """What uploaded files may be, and what looking at one may take."""
        return MediaLimits(
            max_pixels=self.upload_max_pixels,
            max_duration_s=self.upload_max_duration_s,
            memory_bytes=self.upload_check_memory_bytes,
            cpu_s=self.upload_check_cpu_s,
            wall_s=self.upload_check_wall_s,
        )

    @property
    def upload_limits(self) -> UploadLimits:
        """What users may upload."""
        return UploadLimits(
            max_bytes=self.upload_max_bytes,
            url_ttl_s=self.upload_url_ttl_s,
            incomplete_max=self.upload_incomplete_max,
            stored_max_bytes=self.upload_stored_max_bytes,
            retention_s=self.upload_retention_days * DAY_S,
            checks_at_once=self.upload_checks_at_once,
            checks_waiting_max=self.upload_checks_waiting,
        )

    @property
    def plan_limits(self) -> dict[Priority, PlanLimits]:
        """What a user may ask for, by the level of their plan."""
        return {
            Priority.FREE: PlanLimits(self.submits_per_minute_free, self.open_jobs_free, self.queued_millicredits_free, self.watches_free),
            Priority.PRO: PlanLimits(self.submits_per_minute_pro, self.open_jobs_pro, self.queued_millicredits_pro, self.watches_pro),
        }


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
