"""Other projects measured beside this one, each in an environment of its own. The numbers are ratios of one run."""
