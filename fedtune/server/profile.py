"""Check the profile of a device: counts and sizes within plausible bounds, and names that are safe to print."""

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fedtune.server.gateway.refusal import RequestRefusedError
from fedtune.untrusted import clean_text

__all__ = ["read_profile"]

_LONGEST_NAME, _MOST_LABELS = 64, 1000
_PROFILE_BYTES = 1 << 16
_Name = Annotated[str, AfterValidator(lambda text: clean_text(text, _LONGEST_NAME))]
_Count = Annotated[int, Field(ge=0, le=1 << 40, strict=True)]


class _Profile(BaseModel):
    """The profile as a device sends it. Fields of later versions of fedtune are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    memory: Annotated[int, Field(ge=0, le=1 << 50, strict=True)] | None = None
    memory_limit: _Name | None = None
    cores: Annotated[int, Field(ge=1, le=1 << 16, strict=True)] | None = None
    dtypes: Annotated[list[_Name], Field(max_length=16)] | None = None
    examples: _Count | None = None
    labels: Annotated[dict[_Name, _Count], Field(max_length=_MOST_LABELS)] | None = None


def read_profile(sent: Any, who: str) -> str:
    """Return the profile as JSON for the store; raise RequestRefusedError (400) that names an invalid field."""
    try:
        profile = _Profile.model_validate(sent)
    except ValidationError as error:
        first = error.errors()[0]
        where = clean_text(".".join(map(str, first["loc"])) or "it", _LONGEST_NAME)
        raise RequestRefusedError(
            400, f"the profile is not valid: {where}: {first['msg']}; update fedtune", who
        ) from error
    told = json.dumps(profile.model_dump(exclude_unset=True))
    if len(told) > _PROFILE_BYTES:
        raise RequestRefusedError(400, f"a profile has at most {_PROFILE_BYTES} bytes; leave labels out", who)
    return told
