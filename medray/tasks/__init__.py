"""What can be learnt: a task is one file here and one line in the catalogue."""
