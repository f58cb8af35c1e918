"""open_clip towers: what can be loaded, loading it, and the form in which it is exported.

`catalogue` is free of torch; `load`, `towers` and `attention` are torch, imported by the commands that need them.
"""
