"""Everything that a GPU can tell, in two runs of at most 270 seconds: ``make gpu-check PART=1`` and ``PART=2``.

Parts, in order of value. Of run 1: ``build`` for this card; ``limits`` of the card itself; ``kernels``, the most
important ops beside their rivals; ``decode`` steps; the ``tests`` that need CUDA. Of run 2: ``build``, done already on
the machine of run 1; ``sanitizer``, compute-sanitizer's four tools over small shapes of each op; ``train`` steps;
``bench``, the ops' other shapes.

Each part is a process of its own that hands over row after row (:mod:`benchmarks.common.emit`), and each row is a line
of ``report.jsonl`` at once: a part that fails, hangs or is killed hides no other and loses none of its rows, and the
report is made from that file alone. ``--device cpu`` runs the same on tiny shapes, so that this code is tested
everywhere.
"""
