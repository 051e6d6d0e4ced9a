"""An edge in this process for the tests of the command line: a real gRPC server whose answers a test scripts."""

# ruff: noqa: N802  # RPC methods are named by the proto

import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any, NoReturn, TypeVar

import grpc
from grpc_status import rpc_status

from genmesh.credits.v1 import credits_pb2, credits_pb2_grpc, payments_pb2, payments_pb2_grpc
from genmesh.errors.v1 import errors_pb2
from genmesh.identity.v1 import identity_pb2, identity_pb2_grpc
from genmesh.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from servicekit.errors import MeshError, invalid, not_found, precondition, unauthenticated

JOB_ID = "01890a5d-ac96-774b-bcce-b302099a8057"
USER_ID = "01890a5d-ac96-774b-bcce-b302099a8058"
EMAIL = "ann@example.com"
PASSWORD = "correct horse battery"
FINGERPRINT = "0123456789abcdef"
WAIT_S = 60  # the longest that a test waits for a signal; it takes a moment on an idle machine

API_KEY_ID = "01890a5d-ac96-774b-bcce-b302099a8059"
UPLOAD_ID = "01890a5d-ac96-774b-bcce-b302099a8060"
IDENTITY_ID = "01890a5d-ac96-774b-bcce-b302099a8061"
ISSUER = "https://accounts.google.com"
PREFIX = "gmk_0123456789ab"
SECRET = PREFIX + "_" + "s" * 43

READ_AND_SUBMIT = (identity_pb2.API_KEY_SCOPE_READ, identity_pb2.API_KEY_SCOPE_SUBMIT)

Reason = errors_pb2.ErrorReason
_ENDS_TOKENS = (Reason.ERROR_REASON_TOKEN_EXPIRED, Reason.ERROR_REASON_TOKEN_REVOKED)
Step = jobs_pb2.WatchJobsResponse | MeshError
Scripted = TypeVar("Scripted")


