"""What a run's weights may tell of any one client: contributions of bounded norm, and Gaussian noise from a secret."""

from fedtune.privacy.bounds import deviation, deviation_of_mean, largest_norm
from fedtune.privacy.clip import SLACK, clipped
from fedtune.privacy.noise import Normals, noised
from fedtune.privacy.secret import secret

__all__ = ["SLACK", "Normals", "clipped", "deviation", "deviation_of_mean", "largest_norm", "noised", "secret"]
