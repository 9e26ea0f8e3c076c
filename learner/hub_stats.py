"""What the hub counts."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HubStats:
    """Counters at one moment; totals never go down while the learner lives."""

    engines: int
    """connected"""
    credit: int
    """samples that engines could start now"""
    generated_tokens: int
    busy_seconds: float
    """of generators, summed over engines, engines that have gone included"""
    in_flight: int
    """samples granted that have neither arrived nor failed"""
    buffered: int
    """samples arrived and not yet trained or dropped"""
    step: int
    trained_samples: int
    dropped: dict[str, int]
    """samples not trained, by reason"""
    reissued: int
    """leases granted again"""
    spooled_bytes: int
    """on the disks of engines"""
    journal_bytes: int
    bad_messages: int
    sends_lost: int
