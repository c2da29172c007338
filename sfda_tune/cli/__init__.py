"""The command line: options in, tables and messages out.

Here: one module per group of commands, and the terminal. Not here: anything that Python callers
would miss; the commands call what they call.
"""
