"""The bench: how fast a training step is, held against the shortest loop that one can write by hand.

stream.py     noise in place of images, without Avalanche
handover.py   a training of Lightning's that takes one step when it is asked to
subject.py    a strategy in the middle of a stream
turn.py       what a run does around an experience
group.py      what is measured of one strategy
floor.py      the hand-written loop
memory.py     the most memory that a call needs
timing.py     calls that alternate, their medians and ratios
table.py      what was found, as text and as JSON
command.py    the verb ``cl-bench bench``
"""
