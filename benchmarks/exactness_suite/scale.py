"""How much of the suite runs, and with how many samples."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    tables: tuple[tuple[int, int], ...]
    """(vocabulary, draft length) of the enumerated models"""
    vocabulary: int
    """of the random model whose logits are counted on"""
    draws: int
    """verifications of one context behind each chi-square test"""
    draft_tokens: int
    """of each of them"""
    every_rule: bool
    """each setting with each kind of draft; else some settings, each with one"""
    rollouts: int
    """responses behind each joint test"""
    recorded: int
    """responses for each setting whose log-probs are compared with fresh forwards"""


FULL = Scale(((3, 2), (2, 3), (5, 2), (4, 3)), 256, 50_000, 2, True, 20_000, 12)
SHORT = Scale(((3, 2),), 64, 50_000, 1, False, 2_000, 1)
