"""What the page tells, one file a section, in the order in which it is read.

Each is a function of the facts that returns its `Section`, or None where this run has nothing to say there.
"""
