"""Tests the installed vLLM's rejection sampler (`python -m benchmarks.exactness_suite.vllm_sampler ROWS`).

The last line of standard output is JSON: p-values by what was tested, then by setting.
"""

import json
import sys

import torch

from pipeline.engine.vllm import rejection
from pipeline.engine.vllm.install import installed_version


def main(rows: int) -> None:
    """As it comes where it is known to be wrong, then corrected."""
    from vllm.platforms import current_platform

    device = torch.device(current_platform.device_type)
    rejection.prepare()
    tested = {}
    if rejection.needs_correction(installed_version() or "", device.type):
        from vllm.v1.sample import rejection_sampler

        tested["stock"] = rejection.check(device, rows)
        rejection.correct(rejection_sampler)
    tested["unlikely drafts"] = rejection.check(device, rows)
    tested["missing drafts"] = rejection.check(device, rows, missing=True)
    print(json.dumps(tested))


if __name__ == "__main__":
    main(int(sys.argv[1]))
