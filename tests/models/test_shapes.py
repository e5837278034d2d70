"""Shapes read from files."""

import json
from pathlib import Path

from kvpolicy.models.shapes import shape_of


def test_a_window_whose_layers_the_family_knows(tmp_path: Path) -> None:
    """Gemma 2's older files name a window, and no kinds of layers: every other layer slides."""
    numbers = {"num_hidden_layers": 4, "num_attention_heads": 2, "hidden_size": 16, "head_dim": 8}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "gemma2", "sliding_window": 8, "num_key_value_heads": 1, **numbers}))
    shape = shape_of(str(file), None)
    assert (shape.governed, [layer.index for layer in shape.local]) == ((1, 3), [0, 2])
