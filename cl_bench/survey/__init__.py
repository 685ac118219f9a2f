"""The survey: one call that checks every strategy on a device, and measures what it makes of that device.

options.py    the options of the verb ``cl-bench survey``, which ``make gpu`` calls
plan.py       the rows of a survey, the most valuable first
command.py    the file of rows, and who works on which
worker.py     a process that works on one row after another, and may die
agreement.py  rows that check a strategy: CPU against device, repeated, cut off and resumed, bf16
speed.py      rows that measure: steps, compiled code, loading, a stream of the shape of ImageNet-R
table.py      the tables for cl_bench/bench/README.md
"""
