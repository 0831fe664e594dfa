"""The limit of open files, which systems set low for programs that never ask for more."""

import resource

__all__ = ["raise_file_limit"]

_MOST_FILES = 1 << 16


def raise_file_limit() -> int:
    """Raise the limit of open files for this process and its children as far as it may; return the new limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return most
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most
