"""Typed configuration: TOML plus dotted overrides. Imports no torch and nothing of ours above it."""

from pipeline.config.check import changed_keys, check_against_model, check_config, resolve_threads
from pipeline.config.load import EMBEDDED, load_config, render
from pipeline.config.types import Config

__all__ = [
    "EMBEDDED",
    "Config",
    "changed_keys",
    "check_against_model",
    "check_config",
    "load_config",
    "render",
    "resolve_threads",
]
