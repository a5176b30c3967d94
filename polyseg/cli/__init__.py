"""The command line: parse, call one job, print.

Heavy imports wait inside the commands, so that help comes at once.
"""
