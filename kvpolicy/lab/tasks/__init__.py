"""Tasks with right answers, made by seeded generators: what a model writes is graded exactly, and nothing is fetched.

A task is one file here with a subclass of ``Task``; ``base.py`` says what that is. An installed package adds its own by
an entry point of the group that ``registry.py`` names.
"""
