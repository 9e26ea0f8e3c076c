"""Publishing and following policy versions."""

from pipeline.weights.base import Publication, WeightsError, WeightsFollower, WeightsPublisher
from pipeline.weights.filesystem import FilesystemFollower, FilesystemPublisher

__all__ = [
    "FilesystemFollower", "FilesystemPublisher", "Publication", "WeightsError", "WeightsFollower", "WeightsPublisher",
]  # fmt: skip
