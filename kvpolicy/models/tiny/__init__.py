"""`builtin:tiny`: weights, tokenizer, the task that they were trained on, and the script that made them."""
