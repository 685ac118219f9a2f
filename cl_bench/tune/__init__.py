"""Choose settings on held-out training images, with the same budget for every method, and write down how."""
