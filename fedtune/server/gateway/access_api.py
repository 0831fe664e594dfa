"""Requests of admins: enrolment tokens, operators and the audit log."""

import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request

from fedtune.recipe.schema import Tag
from fedtune.server.credentials import encode_token, generate_secret, hash_secret
from fedtune.server.gateway.device_api import check_name
from fedtune.server.gateway.refusal import AuditLog, RequestRefusedError
from fedtune.tracking import Access, AuditRecord, OperatorRecord, TokenRecord

__all__ = ["AccessApi", "read_tags"]

_HOURS, _LONGEST_HOURS = 24.0, 24 * 365
_TAGS: TypeAdapter[list[Tag]] = TypeAdapter(list[Tag])
_SHOWN_OF_HASH = 12
"""The number of characters of a secret's hash that name a token. They are unique, but do not allow an enrolment."""
_LINES, _MOST_LINES = 100, 1000


@dataclass(frozen=True)
class AccessApi:
    """The gateway's API for admins. ``who`` is the name of the authenticated operator."""

    access: Access
    audit: AuditLog
    url: str
    ca: str

    def token(self, who: str, _: Request, sent: Any) -> dict[str, Any]:
        """Create a one-time enrolment token."""
        name, hours, tags = _token_request(sent)
        secret = generate_secret()
        self.access.add_token(hash_secret(secret), name or None, hours, tags)
        tagged = f", tagged {', '.join(tags)}" if tags else ""
        self.audit.record_action(
            who, f"token {hash_secret(secret)[:_SHOWN_OF_HASH]} made for {name or 'any device'}{tagged}"
        )
        return {"token": encode_token(self.url, self.ca, secret)}

    def tokens(self, _: str, __: Request, ___: Any) -> dict[str, Any]:
        """Return the unused tokens, newest first."""
        return {"tokens": [_token_document(found) for found in self.access.list_unused_tokens()]}

    def remove_token(self, who: str, request: Request, _: Any) -> dict[str, Any]:
        """Remove an unused token."""
        found = self.access.remove_token(request.path_params["token"])
        self.audit.record_action(
            who, f"token {found.sha256[:_SHOWN_OF_HASH]} for {found.device_name or 'any device'} removed"
        )
        return {"token": found.sha256[:_SHOWN_OF_HASH]}

    def operators(self, _: str, __: Request, ___: Any) -> dict[str, Any]:
        """Return the operators with their roles."""
        return {"operators": [_operator_document(found) for found in self.access.list_operators()]}

    def remove_operator(self, who: str, request: Request, _: Any) -> dict[str, Any]:
        """Remove an operator. The operator's key is no longer valid."""
        name = request.path_params["operator"]
        self.access.remove_operator(name)
        self.audit.record_action(who, f"operator {name} removed")
        return {"operator": name}

    def lines(self, _: str, request: Request, __: Any) -> dict[str, Any]:
        """Return up to ``limit`` lines of the audit log, newest first, since a time and below the number ``before``."""
        self.audit.flush()
        limit = min(_MOST_LINES, _whole(request, "limit", _LINES))
        before = _whole(request, "before", 0) if "before" in request.query_params else None
        found = self.access.audit.list_lines(limit + 1, since=_since(request), before=before)
        return {"audit": [_line_document(line) for line in found[:limit]], "more": len(found) > limit}


def read_tags(sent: Any) -> list[str]:
    """Return the tags that an operator sent; raise RequestRefusedError if they are invalid."""
    try:
        return _TAGS.validate_python(sent)
    except ValidationError as error:
        raise RequestRefusedError(
            400, f"{str(sent)[:100]} is not a list of tags; use small letters, digits, '.', '_' and '-', 32 at most"
        ) from error


def _token_request(sent: Any) -> tuple[str, float, list[str]]:
    given = sent if isinstance(sent, dict) else {}
    name, hours = given.get("name", ""), given.get("hours", _HOURS)
    if not isinstance(name, str) or not isinstance(hours, int | float) or not 0 < hours <= _LONGEST_HOURS:
        raise RequestRefusedError(
            400, "a token is for a name, which may be empty, and lasts more than 0 hours up to a year"
        )
    if name:
        check_name(name)
    return name, float(hours), read_tags(given.get("tags", []))


def _token_document(found: TokenRecord) -> dict[str, Any]:
    return {
        "token": found.sha256[:_SHOWN_OF_HASH],
        "device_name": found.device_name,
        "created_at": found.created_at.isoformat(),
        "expires_at": found.expires_at.isoformat(),
        "expired": found.expires_at < datetime.now(UTC),
        "tags": found.tags,
    }


def _line_document(line: AuditRecord) -> dict[str, Any]:
    times = {name: getattr(line, name).isoformat() for name in ("recorded_at", "last_recorded_at")}
    return asdict(line) | times


def _operator_document(found: OperatorRecord) -> dict[str, Any]:
    """Return an operator without the hash of the key."""
    return {"name": found.name, "role": found.role, "created_at": found.created_at.isoformat()}


def _whole(request: Request, key: str, otherwise: int) -> int:
    text = request.query_params.get(key, str(otherwise))
    if not re.fullmatch(r"[1-9]\d{0,8}", text, re.ASCII):
        raise RequestRefusedError(400, f"{key}={text[:40]} is not a positive whole number")
    return int(text)


def _since(request: Request) -> datetime | None:
    text = request.query_params.get("since")
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise RequestRefusedError(
            400, f"since={text[:40]} is not a time; write e.g. 2026-05-04T12:00:00+00:00"
        ) from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
