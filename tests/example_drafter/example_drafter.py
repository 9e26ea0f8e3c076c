"""A drafter from another package: the last token again, up to `times`."""

import numpy as np
from msgspec import Struct

from drafters.base import BaseDrafter, Proposal


class RepeatLast(BaseDrafter):
    """Guesses that the last token comes again."""

    name = "repeat-last"

    class Options(Struct, forbid_unknown_fields=True):
        times: int = 2

    def __init__(self, options=None):
        self.times = (options or self.Options()).times
        self.last = {}

    def begin(self, sequences):
        self.last |= {s.id: int(s.prompt_ids[-1]) for s in sequences}

    def propose(self, request):
        lengths = np.minimum(request.budgets, self.times)
        last = np.array([self.last[i] for i in request.ids], np.int64)
        return Proposal(np.repeat(last[:, None], int(lengths.max()), axis=1), lengths)

    def observe(self, verified):
        self.last |= {i: int(e[-1]) for i, e in zip(verified.ids, verified.emitted, strict=True) if len(e)}

    def end(self, ids):
        for i in ids:
            self.last.pop(i, None)
