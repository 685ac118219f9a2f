"""What a run leaves: result files, their metrics, and the same on W&B; all readable without torch."""
