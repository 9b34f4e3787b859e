"""A run on a Ray cluster: the driver places, starts and watches; actors serve and train.

The driver is the process of `python -m recipes.minirl --ray ADDRESS`. Prompts, responses, routes
and weights do not pass through it.
"""
