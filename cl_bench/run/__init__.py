"""A cell, from the words of a command to its result file."""
