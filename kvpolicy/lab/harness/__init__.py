"""lm-evaluation-harness over a policy's cache: the model type ``kvpolicy``, and the harness's own command line with it.

python -m kvpolicy.lab.harness --model kvpolicy --model_args pretrained=builtin:smollm2,policy=raas,budget=512 …
"""
