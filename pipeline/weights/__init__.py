"""Publishing and following policy versions."""

from pipeline.weights.base import Publication, WeightsError, WeightsFollower, WeightsPublisher
from pipeline.weights.filesystem import COMPANION_FILES, FilesystemFollower, FilesystemPublisher

__all__ = [
    "COMPANION_FILES", "FilesystemFollower", "FilesystemPublisher", "Publication", "WeightsError", "WeightsFollower",
    "WeightsPublisher",
]  # fmt: skip
