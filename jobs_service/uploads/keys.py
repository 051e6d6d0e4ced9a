"""Under which keys files of uploads lie in the store: names that nobody can guess."""

import re
import secrets
import uuid

ARRIVALS, CHECKED = "incoming", "uploads"
"""First parts of the keys of files that arrive, and of files that passed."""

_UUID = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_OF_AN_UPLOAD = re.compile(f"({ARRIVALS}|{CHECKED})/{_UUID}/{_UUID}/[A-Za-z0-9_-]+")


def new_key(part: str, owner_id: uuid.UUID, upload_id: uuid.UUID) -> str:
    """A key that was never used."""
    return f"{part}/{owner_id}/{upload_id}/{secrets.token_urlsafe(24)}"


def is_key(key: str) -> bool:
    """Whether an object lies where `new_key` puts files."""
    return _OF_AN_UPLOAD.fullmatch(key) is not None
