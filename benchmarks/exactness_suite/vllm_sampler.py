"""Tests the installed vLLM's rejection sampler (`python -m benchmarks.exactness_suite.vllm_sampler ROWS`).

The last line of standard output is JSON: p-values by what was tested, then by setting.
"""

import json
import sys
from typing import Any

import torch

from pipeline.engine.vllm import rejection
from pipeline.engine.vllm.install import installed_version, needs_correction


def main(rows: int) -> None:
    """As it comes where it is known to be wrong, then corrected, then told probabilities that are not the drafts'."""
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    device = torch.device(current_platform.device_type)
    rejection.prepare()
    tested = {}
    if needs_correction(installed_version() or "", device.type):
        tested["stock"] = rejection.check(device, rows)
        rejection.correct(rejection_sampler)
    tested["unlikely drafts"] = rejection.check(device, rows)
    tested["missing drafts"] = rejection.check(device, rows, missing=True)
    tested["drawn drafts"] = rejection.check(device, rows, drawn=True)
    right = rejection_sampler.rejection_sample

    def misled(*given: Any) -> torch.Tensor:
        return right(*given[:4], given[4].roll(1, dims=1), *given[5:])

    rejection_sampler.rejection_sample = misled
    tested["wrong probabilities"] = rejection.check(device, rows, drawn=True)
    print(json.dumps(tested))


if __name__ == "__main__":
    main(int(sys.argv[1]))
