"""The contract kit: a strategy runs on a tiny stream, and every claim about it is compared with what it does.

subject.py        the strategy under check: built, trained and observed
stream.py         the tiny stream, which records which of its images were read
learning.py       the first experience of a separable stream is learnt
training.py       what training changes, and what it leaves
data.py           no task id at test time, no data of other experiences, none kept
reproduction.py   the same bits from the same seed and after a resumption; float32 and bfloat16
leftovers.py      what a training leaves behind of its images
cost.py           stored state and the operations of a step, on a long stream
options.py        the options of the verb, read without torch
command.py        the verb ``cl-bench check``, and all claims in order
"""
