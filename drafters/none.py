"""No drafts: plain decoding, one token a forward pass."""

from drafters.base import BaseDrafter


class NoDrafter(BaseDrafter):
    """Proposes nothing."""

    name = "none"
