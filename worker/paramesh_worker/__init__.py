"""Worker role: `ps-worker` supervises training processes, `ps-run` runs a whole cluster on one machine.

Nothing here imports torch: a supervisor must start fast and beat while its children compute.
"""
