"""The pre-training of the embedded backbone, on generated images only."""
