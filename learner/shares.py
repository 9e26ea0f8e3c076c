"""A batch's passes through the model, divided over ranks."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from learner import ranks
from learner.logprobs import TokenValues, Wanted
from learner.packing import Pack, idle_pack, pack, trained_positions
from pipeline.messages import Trajectory


def pack_for_ranks(
    samples: Sequence[Trajectory],
    indices: Sequence[int],
    micro_batch_tokens: int,
    device: str,
    *,
    share_prompts: bool = False,
) -> list[Pack]:
    """Packs of a mini-batch, rank after rank and the same number for each: all ranks step through their passes
    together, for a sharded layer's weights come from all of them.

    Whole samples, longest first, each to the rank with the fewest tokens so far. Arguments as `pack`'s.
    """
    shares: list[list[int]] = [[] for _ in range(ranks.world_size())]
    if len(shares) == 1:
        return pack(samples, indices, micro_batch_tokens, device, share_prompts=share_prompts)
    tokens = [0] * len(shares)
    lengths = {i: len(samples[i].prompt_ids) + len(samples[i].token_ids) for i in indices}
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        if trained_positions(samples[index]).size:
            lightest = tokens.index(min(tokens))
            shares[lightest].append(index)
            tokens[lightest] += lengths[index]
    packs = [pack(samples, share, micro_batch_tokens, device, share_prompts=share_prompts) for share in shares]
    most = max(map(len, packs))
    return [row for own in packs for row in own + [idle_pack(device)] * (most - len(own))]


def evaluated(packs: Sequence[Pack], evaluate: Callable[[Pack], TokenValues], wanted: Wanted) -> list[TokenValues]:
    """Values of each pack of a mini-batch, of which this rank evaluates its own.

    Args:
        wanted: what `evaluate` computes, the same for all packs.
    """
    own = [evaluate(row) for row in ranks.own(packs)]
    if ranks.world_size() == 1 or not packs:
        return own
    names = ["logp", "entropy"]
    names += ["expected_score"] if wanted.expected_score else []
    names += ["nucleus_entropy"] if wanted.nucleus else []
    names += ["attention_entropy"] if wanted.attention_entropy else []
    mine = torch.stack([torch.cat([getattr(values, name) for values in own]) for name in names])
    sizes = [len(row) for row in packs]
    each = len(packs) // ranks.world_size()
    whole = ranks.exchanged(mine, [sum(sizes[start : start + each]) for start in range(0, len(sizes), each)])
    empty = mine.new_zeros(0)
    found = []
    for size, end in zip(sizes, accumulate(sizes), strict=True):
        columns = dict(zip(names, whole[:, end - size : end], strict=True))
        found.append(TokenValues(*(columns.get(name, empty) for name in TokenValues._fields)))
    return found
