"""What a model costs: its arrays, its floating-point operations, and what chips offer.

    inventory.py  every weight of a model and every array of a cache, from shapes alone
    flops.py      floating-point operations of tokens, by component
    chips.py      accelerators and slices: memory, rates, links, and where each figure is published

Checkpoints, training and planning use it. It is a floor below the model: functions take abstract
models and caches as arguments. `model.take_inventory` describes a configuration's model.
"""
