"""One YAML file per method: its answers, the paper it comes from, what differs from it, and its tests."""
