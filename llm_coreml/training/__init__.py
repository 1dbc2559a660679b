"""Exports in the midst of a training, by a process of their own, which the training outlives.

`callback` is what a trainer is given: it says when. `handover` writes the weights of that moment as
plain files, `export_process` exports and measures them elsewhere, `best` keeps the best, and
`trainer_log` tells the trainer's own trackers. `axolotl_plugin` makes the callback of a YAML file.
"""
