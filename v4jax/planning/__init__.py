"""What a program needs before a chip is rented.

    workload.py       the question: a model, a slice, a mesh, and what runs there
    report.py         the answer, as data and as text
    programs.py       the step that would run, as shapes with shardings
    memory.py         bytes of one device; step_trace.py, liveness.py: what the step makes
    roofline.py       time at best; communication.py, collectives.py: what devices send
    remedies.py       what would make it fit
    compile.py        the TPU compiler's word, on a machine without a TPU (ahead_of_time.py)

Planning is above training and the engine, and asks them for their programs. Read `workload.py` and
`report.py` first.
"""
