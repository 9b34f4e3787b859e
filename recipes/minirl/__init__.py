"""The reference recipe: synchronous RL with verifiable rewards, MiniRL, and routing replay.

`python -m recipes.minirl --help` explains itself. `__main__` prepares, launches and supervises;
`train` is the loop, one process per trainer rank. A step goes through the folders in this order:
`data`, `rollout`, `policy`, `publish`; around it are `settings`, `launch` and `job`.
"""
