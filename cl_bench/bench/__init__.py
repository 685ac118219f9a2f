"""The bench: how fast a training step is, compared with the shortest loop that one can write by hand.

options.py  the options of the verb ``cl-bench bench``
command.py  what is measured, and the table of it
subject.py  a strategy in the middle of a stream of noise
floor.py    the hand-written loop
"""
