"""The contract kit: a strategy runs on a tiny stream, and every claim about it is held to what it does.

subject.py        the strategy under check: built, trained and looked at
stream.py         the tiny stream, which knows which of its images were looked at
observation.py    one training, seen before, during and after every experience
function.py       the function starts where it ended; merged equals unmerged
freezing.py       frozen parts, old heads
optimizer.py      the optimizer's parameters are the strategy's own
prediction.py     no task id at test
data.py           no data of other experiences
reproduction.py   same seed, same bits; cut off, too
cost.py           memory and operations of a step, on a long stream
precision.py      float32 and bfloat16
claims.py         all claims in order
command.py        the verb ``cl-bench check``
"""
