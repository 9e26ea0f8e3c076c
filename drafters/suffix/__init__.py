"""Suffix automata in flat arrays: compiled core, blocks of memory, what is kept of generated text, corpora on disk."""
