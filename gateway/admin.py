"""What administrators do to accounts: plan, roles, disabling. Each change ends access tokens that say what is true no more."""

import asyncio
import uuid
from collections.abc import Sequence
from datetime import timedelta

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway import identity, store
from gateway.identity import Account
from gateway.revocations import MARGINS, revoke
from servicekit import audit
from servicekit.database import transaction
from servicekit.errors import Reason, not_found, precondition, unavailable
from servicekit.identity import ROLE_ADMIN

CHANGE_WAIT_MAX_S = 5.0
"""How long a change of an account waits for those before it."""

_log = structlog.get_logger(__name__)


class _TooSoonError(Exception):
    """The tokens of the account were revoked a moment ago: each revocation in one second pushes the times that tokens say further
    ahead, until nobody believes them."""

    def __init__(self, wait_s: float) -> None:
        super().__init__()
        self.wait_s = wait_s


class Administration:
    """Changes of accounts over one database."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def update(
        self,
        user_id: uuid.UUID,
        *,
        actor_id: str,
        plan: str | None = None,
        roles: Sequence[str] | None = None,
        disabled: bool | None = None,
    ) -> Account:
        """Change what is not None; what is so already stays as it is, a plan with its start.

        Access tokens of the account are revoked if anything changed; disabling ends its sessions too. Raises NOT_FOUND,
        FAILED_PRECONDITION (LAST_ADMIN), UNAVAILABLE (too many changes of one account at once).
        """
        left_s = CHANGE_WAIT_MAX_S
        while True:
            try:
                before, account = await self._change(user_id, plan=plan, roles=roles, disabled=disabled)
            except _TooSoonError as error:
                if error.wait_s > left_s:
                    raise unavailable("this account is being changed too often", error.wait_s) from error
                left_s -= error.wait_s
                await asyncio.sleep(error.wait_s)
            else:
                _tell(before, account, actor_id)
                return account

    async def _change(
        self, user_id: uuid.UUID, *, plan: str | None, roles: Sequence[str] | None, disabled: bool | None
    ) -> tuple[Account, Account]:
        """The account before and after. Raises what `update` does; _TooSoonError, then nothing is changed."""
        async with transaction(self._engine) as connection:
            before = await store.lock_user(connection, user_id)
            if before is None:
                raise not_found("account")
            account = before
            roles = before.roles if roles is None else tuple(sorted(roles))
            disabled = before.disabled if disabled is None else disabled
            if _administers(before.roles, disabled=before.disabled) and not _administers(roles, disabled=disabled):
                await store.lock_admins(connection)
                if not await store.has_other_admin(connection, user_id, ROLE_ADMIN):
                    raise precondition(Reason.ERROR_REASON_LAST_ADMIN, "nobody else has the role admin: give it to somebody first")
            if plan is not None and plan != before.plan:
                account = await store.start_plan(connection, user_id, plan)
            if set(roles) != set(before.roles):
                account = await store.set_roles(connection, user_id, roles)
            if disabled != before.disabled:
                account = await store.set_disabled(connection, user_id, disabled)
            if disabled and not before.disabled:
                await store.end_sessions(connection, user_id, identity.RefreshDecision.END_ACCOUNT_DISABLED.value)
            # Enabled again: tokens from before were revoked then.
            if account != before and (account.disabled or not before.disabled):
                too_soon = await store.revoked_ahead(connection, user_id) - MARGINS["user"]
                if too_soon > timedelta():
                    raise _TooSoonError(too_soon.total_seconds())
                await revoke(connection, "user", user_id)
        return before, account


def _administers(roles: Sequence[str], *, disabled: bool) -> bool:
    return ROLE_ADMIN in roles and not disabled


def _tell(before: Account, account: Account, actor_id: str) -> None:
    user_id = str(account.user_id)
    if account.plan != before.plan:
        _log.info("account.plan_changed", user_id=user_id, actor_id=actor_id, before=before.plan, plan=account.plan)
        audit.about(plan_before=before.plan)
    if set(account.roles) != set(before.roles):
        _log.info("account.roles_changed", user_id=user_id, actor_id=actor_id, before=before.roles, roles=account.roles)
        audit.about(roles_before=",".join(before.roles))
    if account.disabled != before.disabled:
        _log.info("account.disabled" if account.disabled else "account.enabled", user_id=user_id, actor_id=actor_id)
        audit.about(disabled_before=str(before.disabled).lower())
