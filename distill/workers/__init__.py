"""Processes of their own for what cannot be trusted to end: started by their path, with little time and memory."""
