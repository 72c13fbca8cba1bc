"""Launch and sync budgets: the work that a call puts on a GPU and how often the host waits for it, counted without one.

    recorder.py        counts launches and syncs of everything that runs inside it
    simulated_cuda.py  tensors that are on ``cuda:0`` for Python code, with values on the CPU
    cuda_only.py       ops that torch has on CUDA alone
    cases.py           the counted calls: the ops
    model_cases.py     a training step and a decode step, for any number of layers
    table.py           counts all of them; budgets.json and the table of docs/ops/budgets.md

``python -m python_tests.cuda_on_cpu.launches`` prints the counts, ``--update`` writes both files.
"""
