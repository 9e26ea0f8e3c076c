"""What the hub counts."""

from dataclasses import dataclass

from learner.lease_state import Account


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
    account: Account
    """where every leased sample is"""
    received_samples: int
    received_bytes: int
    """of trajectories that arrived, duplicates included"""
    unjournaled_bytes: int
    """of samples that the journal has not synced yet"""
    journal_stalled: bool
    """its disk is full"""
    strangers: int
    """messages of peers that had not said HELLO"""
    damaged_messages: int
    """whose checksum was wrong"""
    refused_connections: dict[str, int]
    """by reason"""
    sequence_missing: int
    """numbers of engines' streams that were skipped and have not come yet"""
    sequence_repeats: int
    blocked_seconds: float
    """that engines took nothing new because their spools were full, summed"""
    spool_damaged: int
    """stretches of engines' spools that could not be read"""
    journal_damaged: int
    """stretches of the journal that could not be read when the learner started"""
    engine_time: dict[str, float]
    """seconds of engines by what they did, summed over engines"""

    def transport(self) -> dict[str, float]:
        """Numbers for a line of metrics."""
        refused = {f"refused_{reason}": count for reason, count in self.refused_connections.items()}
        names = (
            "received_samples", "received_bytes", "unjournaled_bytes", "journal_bytes", "spooled_bytes",
            "journal_stalled", "blocked_seconds", "bad_messages", "damaged_messages", "strangers", "sends_lost",
            "sequence_missing", "sequence_repeats", "spool_damaged", "journal_damaged",
        )  # fmt: skip
        return {name: float(getattr(self, name)) for name in names} | refused
