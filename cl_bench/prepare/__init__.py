"""From the published address of a dataset to a verified folder: fetch, check, unpack, scan.

Whatever is interrupted goes on where it was: a file or a folder appears under its name only once it is whole.
Neither torch nor Lightning is needed.
"""
