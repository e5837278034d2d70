"""The long search for counter-examples: `python -m kvpolicy.lab.fuzz`."""
