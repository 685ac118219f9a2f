"""Published facts about the four benchmarks: file lists, class lists and label orders, with their hashes.

The lists are stored compactly in this folder and checked against their published sha256 when they are read.
Nothing here needs torch or Lightning.
"""
