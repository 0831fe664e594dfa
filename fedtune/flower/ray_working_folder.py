"""The one private detail of Ray that a simulation on it needs (ray 2.55).

A process that starts Ray has its working folder put first on its workers' search path, unless the run has a folder of
its own for its files. A recipe's paths go by the working folder, so it cannot be left for an empty one.
"""

from ray.job_config import JobConfig

__all__ = ["keep_working_folder_out"]


def keep_working_folder_out() -> None:
    """Let the workers of the Ray that this process is about to start import nothing from the working folder."""
    JobConfig._runtime_env_has_working_dir = lambda _: True
