"""Measuring: time, FLOPs, memory and quality of a method beside the unmodified model.

The pieces know nothing of methods or command lines: ``timing``, ``flops``, ``memory``, ``quality`` and
``environment`` measure, ``record`` says what a measurement looks like, ``scenarios`` put them together per family,
``tasks`` ask both sides the same.

Many runs: ``plan`` says which, ``cells``, ``workers`` and ``cluster`` run them here, in processes or on Ray, ``sweep``
keeps what they find.
"""
