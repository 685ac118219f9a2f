"""What a run keeps beyond its counts, if it is asked to: models and predictions."""
