"""Searching a policy's params: many settings on recorded attention, the best few on the model itself."""