class FakeEdge(
    identity_pb2_grpc.IdentityServiceServicer,
    identity_pb2_grpc.IdentityAdminServiceServicer,
    jobs_pb2_grpc.JobsServiceServicer,
    jobs_pb2_grpc.JobsAdminServiceServicer,
    credits_pb2_grpc.CreditsServiceServicer,
    credits_pb2_grpc.LedgerAdminServiceServicer,
    payments_pb2_grpc.PaymentsServiceServicer,
):
    """Sessions as the gateway keeps them (a refresh token used twice ends the session); jobs follow a script."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.tokens = 0
        self.token_refusals: deque[MeshError] = deque()
        """Said to calls with a token or a key that would do."""
        self.signed_out: list[tuple[str, str]] = []
        """Refresh token of each request to sign out, and the access token that it came with."""
        self.secrets = {SECRET}
        self.keys = [identity_pb2.ApiKey(api_key_id=API_KEY_ID, display_name="ci", prefix=PREFIX, scopes=READ_AND_SUBMIT)]
        self.keys_asked: list[identity_pb2.CreateApiKeyRequest] = []
        self.sign_in_options = identity_pb2.GetSignInOptionsResponse()
        self.codes: list[identity_pb2.AuthorizationCode] = []
        self.identities: list[identity_pb2.LinkedIdentity] = []
        self.unlink_asked: list[str] = []
        self.roles: list[str] = []
        self.audit_entries: list[identity_pb2.AuditEntry] = []
        self.audit_asked: list[identity_pb2.ListAuditEntriesRequest] = []
        self.ticket = jobs_pb2.CreateUploadResponse(upload_id=UPLOAD_ID)
        self.upload = jobs_pb2.Upload(upload_id=UPLOAD_ID, state=jobs_pb2.UPLOAD_STATE_COMPLETE)
        self.uploads_asked: list[jobs_pb2.CreateUploadRequest] = []
        self.valid: set[str] = set()
        self.refresh_token = ""
        self.refreshes = 0
        self.token_life_s = 900.0
        self.job = jobs_pb2.Job(job_id=JOB_ID, state=jobs_pb2.STATE_PENDING, estimated_cost_millicredits=20)
        self.job.spec.image.prompt = "a tiger face"
        self.refusals: deque[MeshError] = deque()
        self.created: list[jobs_pb2.CreateJobRequest] = []
        self.granted: list[credits_pb2.GrantCreditsRequest] = []
        self.connections: deque[list[Step]] = deque()
        self.watched: list[jobs_pb2.WatchJobsRequest] = []
        self.watching = threading.Event()
        self.cancelled = threading.Event()
        self.cancel_asked = threading.Event()
        self.stubborn = False
        self.delete_asked: list[str] = []
        self.pools: list[jobs_pb2.PoolStats] = []
        self.letters_asked: list[jobs_pb2.ListDeadLettersRequest] = []
        self.requeue_asked: list[jobs_pb2.RequeueDeadLetterRequest] = []
        self.requeued = jobs_pb2.RequeueDeadLetterResponse()
        self.url = ""
        self.balance = credits_pb2.GetBalanceResponse(available_millicredits=980, reserved_millicredits=20)
        self.balances: deque[list[credits_pb2.WatchBalanceResponse | MeshError]] = deque()
        self.balances_asked = 0
        self.entries: list[credits_pb2.Entry] = []
        self.entries_asked: list[credits_pb2.ListEntriesRequest] = []
        self.account_entries_asked: list[credits_pb2.ListAccountEntriesRequest] = []
        self.account = credits_pb2.GetAccountResponse()
        self.ceilings: list[credits_pb2.Ceiling] = []
        self.key_ceilings: list[credits_pb2.SetKeyCeilingRequest] = []
        self.user_ceilings: list[credits_pb2.SetUserCeilingRequest] = []
        self.clawed_back: list[credits_pb2.ClawbackCreditsRequest] = []
        self.updated: list[identity_pb2.UpdateUserRequest] = []
        self.audits: deque[list[credits_pb2.AuditLedgerResponse | MeshError]] = deque()
        self.audits_asked = 0
        self.prices = payments_pb2.ListPricesResponse()
        self.top_ups: deque[payments_pb2.TopUp] = deque()
        self.top_ups_asked: list[payments_pb2.CreateTopUpRequest] = []

    # Identity

    def _issue(self) -> dict[str, Any]:
        self.tokens += 1
        access, self.refresh_token = f"access-{self.tokens}", f"refresh-{self.tokens}"
        self.valid.add(access)
        user = identity_pb2.User(user_id=USER_ID, email=EMAIL, plan=identity_pb2.PLAN_FREE)
        fields: dict[str, Any] = {"access_token": access, "refresh_token": self.refresh_token, "user": user}
        return fields

    def _check(self, context: grpc.ServicerContext) -> None:
        sent = dict(context.invocation_metadata())
        token, key = str(sent.get("authorization", "")).removeprefix("Bearer "), sent.get("x-api-key")
        if key is not None and (token or key not in self.secrets):
            refuse(context, unauthenticated(Reason.ERROR_REASON_API_KEY_INVALID, "the API key does not work"))
        if key is None and token not in self.valid:
            refuse(context, unauthenticated(Reason.ERROR_REASON_TOKEN_EXPIRED, "the access token has expired"))
        if self.token_refusals:
            refuse(context, self.token_refusals.popleft())

    def SignIn(self, request: identity_pb2.SignInRequest, context: grpc.ServicerContext) -> identity_pb2.SignInResponse:
        with self.lock:
            if request.HasField("google_code"):
                self.codes.append(request.google_code)
                if self.refusals:
                    refuse(context, self.refusals.popleft())
            elif (request.password.email, request.password.password) != (EMAIL, PASSWORD):
                refuse(context, unauthenticated(Reason.ERROR_REASON_BAD_CREDENTIALS, "e-mail or password is wrong"))
            response = identity_pb2.SignInResponse(**self._issue())
        response.expire_time.FromNanoseconds(int((time.time() + self.token_life_s) * 1e9))
        return response

    def RefreshSession(
        self, request: identity_pb2.RefreshSessionRequest, context: grpc.ServicerContext
    ) -> identity_pb2.RefreshSessionResponse:
        with self.lock:
            self.refreshes += 1
            if request.refresh_token != self.refresh_token:
                self.valid.clear()
                self.refresh_token = ""
                refuse(context, unauthenticated(Reason.ERROR_REASON_REFRESH_TOKEN_INVALID, "sign in again"))
            response = identity_pb2.RefreshSessionResponse(**self._issue())
        response.expire_time.FromNanoseconds(int((time.time() + 900) * 1e9))
        return response

    def SignOut(self, request: identity_pb2.SignOutRequest, context: grpc.ServicerContext) -> identity_pb2.SignOutResponse:
        self._check(context)
        token = str(dict(context.invocation_metadata()).get("authorization", "")).removeprefix("Bearer ")
        self.signed_out.append((request.refresh_token, token))
        self.refresh_token = ""
        return identity_pb2.SignOutResponse()

    def GetSignInOptions(
        self, request: identity_pb2.GetSignInOptionsRequest, context: grpc.ServicerContext
    ) -> identity_pb2.GetSignInOptionsResponse:
        return self.sign_in_options  # to anybody

    def LinkIdentity(self, request: identity_pb2.LinkIdentityRequest, context: grpc.ServicerContext) -> identity_pb2.LinkIdentityResponse:
        self._check(context)
        self.codes.append(request.google_code)
        if self.refusals:
            refuse(context, self.refusals.popleft())
        return identity_pb2.LinkIdentityResponse()

    def ListIdentities(
        self, request: identity_pb2.ListIdentitiesRequest, context: grpc.ServicerContext
    ) -> identity_pb2.ListIdentitiesResponse:
        self._check(context)
        return identity_pb2.ListIdentitiesResponse(identities=self.identities)

    def UnlinkIdentity(
        self, request: identity_pb2.UnlinkIdentityRequest, context: grpc.ServicerContext
    ) -> identity_pb2.UnlinkIdentityResponse:
        self._check(context)
        self.unlink_asked.append(request.identity_id)
        if self.refusals:
            refuse(context, self.refusals.popleft())
        self.identities = [one for one in self.identities if one.identity_id != request.identity_id]
        return identity_pb2.UnlinkIdentityResponse()

    def CreateApiKey(self, request: identity_pb2.CreateApiKeyRequest, context: grpc.ServicerContext) -> identity_pb2.CreateApiKeyResponse:
        self._check(context)
        self.keys_asked.append(request)
        if self.refusals:
            refuse(context, self.refusals.popleft())
        key = identity_pb2.ApiKey(api_key_id=API_KEY_ID, display_name=request.display_name, prefix=PREFIX, scopes=request.scopes)
        if request.HasField("expire_time"):
            key.expire_time.CopyFrom(request.expire_time)
        return identity_pb2.CreateApiKeyResponse(api_key=key, secret=SECRET)

    def ListApiKeys(self, request: identity_pb2.ListApiKeysRequest, context: grpc.ServicerContext) -> identity_pb2.ListApiKeysResponse:
        self._check(context)
        return identity_pb2.ListApiKeysResponse(api_keys=self.keys)

    def RevokeApiKey(self, request: identity_pb2.RevokeApiKeyRequest, context: grpc.ServicerContext) -> identity_pb2.RevokeApiKeyResponse:
        self._check(context)
        key = next((key for key in self.keys if key.api_key_id == request.api_key_id), None)
        if key is None:
            refuse(context, not_found("API key"))
        key.revoke_time.GetCurrentTime()
        return identity_pb2.RevokeApiKeyResponse(api_key=key)

    def GetMe(self, request: identity_pb2.GetMeRequest, context: grpc.ServicerContext) -> identity_pb2.GetMeResponse:
        self._check(context)
        return identity_pb2.GetMeResponse(user=identity_pb2.User(user_id=USER_ID, email=EMAIL, plan=identity_pb2.PLAN_FREE))

    def ListUsers(self, request: identity_pb2.ListUsersRequest, context: grpc.ServicerContext) -> identity_pb2.ListUsersResponse:
        self._check(context)
        if self.refusals:
            refuse(context, self.refusals.popleft())
        users = [identity_pb2.User(user_id=USER_ID, email=EMAIL, plan=identity_pb2.PLAN_FREE, roles=self.roles)]
        return identity_pb2.ListUsersResponse(users=[user for user in users if request.email.lower() in {"", user.email}])

    def UpdateUser(self, request: identity_pb2.UpdateUserRequest, context: grpc.ServicerContext) -> identity_pb2.UpdateUserResponse:
        self._check(context)
        self.updated.append(request)
        if request.user_id != USER_ID:
            refuse(context, not_found("user"))
        if self.refusals:
            refuse(context, self.refusals.popleft())
        user = identity_pb2.User(
            user_id=USER_ID,
            email=EMAIL,
            plan=request.plan if request.HasField("plan") else identity_pb2.PLAN_FREE,
            roles=request.roles.roles if request.HasField("roles") else self.roles,
            disabled=request.disabled,
        )
        return identity_pb2.UpdateUserResponse(user=user)

    def ListAuditEntries(
        self, request: identity_pb2.ListAuditEntriesRequest, context: grpc.ServicerContext
    ) -> identity_pb2.ListAuditEntriesResponse:
        self._check(context)
        self.audit_asked.append(request)
        return identity_pb2.ListAuditEntriesResponse(audit_entries=self.audit_entries)

    # Credits

    def GetBalance(self, request: credits_pb2.GetBalanceRequest, context: grpc.ServicerContext) -> credits_pb2.GetBalanceResponse:
        self._check(context)
        return self.balance

    def GrantCredits(self, request: credits_pb2.GrantCreditsRequest, context: grpc.ServicerContext) -> credits_pb2.GrantCreditsResponse:
        self._check(context)
        self.granted.append(request)
        if self.refusals:
            refuse(context, self.refusals.popleft())
        return credits_pb2.GrantCreditsResponse(available_millicredits=request.amount_millicredits)

    def WatchBalance(
        self, request: credits_pb2.WatchBalanceRequest, context: grpc.ServicerContext
    ) -> Iterator[credits_pb2.WatchBalanceResponse]:
        self._check(context)
        self.balances_asked += 1
        if not self.balances:  # nothing scripted: nothing happens any more
            self.watching.set()
            self.cancelled.wait(WAIT_S)
            return
        yield from scripted(context, self.balances.popleft())

    def ListEntries(self, request: credits_pb2.ListEntriesRequest, context: grpc.ServicerContext) -> credits_pb2.ListEntriesResponse:
        self._check(context)
        self.entries_asked.append(request)
        entries, next_page_token = self._page(request.page_size, request.page_token, context)
        return credits_pb2.ListEntriesResponse(entries=entries, next_page_token=next_page_token)

    def ListAccountEntries(
        self, request: credits_pb2.ListAccountEntriesRequest, context: grpc.ServicerContext
    ) -> credits_pb2.ListAccountEntriesResponse:
        self._check(context)
        self.account_entries_asked.append(request)
        entries, next_page_token = self._page(request.page_size, request.page_token, context)
        return credits_pb2.ListAccountEntriesResponse(entries=entries, next_page_token=next_page_token)

    def _page(self, page_size: int, page_token: str, context: grpc.ServicerContext) -> tuple[list[credits_pb2.Entry], str]:
        if page_token and self.refusals:  # of the second page
            refuse(context, self.refusals.popleft())
        first = int(page_token or 0)
        last = min(first + min(page_size or 50, 200), len(self.entries))
        return self.entries[first:last], str(last) if last < len(self.entries) else ""

    def ListCeilings(self, request: credits_pb2.ListCeilingsRequest, context: grpc.ServicerContext) -> credits_pb2.ListCeilingsResponse:
        self._check(context)
        return credits_pb2.ListCeilingsResponse(ceilings=self.ceilings)

    def SetKeyCeiling(self, request: credits_pb2.SetKeyCeilingRequest, context: grpc.ServicerContext) -> credits_pb2.SetKeyCeilingResponse:
        self._check(context)
        self.key_ceilings.append(request)
        return credits_pb2.SetKeyCeilingResponse(ceiling=ceiling_of(request, request.api_key_id, context))

    def SetUserCeiling(
        self, request: credits_pb2.SetUserCeilingRequest, context: grpc.ServicerContext
    ) -> credits_pb2.SetUserCeilingResponse:
        self._check(context)
        self.user_ceilings.append(request)
        return credits_pb2.SetUserCeilingResponse(ceiling=ceiling_of(request, "", context))

    def GetAccount(self, request: credits_pb2.GetAccountRequest, context: grpc.ServicerContext) -> credits_pb2.GetAccountResponse:
        self._check(context)
        return self.account

    def ClawbackCredits(
        self, request: credits_pb2.ClawbackCreditsRequest, context: grpc.ServicerContext
    ) -> credits_pb2.ClawbackCreditsResponse:
        self._check(context)
        self.clawed_back.append(request)
        if self.refusals:
            refuse(context, self.refusals.popleft())
        return credits_pb2.ClawbackCreditsResponse(available_millicredits=1000)

    def AuditLedger(
        self, request: credits_pb2.AuditLedgerRequest, context: grpc.ServicerContext
    ) -> Iterator[credits_pb2.AuditLedgerResponse]:
        self._check(context)
        self.audits_asked += 1
        if not self.audits:  # nothing scripted: it takes for ever
            yield credits_pb2.AuditLedgerResponse()
            self.watching.set()
            self.cancelled.wait(WAIT_S)
            return
        yield from scripted(context, self.audits.popleft())

    # Payments

    def ListPrices(self, request: payments_pb2.ListPricesRequest, context: grpc.ServicerContext) -> payments_pb2.ListPricesResponse:
        return self.prices  # to anybody

    def CreateTopUp(self, request: payments_pb2.CreateTopUpRequest, context: grpc.ServicerContext) -> payments_pb2.CreateTopUpResponse:
        self._check(context)
        self.top_ups_asked.append(request)
        if self.refusals:
            refuse(context, self.refusals.popleft())
        return payments_pb2.CreateTopUpResponse(top_up=self.top_ups.popleft())

    def GetTopUp(self, request: payments_pb2.GetTopUpRequest, context: grpc.ServicerContext) -> payments_pb2.GetTopUpResponse:
        self._check(context)
        self.watching.set()
        # The last one stays.
        return payments_pb2.GetTopUpResponse(top_up=self.top_ups.popleft() if len(self.top_ups) > 1 else self.top_ups[0])

    def ListTopUps(self, request: payments_pb2.ListTopUpsRequest, context: grpc.ServicerContext) -> payments_pb2.ListTopUpsResponse:
        self._check(context)
        return payments_pb2.ListTopUpsResponse(top_ups=self.top_ups)

    # Jobs

    def CreateJob(self, request: jobs_pb2.CreateJobRequest, context: grpc.ServicerContext) -> jobs_pb2.CreateJobResponse:
        self._check(context)
        self.created.append(request)
        if self.refusals:
            refuse(context, self.refusals.popleft())
        return jobs_pb2.CreateJobResponse(job=self.job)

    def GetJob(self, request: jobs_pb2.GetJobRequest, context: grpc.ServicerContext) -> jobs_pb2.GetJobResponse:
        self._check(context)
        if request.job_id != JOB_ID:
            refuse(context, not_found("job"))
        return jobs_pb2.GetJobResponse(job=self.job)

    def ListJobs(self, request: jobs_pb2.ListJobsRequest, context: grpc.ServicerContext) -> jobs_pb2.ListJobsResponse:
        self._check(context)
        if self.refusals:
            refuse(context, self.refusals.popleft())
        # 450 jobs; the token is the number of the first job of the page.
        first = int(request.page_token or 0)
        last = min(first + min(request.page_size or 50, 200), 450)
        found = [jobs_pb2.Job(job_id=str(number), state=jobs_pb2.STATE_COMPLETED) for number in range(first, last)]
        return jobs_pb2.ListJobsResponse(jobs=found, next_page_token=str(last) if last < 450 else "")

    def CancelJob(self, request: jobs_pb2.CancelJobRequest, context: grpc.ServicerContext) -> jobs_pb2.CancelJobResponse:
        self._check(context)
        self.cancel_asked.set()
        if self.stubborn:
            return jobs_pb2.CancelJobResponse(job=self.job)
        self.job.state = jobs_pb2.STATE_CANCELLED
        self.job.cost_millicredits = 7
        self.cancelled.set()
        return jobs_pb2.CancelJobResponse(job=self.job)

    def RetryJob(self, request: jobs_pb2.RetryJobRequest, context: grpc.ServicerContext) -> jobs_pb2.RetryJobResponse:
        self._check(context)
        if self.refusals:
            refuse(context, self.refusals.popleft())
        if self.job.state != jobs_pb2.STATE_FAILED:
            refuse(context, precondition(Reason.ERROR_REASON_JOB_NOT_FAILED, "the job has not failed", {"state": "STATE_PENDING"}))
        self.job.state = jobs_pb2.STATE_PENDING
        self.job.retry_count += 1
        return jobs_pb2.RetryJobResponse(job=self.job)

    def DeleteJob(self, request: jobs_pb2.DeleteJobRequest, context: grpc.ServicerContext) -> jobs_pb2.DeleteJobResponse:
        self._check(context)
        self.delete_asked.append(request.job_id)
        if request.job_id == JOB_ID:
            refuse(context, precondition(Reason.ERROR_REASON_JOB_NOT_TERMINAL, "the job has not ended", {"state": "STATE_PENDING"}))
        receipt = jobs_pb2.DeletionReceipt(job_id=request.job_id, object_count=2, size_bytes=12345, media_pending=request.job_id == "b")
        return jobs_pb2.DeleteJobResponse(receipt=receipt)

    # Uploads

    def CreateUpload(self, request: jobs_pb2.CreateUploadRequest, context: grpc.ServicerContext) -> jobs_pb2.CreateUploadResponse:
        self._check(context)
        self.uploads_asked.append(request)
        return self.ticket

    def CompleteUpload(self, request: jobs_pb2.CompleteUploadRequest, context: grpc.ServicerContext) -> jobs_pb2.CompleteUploadResponse:
        self._check(context)
        if self.refusals:
            refuse(context, self.refusals.popleft())
        return jobs_pb2.CompleteUploadResponse(upload=self.upload)

    def GetUpload(self, request: jobs_pb2.GetUploadRequest, context: grpc.ServicerContext) -> jobs_pb2.GetUploadResponse:
        self._check(context)
        if request.upload_id != UPLOAD_ID:
            refuse(context, not_found("upload"))
        return jobs_pb2.GetUploadResponse(upload=self.upload)

    # What operators see of the jobs

    def GetQueueStats(self, request: jobs_pb2.GetQueueStatsRequest, context: grpc.ServicerContext) -> jobs_pb2.GetQueueStatsResponse:
        self._check(context)
        return jobs_pb2.GetQueueStatsResponse(pools=self.pools)

    def ListDeadLetters(self, request: jobs_pb2.ListDeadLettersRequest, context: grpc.ServicerContext) -> jobs_pb2.ListDeadLettersResponse:
        self._check(context)
        self.letters_asked.append(request)
        # 300 failed jobs; the token is the number of the first one of the page.
        first = int(request.page_token or 0)
        last = min(first + min(request.page_size or 50, 200), 300)
        letters = [
            jobs_pb2.DeadLetter(
                job_id=str(number),
                owner_id=USER_ID,
                model="sd-tiny",
                reason="ERROR_REASON_STORE_FAILED",
                message="the store is\x1b[2J away",
                fingerprint=FINGERPRINT,
                attempt=3,
                retry_count=1,
                worker_id="w1",
                hold=jobs_pb2.DeadLetter.HOLD_RELEASED,
                estimated_cost_millicredits=20,
            )
            for number in range(first, last)
        ]
        return jobs_pb2.ListDeadLettersResponse(dead_letters=letters, next_page_token=str(last) if last < 300 else "")

    def RequeueDeadLetter(
        self, request: jobs_pb2.RequeueDeadLetterRequest, context: grpc.ServicerContext
    ) -> jobs_pb2.RequeueDeadLetterResponse:
        self._check(context)
        self.requeue_asked.append(request)
        if self.refusals:
            refuse(context, self.refusals.popleft())
        return self.requeued

    def WatchJobs(self, request: jobs_pb2.WatchJobsRequest, context: grpc.ServicerContext) -> Iterator[jobs_pb2.WatchJobsResponse]:
        self._check(context)
        self.watched.append(request)
        if not self.connections:  # nothing scripted: a job that runs until it is cancelled
            yield jobs_pb2.WatchJobsResponse(snapshot=self.job, resume_token="s")
            self.watching.set()
            assert self.cancelled.wait(WAIT_S)
            yield event(9, state_change=jobs_pb2.StateChange(state=self.job.state, job=self.job))
            return
        for step in self.connections.popleft():
            if isinstance(step, MeshError):
                if step.reason in _ENDS_TOKENS:
                    self.valid.clear()
                refuse(context, step)
            if step.event.HasField("state_change"):
                self.job.CopyFrom(step.event.state_change.job)
            yield step


def scripted(context: grpc.ServicerContext, steps: Iterable[Scripted | MeshError]) -> Iterator[Scripted]:
    for step in steps:
        if isinstance(step, MeshError):
            refuse(context, step)
        yield step


def ceiling_of(
    request: credits_pb2.SetKeyCeilingRequest | credits_pb2.SetUserCeilingRequest, api_key_id: str, context: grpc.ServicerContext
) -> credits_pb2.Ceiling:
    if request.lift == (request.HasField("daily_millicredits") or request.HasField("monthly_millicredits")):
        refuse(context, invalid("lift", "set daily_millicredits or monthly_millicredits, or lift"))
    ceiling = credits_pb2.Ceiling(api_key_id=api_key_id, spent_today_millicredits=1200)
    if request.HasField("daily_millicredits"):
        ceiling.daily_millicredits = request.daily_millicredits
    if request.HasField("monthly_millicredits"):
        ceiling.monthly_millicredits = request.monthly_millicredits
    return ceiling


def refuse(context: grpc.ServicerContext, error: MeshError) -> NoReturn:
    context.abort_with_status(rpc_status.to_status(error.to_status()))
    raise AssertionError  # the line above raises


def event(sequence: int, **payload: Any) -> jobs_pb2.WatchJobsResponse:
    return jobs_pb2.WatchJobsResponse(
        event=jobs_pb2.JobEvent(job_id=JOB_ID, sequence=sequence, attempt=1, **payload), resume_token=f"t{sequence}"
    )


@contextmanager
def spawned(
    environment: dict[str, str | None], *arguments: str, stdout: int | IO[str] = subprocess.PIPE
) -> Generator[subprocess.Popen[str]]:
    kept = {name: value for name, value in (os.environ | environment).items() if value is not None}
    command = [sys.executable, "-c", "from cli.main import app; app()", *arguments]
    with subprocess.Popen(command, env=kept, text=True, stdout=stdout, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()
