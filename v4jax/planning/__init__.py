"""What a program needs before a chip is rented.

Read `workload.py` (the question), `report.py` (the answer), then what it is counted from:
`inventory.py` (the model's real arrays), `layer_trace.py` (layers as one device runs them),
`flops.py`, `hardware.py`. `compile.py` and `ahead_of_time.py`: the real TPU compiler on a machine
without a TPU; `schedule.py`: how it schedules the kernels.
"""
