"""What is published about the four benchmarks: file lists, class lists and label orders, with their hashes.

Lists are kept compactly beside the modules and are checked against their published sha256 when they are read.
Neither torch nor Lightning is needed.
"""
