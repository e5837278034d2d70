"""What a decode step costs under a policy, against full caches, in one run. ``kvpolicy bench`` prints what this finds.

Read ``measuring.py`` first: it makes the rows. No file here holds a target; ``kvpolicy.lab.gpu_report`` does.
"""
