"""The contract kit: a strategy runs on a tiny stream, and every claim about it is held to what it does.

subject.py        the strategy under check: built, trained and looked at
stream.py         the tiny stream, which knows which of its images were looked at
stability.py      one training looked at from close by: what must not change in it
data.py           no task id at test, no data of other experiences
reproduction.py   same seed, same bits; cut off, too; float32 and bfloat16
cost.py           memory and operations of a step, on a long stream
claims.py         all claims in order
command.py        the verb ``cl-bench check``
"""
