"""Multi-token prediction: the head, the drafter that runs it, and its training."""
