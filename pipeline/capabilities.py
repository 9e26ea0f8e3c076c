"""What each kind of generator records of a token, for engine and learner alike. Torch-free."""

from pipeline.config import Config
from pipeline.messages import Capabilities

GENERATORS = {
    "native": Capabilities(entropy=True, kept_ids=True),
    "vllm": Capabilities(entropy=False, kept_ids=False),
}
"""engine.generator -> what it gives"""


def capabilities_of(config: Config) -> Capabilities:
    """Of the engines that a configuration describes."""
    return GENERATORS[config.engine.generator]
