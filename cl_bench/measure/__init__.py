"""What one pass over the images can tell."""
