"""Makes the two bundled models, `headrace-py-16m` and its draft `headrace-py-draft`, from installed Python source.

Run `python -m recipes.bundled --out DIR`; README.md beside this file tells the stages, the time and the hardware.
"""
