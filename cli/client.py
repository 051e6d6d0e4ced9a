"""Calls to the edge as one user: login kept fresh or an API key, retries, watches that reconnect.

Nothing here prints or knows a command.
"""

import re
import sys
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import grpc

from cli.connection import Backoff, EdgeAddress, open_channel
from cli.failures import CommandError, ExitCode, code_of, reason_of, retry_after_s, usage
from cli.session import Session, SessionFile, SessionMemory, SessionStore
from cli.settings import ClientSettings
from genmesh.credits.v1 import credits_pb2_grpc, payments_pb2_grpc
from genmesh.identity.v1 import identity_pb2, identity_pb2_grpc
from genmesh.inference.v1 import inference_pb2_grpc
from genmesh.jobs.v1 import jobs_pb2, jobs_pb2_grpc

CALL_TIMEOUT_S = 15.0
RETRY_WINDOW_S = 20.0
RECONNECT_WINDOW_S = 120.0
REFRESH_MARGIN_S = 30.0
RENEWALS_MAX = 2
RENEWAL_PAUSE_S = 1.0
"""Tokens name the second of their issue: one of the very second of a revocation is refused although it came after."""

TERMINAL = frozenset({jobs_pb2.STATE_COMPLETED, jobs_pb2.STATE_FAILED, jobs_pb2.STATE_CANCELLED})

# How a stream ends when a proxy or a process between us and the job goes away.
_INTERRUPTIONS = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED})
# The same, but only when no service of ours said it: a reset HTTP/2 stream.
_RESETS = frozenset({grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED})

# Refusals that another access token may mend; Envoy may give no reason.
_TOKEN_REASONS = frozenset(
    {
        "",
        "ERROR_REASON_TOKEN_MISSING",
        "ERROR_REASON_TOKEN_INVALID",
        "ERROR_REASON_TOKEN_EXPIRED",
        "ERROR_REASON_TOKEN_REVOKED",
    }
)

# Refusals that look like the above and stand for hours: until a day or a month is over.
_LASTING = frozenset({"ERROR_REASON_CEILING_REACHED"})

PAGE_SIZE_MAX = 200

_API_KEY = re.compile(r"gmk_[\w-]{1,508}", re.ASCII)

Item = TypeVar("Item")
Request = TypeVar("Request")
Response = TypeVar("Response")


