"""Bundled tasks with checkable answers, small enough for a laptop."""
