"""Sweeps: many exports and their evaluations, each a cell in a process of its own.

    swept = sweep("sweep.yaml", results="results", jobs=2)

A file names models, formats, targets and any other settings (`sweep_file`); their product is the
`grid`. A cell is known by what its figures follow from (`store`), so that a second run does what is
missing. It is tried in a process of its own (`attempt`, `one_cell`), of which some run at once on
this machine (`local_engine`) or on a cluster (`ray_engine`).
"""
