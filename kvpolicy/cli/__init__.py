"""The command line: one thin file per verb, none of which imports torch before it needs it."""
