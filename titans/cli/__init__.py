"""The command line: ``titans <command>``, one module per command, imported only when its command is run."""
