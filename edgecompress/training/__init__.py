"""The training loop and what it learns from: labels, teachers, schedules, several processes."""
