"""Published numbers as data, compared with the results of our cells."""
