"""What a run keeps beyond its counts, if it is asked to: models and predictions."""

PREDICTIONS = "predictions"
"""Name of the folder of predictions in the folder of a cell."""
