"""What a program needs before a chip is rented.

Read `ahead_of_time.py`: the real TPU compiler on a machine without a TPU.
"""
