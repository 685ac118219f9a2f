"""What a run keeps beyond its counts, if it is asked to: models and predictions."""

MODELS = "models"
"""Name of the folder of kept models in the folder of a cell."""

PREDICTIONS = "predictions"
"""Name of the folder of kept predictions in the folder of a cell."""
