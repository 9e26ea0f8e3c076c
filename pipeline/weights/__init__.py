"""Publishing and following policy versions."""

from pipeline.weights.base import Publication, WeightsError, WeightsFollower, WeightsPending, WeightsPublisher
from pipeline.weights.filesystem import COMPANION_FILES, FilesystemFollower, FilesystemPublisher
from pipeline.weights.stream import StreamFollower, WeightsServer

__all__ = [
    "COMPANION_FILES", "FilesystemFollower", "FilesystemPublisher", "Publication", "StreamFollower", "WeightsError",
    "WeightsFollower", "WeightsPending", "WeightsPublisher", "WeightsServer",
]  # fmt: skip
