"""One file per architecture family: what its attention is, and which of its layers a policy may touch."""
