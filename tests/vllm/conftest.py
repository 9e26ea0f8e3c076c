"""These tests need vLLM (`make test-vllm`); elsewhere they are skipped."""

import importlib.util
import os

import pytest

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would overrule the small caches that some tests ask for


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = importlib.util.find_spec("vllm") is None
    for item in items:
        if "tests/vllm/" in item.path.as_posix():
            item.add_marker(pytest.mark.vllm)
            if missing:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed here; make test-vllm runs these tests"))
