"""What the attention of a model is made of: tokens sorted into classes per layer and head, from streamed attention.

``rules.py`` says what the classes are, ``stream.py`` watches rows of attention go by, ``classes.py`` sorts, and
``planted.py`` shows on synthetic attention that what was planted is found.
"""
