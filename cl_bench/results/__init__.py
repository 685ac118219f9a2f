"""What a run leaves, readable without torch."""
