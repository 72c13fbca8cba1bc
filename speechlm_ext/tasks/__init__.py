"""Task templates as data: the conditions and the targets of a task."""

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
