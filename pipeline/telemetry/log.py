"""Plain lines on stderr: time, process, text. Processes whose terminal is somebody else's write nothing fancier."""

import sys
import time


class Log:
    """`Log("engine")("text")` prints one line; safe from any thread because it is one write."""

    def __init__(self, process: str) -> None:
        self.process = process

    def __call__(self, text: str) -> None:
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {self.process}: {text}\n")
        sys.stderr.flush()
