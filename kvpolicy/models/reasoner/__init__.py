"""`builtin:reasoner`: weights, tokenizer, the problems that they were trained on, and the script that made them."""
