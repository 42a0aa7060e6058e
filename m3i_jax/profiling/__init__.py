"""What a compiled or traced program costs: FLOPs, memory, traffic, collectives, device names and
traces."""
