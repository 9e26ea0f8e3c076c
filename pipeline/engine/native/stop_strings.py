"""Ending a response at a string of its text, which can span tokens and drafts."""

from collections.abc import Sequence

from pipeline.models.tokenizer import TextStream


class StopStrings:
    """Watches the text of one response for strings that end it.

    Tokens up to and including the one that completes a string are the response; its text is not cut inside a token.
    """

    def __init__(self, strings: Sequence[str], stream: TextStream, min_new_tokens: int) -> None:
        """
        Args:
            strings: not empty ones.
            min_new_tokens: a string that one of the first so many tokens completes does not count.
        """
        self._strings, self._stream, self._ignored = strings, stream, min_new_tokens
        self._longest = max(map(len, strings))
        self._tail = ""

    def first_end(self, token_ids: Sequence[int]) -> int | None:
        """Reads the response's next tokens; how many of them there are up to the first that completes a string."""
        for count, token in enumerate(token_ids, 1):
            if self._completes(token):
                return count
        return None

    def _completes(self, token: int) -> bool:
        before, self._tail = len(self._tail), self._tail + self._stream.step(token)
        text, self._tail = self._tail, self._tail[-(self._longest - 1) :] if self._longest > 1 else ""
        if self._ignored:
            self._ignored -= 1
            return False
        # Only what ends in this token's piece is new; what ended before was looked at, or came too early to count.
        return any(string in text[max(0, before - len(string) + 1) :] for string in self._strings)
