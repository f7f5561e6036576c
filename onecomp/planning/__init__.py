"""What a run will need, from shapes alone: operations, memory, network, time and cost."""
