"""Published numbers as data, our cells beside them, and what may be said of the difference."""
