"""The RPCs of JobsService about uploads: messages in, domain calls, messages out."""

import uuid
from typing import Any

import grpc

from genmesh.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from jobs_service.messages import timestamp
from jobs_service.uploads.intake import Uploads
from jobs_service.uploads.store import Upload
from servicekit.errors import MeshError, Reason
from servicekit.identity import current_user_id

Context = grpc.aio.ServicerContext[Any, Any]


class UploadsServicer(jobs_pb2_grpc.JobsServiceServicer):
    """The part of JobsService that is about files. `uploads` None: this server offers none."""

    def __init__(self, uploads: Uploads | None) -> None:
        self._maybe_uploads = uploads

    @property
    def _uploads(self) -> Uploads:
        if self._maybe_uploads is None:
            raise MeshError(grpc.StatusCode.UNIMPLEMENTED, Reason.ERROR_REASON_NOT_OFFERED, "uploads are not offered here")
        return self._maybe_uploads

    async def CreateUpload(self, request: jobs_pb2.CreateUploadRequest, context: Context) -> jobs_pb2.CreateUploadResponse:
        """See the proto."""
        announced = await self._uploads.create(_owner(), request.content_type, request.size_bytes)
        return jobs_pb2.CreateUploadResponse(
            upload_id=str(announced.upload_id),
            url=announced.put.url,
            headers=announced.put.headers,
            url_expire_time=timestamp(announced.put.expire_time),
        )

    async def CompleteUpload(self, request: jobs_pb2.CompleteUploadRequest, context: Context) -> jobs_pb2.CompleteUploadResponse:
        """See the proto."""
        return jobs_pb2.CompleteUploadResponse(upload=_message(await self._uploads.complete(_owner(), uuid.UUID(request.upload_id))))

    async def GetUpload(self, request: jobs_pb2.GetUploadRequest, context: Context) -> jobs_pb2.GetUploadResponse:
        """See the proto."""
        return jobs_pb2.GetUploadResponse(upload=_message(await self._uploads.get(_owner(), uuid.UUID(request.upload_id))))


def _message(upload: Upload) -> jobs_pb2.Upload:
    return jobs_pb2.Upload(
        upload_id=str(upload.upload_id),
        state=jobs_pb2.UploadState.ValueType(upload.state),
        content_type=upload.content_type,
        size_bytes=upload.size_bytes,
        width=upload.width,
        height=upload.height,
        duration_ms=upload.duration_ms,
        sha256=(upload.sha256 or b"").hex(),
        create_time=timestamp(upload.create_time),
        expire_time=timestamp(upload.expire_time),
        rejection=upload.rejection or "",
    )


def _owner() -> uuid.UUID:
    return uuid.UUID(current_user_id())
