"""Attention in memory that grows with the length and not with its square: sinks, sliding windows, packed samples.

`attend.py` is the autograd function, `kernels.py` says what a kernel is and chooses one, and each kernel has a file.
Shape letters beside those of `shapes.py`: `B` batch · `T` queries · `S` keys · `H` heads of queries · `J` of keys, each
shared by `H/J` of those · `D` width of a head · `V` width of a value.
"""
