"""The one private part of Ray that a simulation needs (ray 2.55).

Ray puts the working folder of the process that starts it first on the import path of its workers, unless the job has a
folder of its own for its files. Changing to an empty folder is no solution, because paths in a recipe are relative to
the working folder.
"""

from ray.job_config import JobConfig

__all__ = ["keep_working_folder_out"]


def keep_working_folder_out() -> None:
    """Keep the working folder off the import path of Ray's workers. Must be called before Ray starts."""
    JobConfig._runtime_env_has_working_dir = lambda _: True
