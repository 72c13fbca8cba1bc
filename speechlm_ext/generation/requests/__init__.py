"""Requests and what becomes of them: fields, sampling settings, files, prompts, results."""