class Edge:
    """Calls to one edge as one user; a context manager that closes the connection."""

    def __init__(
        self,
        url: str,
        *,
        store: SessionStore,
        ca_file: Path | None = None,
        credentials: tuple[str, str] | None = None,
        api_key: str | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`credentials` (e-mail, password) sign in by themselves when the store has no login. With `api_key` no login is used."""
        self.address = EdgeAddress.parse(url)
        self._store = store
        self._credentials = credentials
        self._api_key = api_key
        self._sleep = sleep
        self._session: Session | None = None
        self._reached = False
        self._stopped = False
        self._watching: grpc.RpcContext | None = None
        self._ca_file = ca_file
        self._channel = open_channel(self.address, ca_file)
        self.identity = identity_pb2_grpc.IdentityServiceStub(self._channel)
        self.identity_admin = identity_pb2_grpc.IdentityAdminServiceStub(self._channel)
        self.jobs = jobs_pb2_grpc.JobsServiceStub(self._channel)
        self.jobs_admin = jobs_pb2_grpc.JobsAdminServiceStub(self._channel)
        self.credits = credits_pb2_grpc.CreditsServiceStub(self._channel)
        self.ledger_admin = credits_pb2_grpc.LedgerAdminServiceStub(self._channel)
        self.payments = payments_pb2_grpc.PaymentsServiceStub(self._channel)
        self.models = inference_pb2_grpc.ModelCatalogServiceStub(self._channel)

    @classmethod
    def of(cls, settings: ClientSettings, url: str | None = None, *, stored_login: bool = False, api_key: str | None = None) -> Self:
        """The edge that option, environment, stored login or default name, in this order.

        `api_key`, then key, e-mail and password of the environment come before the stored login, except with `stored_login`.
        Raises CommandError (usage) where the environment has both a key and e-mail and password.
        """
        file = SessionFile(settings.session_path)
        chosen = url or settings.edge_url
        if chosen is None:
            stored = file.load()
            chosen = stored.edge if stored else None
        credentials = (settings.email, settings.password.get_secret_value()) if settings.email and settings.password else None
        if stored_login:
            credentials = api_key = None
        elif api_key is None and settings.api_key is not None:
            if credentials:
                raise usage("both GENMESH_API_KEY and GENMESH_EMAIL with GENMESH_PASSWORD are set", "unset the one that is not meant")
            api_key = parse_api_key(settings.api_key.get_secret_value(), "GENMESH_API_KEY")
        return cls(
            chosen or settings.default_edge,
            store=SessionMemory() if credentials or api_key else file,
            ca_file=settings.ca_file,
            credentials=None if api_key else credentials,
            api_key=api_key,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._channel.close()

    @property
    def url(self) -> str:
        """The edge's address."""
        return self.address.url

    # Login

    def session(self) -> Session:
        """The login, refreshed when its access token is about to expire. Raises CommandError when nobody is signed in."""
        if self._session is None:
            stored = self._store.load()
            if stored is not None and stored.edge == self.url:  # tokens never go to another edge than the one that gave them
                self._session = stored
            elif self._credentials is not None:
                self._session = self.sign_in(*self._credentials)
            elif stored is not None:
                raise CommandError(
                    f"you are signed in at {stored.edge}, not at {self.url}",
                    f"sign in with `genmesh login --edge {self.url}`",
                    code=ExitCode.DENIED,
                )
            else:
                raise CommandError(
                    "you are not signed in",
                    "sign in with `genmesh login`, or make an account with `genmesh register`",
                    code=ExitCode.DENIED,
                )
        if self._session.expire_time - time.time() < REFRESH_MARGIN_S:
            self._refresh(self._session)
        return self._session

    def sign_in(self, email: str, password: str) -> Session:
        """Sign in and store the login."""
        return self._sign_in(identity_pb2.SignInRequest(password=identity_pb2.PasswordCredential(email=email, password=password)))

    def sign_in_with_google(self, code: identity_pb2.AuthorizationCode) -> Session:
        """Sign in with what Google sent the browser back with, and store the login."""
        # A code works once: repeated after a lost answer it would only be refused.
        return self._sign_in(identity_pb2.SignInRequest(google_code=code), repeatable=False)

    def _sign_in(self, request: identity_pb2.SignInRequest, *, repeatable: bool = True) -> Session:
        session = self._to_session(self.call(self.identity.SignIn, request, signed_in=False, repeatable=repeatable))
        with self._store.locked():
            self._store.save(session)
        self._session = session
        return session

    def sign_out(self) -> bool:
        """End the stored session, at the edge where it can be reached, and forget it. False: there was none."""
        with self._store.locked():
            stored = self._store.load()
            if stored is None:
                return False
            if stored.edge == self.url:
                with suppress(grpc.RpcError):  # an edge that is down, a session that has ended: the login is forgotten all the same
                    self._end(stored)
            self._store.clear()
        self._session = None
        return True

    def _end(self, session: Session) -> None:
        """End the session that an access token belongs to; an expired token is changed for a last one first."""
        request = identity_pb2.SignOutRequest()
        try:
            self.identity.SignOut(request, timeout=CALL_TIMEOUT_S, metadata=_authorization(session))
        except grpc.RpcError as error:
            if code_of(error) is not grpc.StatusCode.UNAUTHENTICATED:
                raise
            refresh = identity_pb2.RefreshSessionRequest(refresh_token=session.refresh_token)
            last = self._to_session(self.identity.RefreshSession(refresh, timeout=CALL_TIMEOUT_S))
            self.identity.SignOut(request, timeout=CALL_TIMEOUT_S, metadata=_authorization(last))

    def _refresh(self, stale: Session) -> Session:
        with self._store.locked():
            stored = self._store.load()
            if stored is not None and stored.edge == self.url and stored.access_token != stale.access_token:
                self._session = stored  # another command has refreshed it meanwhile
                return stored
            try:
                request = identity_pb2.RefreshSessionRequest(refresh_token=stale.refresh_token)
                response = self.call(self.identity.RefreshSession, request, signed_in=False)
            except grpc.RpcError as error:
                if code_of(error) is not grpc.StatusCode.UNAUTHENTICATED:
                    raise
                self._store.clear()
                self._session = None
                if self._credentials is None:
                    raise CommandError("your session has ended", "sign in with `genmesh login`", code=ExitCode.DENIED) from error
            else:
                self._session = self._to_session(response)
                self._store.save(self._session)
                return self._session
        return self.sign_in(*self._credentials)

    def _caller(self) -> Session | None:
        """The login to call with; None where a key is used."""
        return self.session() if self._api_key is None else None

    def _metadata(self, session: Session | None) -> tuple[tuple[str, str], ...]:
        return _authorization(session) if self._api_key is None else (("x-api-key", self._api_key),)

    def _renewed(self, error: grpc.RpcError, session: Session | None, renewals: int) -> bool:
        """Get another access token where `error` refused this one: whether the call is worth another try.

        `renewals` of this call came before it. Raises what a refresh raises.
        """
        reason = reason_of(error)
        if code_of(error) is not grpc.StatusCode.UNAUTHENTICATED or reason not in _TOKEN_REASONS or renewals >= RENEWALS_MAX:
            return False
        if renewals:
            if reason != "ERROR_REASON_TOKEN_REVOKED":
                return False
            self._sleep(RENEWAL_PAUSE_S)
        if session is not None:  # for a key, the edge itself gets another token at the next call
            self._refresh(session)
        return True

    def _to_session(self, response: identity_pb2.SignInResponse | identity_pb2.RefreshSessionResponse) -> Session:
        return Session(
            edge=self.url,
            user_id=response.user.user_id,
            email=response.user.email,
            access_token=response.access_token,
            refresh_token=response.refresh_token,
            expire_time=response.expire_time.ToMilliseconds() / 1000,
        )

    # Calls

    def call(
        self,
        method: "grpc.UnaryUnaryMultiCallable[Request, Response]",
        request: Request,
        *,
        signed_in: bool = True,
        repeatable: bool = True,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Response:
        """Call a method. What is UNAVAILABLE is tried again for a while if it is `repeatable`: a request that changes
        anything has to carry an id that makes it so. Raises grpc.RpcError, and CommandError when there is no edge at all.
        """
        backoff = Backoff(RETRY_WINDOW_S, sleep=self._sleep)
        renewals = 0
        while True:
            session = self._caller() if signed_in else None
            try:
                response = method(request, timeout=timeout_s, metadata=self._metadata(session) if signed_in else ())
            except grpc.RpcError as error:
                if signed_in and self._renewed(error, session, renewals):
                    renewals += 1
                elif code_of(error) is grpc.StatusCode.UNAVAILABLE:
                    self._check_reachable()
                    if not repeatable or not backoff.wait(retry_after_s(error)):
                        raise
                else:
                    raise
            else:
                self._reached = True
                return response

    def watch(
        self, job_ids: Collection[str] = (), *, on_interruption: Callable[[], None] = lambda: None
    ) -> Generator[jobs_pb2.WatchJobsResponse]:
        """What happens to jobs (none named: to all of the user), until the last of those named has ended.

        Reconnects and resumes by itself, so that nothing is missed and no event is seen twice; `on_interruption` is told.
        Raises grpc.RpcError when the edge refuses, or stays away for longer than RECONNECT_WINDOW_S.
        """
        open_jobs = set(job_ids)
        sequences: dict[str, int] = {}
        token = ""
        responses = self.stream(
            self.jobs.WatchJobs,
            lambda: jobs_pb2.WatchJobsRequest(job_ids=job_ids, resume_token=token),
            on_interruption=on_interruption,
            advice="the job goes on: try `genmesh watch` again",
        )
        with closing(responses):
            for response in responses:
                token = response.resume_token or token
                if response.HasField("event"):
                    event = response.event
                    if event.sequence <= sequences.get(event.job_id, 0):
                        continue
                    sequences[event.job_id] = event.sequence
                yield response
                if stands := _state_in(response):
                    job_id, state = stands
                    # A failed job that is retried is open again.
                    (open_jobs.discard if state in TERMINAL else open_jobs.add)(job_id)
                if job_ids and not open_jobs:
                    return

    def stream(
        self,
        method: "grpc.UnaryStreamMultiCallable[Request, Response]",
        request: Callable[[], Request],
        *,
        on_interruption: Callable[[], None] = lambda: None,
        advice: str = "try again in a moment",
    ) -> Generator[Response]:
        """What a watch sends. It has no end: whenever it breaks, it is opened again with a new `request()`.

        Raises grpc.RpcError when the edge refuses, or stays away for longer than RECONNECT_WINDOW_S.
        """
        backoff = Backoff(RECONNECT_WINDOW_S, sleep=self._sleep)
        renewals = 0
        while True:
            session: Session | None = None
            error: grpc.RpcError | None = None
            if self._stopped:
                raise KeyboardInterrupt
            try:
                session = self._caller()
                call = method(request(), metadata=self._metadata(session))
                self._hold(call)
                try:
                    for response in call:
                        if self._stopped:
                            break
                        self._reached = True
                        renewals = 0
                        backoff.reset()
                        yield response
                finally:
                    call.cancel()
                # It ended well although a watch has no end: the server drains, and another one takes over.
            except grpc.RpcError as interruption:
                if self._stopped:
                    continue
                error = interruption
                if self._renewed(error, session, renewals):
                    renewals += 1
                    continue
                code, reason = code_of(error), reason_of(error)
                if reason in _LASTING or (code not in _INTERRUPTIONS and not (code in _RESETS and not reason)):
                    raise
                self._check_reachable()
            if self._stopped:
                continue
            on_interruption()
            if not backoff.wait(retry_after_s(error) if error else None):
                if error is not None:
                    raise error
                raise CommandError("the edge keeps ending the watch", advice, code=ExitCode.UNAVAILABLE)

    def read(
        self, method: "grpc.UnaryStreamMultiCallable[Request, Response]", request: Request, *, timeout_s: float
    ) -> Generator[Response]:
        """A stream that has an end, read once: it is tried again as `call` does, but only while nothing of it has come.

        Raises grpc.RpcError, also when it breaks.
        """
        backoff = Backoff(RETRY_WINDOW_S, sleep=self._sleep)
        renewals = 0
        while True:
            if self._stopped:
                raise KeyboardInterrupt
            session = self._caller()
            call = method(request, timeout=timeout_s, metadata=self._metadata(session))
            self._hold(call)
            begun = False
            try:
                for response in call:
                    begun = self._reached = True
                    yield response
            except grpc.RpcError as error:
                if self._stopped:
                    continue
                if not begun and self._renewed(error, session, renewals):
                    renewals += 1
                    continue
                if begun or code_of(error) is not grpc.StatusCode.UNAVAILABLE:
                    raise
                self._check_reachable()
                if not backoff.wait(retry_after_s(error)):
                    raise
            else:
                return
            finally:
                call.cancel()

    def stop(self) -> None:
        """Make the stream that is being read, in another thread, raise KeyboardInterrupt."""
        self._stopped = True
        if self._watching is not None:
            self._watching.cancel()

    def _hold(self, call: grpc.RpcContext) -> None:
        """Let `stop` end this stream, also one that came while it was opened and found none to end."""
        self._watching = call
        if self._stopped:
            call.cancel()

    def _check_reachable(self) -> None:
        """Nothing ever answered, and nothing listens or can be trusted: do not keep the user waiting for retries."""
        if not self._reached and not self.address.listening():
            raise CommandError(
                f"nothing answers at {self.url}",
                "start genmesh with `genmesh up`, or name a running one with --edge or GENMESH_EDGE_URL",
                code=ExitCode.UNAVAILABLE,
            )
        if not self._reached and self.address.tls:
            self.address.check_certificate(self._ca_file)


def parse_api_key(text: str, source: str) -> str:
    """The key that `source` has, blanks around it left out. Raises CommandError (usage), which does not repeat it."""
    key = text.strip()
    if not _API_KEY.fullmatch(key):
        raise usage(f"{source} holds no API key", "give the whole key as `genmesh keys create` printed it, and nothing else")
    return key


def paged(fetch: Callable[[int, str], tuple[Iterable[Item], str]], limit: int | None) -> Iterator[Item]:
    """The first `limit` items (None: all) of a list that comes in pages; `fetch(page_size, page_token)` → items, next token."""
    token = ""
    left = sys.maxsize if limit is None else limit
    while left > 0:
        items, token = fetch(min(left, PAGE_SIZE_MAX), token)
        for item in islice(items, left):
            left -= 1
            yield item
        if not token:
            return


def _state_in(response: jobs_pb2.WatchJobsResponse) -> "tuple[str, jobs_pb2.State.ValueType] | None":
    if response.HasField("snapshot"):
        return response.snapshot.job_id, response.snapshot.state
    if response.event.HasField("state_change"):
        return response.event.job_id, response.event.state_change.state
    return None


def _authorization(session: Session | None) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {session.access_token}"),) if session else ()
