"""Numbers from kept predictions, without a model."""
