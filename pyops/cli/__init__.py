"""The command line: ``python -m pyops info | selftest | bench | demo | explain | env | ckpt``."""
