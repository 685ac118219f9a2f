"""What is frozen, what is trained inside it, and what classifies."""
