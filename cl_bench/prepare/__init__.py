"""From the published address of a dataset to a verified folder: fetch, check, unpack, scan.

An interrupted preparation resumes where it stopped: a file or folder has its final name only when it is
complete. Nothing here needs torch or Lightning.
"""
