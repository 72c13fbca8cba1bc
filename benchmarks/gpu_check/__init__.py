"""All checks on a GPU, in one command and under nine minutes: ``make gpu-check``.

Parts, in this order: ``build`` for this card, ``tests`` that need CUDA, ``limits`` of the card itself, ``bench`` of
every op beside its rivals, ``train`` steps, ``decode`` steps, ``sanitizer`` (compute-sanitizer over a small shape of
each op). Each part is a process of its own with a share of the time: one that fails, hangs or is killed hides no other,
and the report is written anew after each. ``--device cpu`` runs the same on tiny shapes, so that this code is tested
everywhere.
"""
