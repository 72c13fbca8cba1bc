"""Task templates as data: what a task is given, and what it must produce."""

from speechlm_ext.tasks.templates import (
    Entry,
    TaskTemplate,
    builtin_tasks,
    check_tasks,
    load_tasks,
    parse_templates,
    resolve_task,
)

__all__ = [
    "Entry",
    "TaskTemplate",
    "builtin_tasks",
    "check_tasks",
    "load_tasks",
    "parse_templates",
    "resolve_task",
]
