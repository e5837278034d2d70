"""Tools for testing policies and runtimes: what a policy keeps, and whether a runtime keeps the same."""
