"""From images on disk to the batches of one experience."""
