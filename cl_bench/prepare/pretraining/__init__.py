"""How the embedded weights were made, from generated images only."""
