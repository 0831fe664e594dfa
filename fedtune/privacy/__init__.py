"""Differential privacy: client updates of bounded norm, and Gaussian noise generated from a secret key."""

from fedtune.privacy.bounds import compute_max_update_norm, compute_mean_noise_std, compute_noise_std
from fedtune.privacy.clipping import ROUNDING_SLACK, clip_to_norm
from fedtune.privacy.gaussian_noise import NormalStream, add_gaussian_noise
from fedtune.privacy.noise_key import load_or_create_noise_key

__all__ = [
    "ROUNDING_SLACK",
    "NormalStream",
    "add_gaussian_noise",
    "clip_to_norm",
    "compute_max_update_norm",
    "compute_mean_noise_std",
    "compute_noise_std",
    "load_or_create_noise_key",
]
