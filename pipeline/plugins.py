"""A user's own code, named in the configuration as module:attribute. Torch-free."""

import os
import sys


def search_working_directory() -> None:
    """Let modules in the working directory be imported; an installed command does not look there by itself."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
