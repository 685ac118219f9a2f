"""Statistics of one pass over the images."""
